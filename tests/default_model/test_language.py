from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from default_model import language as standard
from default_model.colours import COLOURS
from default_model.evaluation import counts_right, named_objects, names_object, unseen_questions
from default_model.language import KINDS, PHRASES, Language, groups
from default_model.scenes import Composer, Placed, Scene, relation


@pytest.fixture(scope="module")
def scenes(composer: Composer) -> list[Scene]:
    return [composer.compose(seed, "test" if seed % 2 else "train") for seed in range(200)]


def test_every_caption_names_all_objects_in_their_numbers(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in scenes:
        captions = [language.caption(scene, rng), *language.reference_captions(scene)]
        assert len(captions) == 6 and captions[1] == language.canonical_caption(scene)
        for caption in captions:
            assert counts_right(caption, scene, language.nouns), caption
            assert re.fullmatch(r"[a-z,\- ]+", caption) and len(caption.split()) <= 50


def test_relations_in_captions_are_true(language: Language, scenes: list[Scene]) -> None:
    count = 0
    for scene in scenes:
        for caption in language.reference_captions(scene):
            for side, phrase in PHRASES.items():
                if f" {phrase} " not in caption:
                    continue
                count += 1
                first, _second = caption.split(f" {phrase} ")
                a, b = scene.objects
                if not names_object(first, a.noun, language.nouns):
                    a, b = b, a
                assert relation(scene.side, a, b) == side
    assert count > 20


def _answer(language: Language, scene: Scene, question: str) -> str | None:
    """The true answer, derived from the objects in another way than the questions are."""
    named = {g.noun: g for g in groups(scene)}
    if question.startswith("how many "):
        if re.search("how many (objects|things|shapes) ", question):
            return str(len(scene.objects))
        (noun,) = named_objects(re.split(" are | do ", question[9:])[0], language.nouns)
        return str(len(named[noun].members) if noun in named else 0)
    if re.match("is there|do you see|are there", question):
        (noun,) = named_objects(question, language.nouns)
        colour = re.search(rf"(\w+) (?:of )?{noun}\b", question)
        if noun not in named:
            return "no"
        if colour and colour.group(1) in COLOURS:
            return "yes" if named[noun].colour == colour.group(1) else "no"
        return "yes"
    match = re.match(r"is the (.+?) (to the left of|to the right of|above|below) the (.+)\?", question)
    if match:
        (a,), (b,) = (named_objects(match.group(i), language.nouns) for i in (1, 3))
        side = relation(scene.side, named[a].members[0], named[b].members[0])
        return "yes" if PHRASES[side or ""] == match.group(2) else "no"
    match = re.match(r"what is (to the left of|to the right of|above|below) the (.+)\?", question)
    if match:
        (anchor,) = named_objects(match.group(2), language.nouns)
        one = named[anchor].members[0]
        answers = [
            o.noun
            for o in scene.objects
            if o is not one and PHRASES.get(relation(scene.side, o, one) or "") == match.group(1)
        ]
        assert len(answers) == 1, question
        return answers[0]
    match = re.match(r"what (?:color (?:is|are)|is the color of) the (.+)\?", question)
    if match:
        nouns = list(named_objects(match.group(1), language.nouns)) or list(named)
        return named[nouns[0]].colour
    return None


def test_answers_are_true(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(0)
    checked = dict.fromkeys(KINDS, 0)
    for scene in scenes:
        for qa in language.questions(scene, rng):
            assert len(qa.answer.split()) <= 4 and qa.answer == qa.answer.lower()
            truth = _answer(language, scene, qa.question)
            if truth is not None:
                assert qa.answer == truth, (qa, scene.objects)
                checked[qa.kind] += 1
            elif qa.kind == "object":
                assert any(names_object(qa.answer, o.noun, language.nouns) for o in scene.objects)
    assert all(n > 10 for n in checked.values()), checked


def test_yes_and_no_are_balanced_and_zero_occurs(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(1)
    presence = [language.question(scene, rng, "presence") for scene in scenes * 3]
    share = sum(qa is not None and qa.answer == "yes" for qa in presence) / len(presence)
    assert 0.4 < share < 0.6
    counts = [language.question(scene, rng, "count") for scene in scenes]
    assert {qa.answer for qa in counts if qa is not None} == {"0", "1", "2", "3", "4"}


def test_grammar(language: Language) -> None:
    assert language.one("apple") == "an apple" and language.one("apple", "red") == "a red apple"
    assert language.one("bus", "orange") == "an orange bus"
    assert language.one("orange", "orange") == "an orange"
    assert language.one("scissors", "gray") == "a pair of gray scissors"
    assert language.many("scissors") == "pairs of scissors" and language.many("mouse") == "mice"
    assert language.the("scissors") == "the pair of scissors"


def test_what_a_text_names(language: Language) -> None:
    assert named_objects("two mice, a teddy bear and an orange bus", language.nouns) == {
        "mouse": 2,
        "teddy bear": 1,
        "bus": 1,
    }
    assert not names_object("a teddy bear", "bear", language.nouns)
    assert names_object("three bears", "bear", language.nouns)
    assert not names_object("a bearing", "bear", language.nouns)
    assert named_objects("three pairs of gray scissors", language.nouns) == {"scissors": 3}
    scene = _scene(("apple", 20), ("bear", 100))
    assert counts_right("a bear and an apple", scene, language.nouns)
    assert not counts_right("two bears and an apple", scene, language.nouns)


def _scene(*things: tuple[str, int]) -> Scene:
    blank = standard.standard().imagined(random.Random(0))
    objects = tuple(Placed("", noun, None, (x - 15, 50, x + 15, 80), False) for noun, x in things)
    return Scene(0, "test", blank.image, objects, "", blank.patch_object)


def test_captions_by_hand(language: Language) -> None:
    assert (
        language.canonical_caption(_scene(("apple", 20), ("bear", 100))) == "an apple to the left of a bear"
    )
    assert language.canonical_caption(_scene(("apple", 50), ("bear", 70))) == "an apple and a bear"
    three = _scene(("apple", 20), ("bear", 60), ("apple", 100))
    assert language.canonical_caption(three) == "two apples and a bear"


def test_conversations(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in scenes:
        turns = language.conversation(scene, rng)
        assert 1 <= len(turns) <= 3
        assert any(names_object(turns[0][1], o.noun, language.nouns) for o in scene.objects)


def test_text_ends_in_newlines(language: Language) -> None:
    lines = list(islice(language.text_corpus(random.Random(0)), 300))
    assert lines == list(islice(language.text_corpus(random.Random(0)), 300))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    assert any(line.startswith("Question: ") for line in lines) and any(
        line.startswith("a photo of ") for line in lines
    )


def test_questions_in_turn(composer: Composer, language: Language) -> None:
    kinds = [qa.kind for _, qa in unseen_questions(composer, language, 10)]
    assert kinds == list(KINDS) * 2
