"""Answers are true, derived here in another way than the questions are; and wordings do not betray them."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict

import pytest

from default_model.asking import CANNOT_TELL, REPLIES
from default_model.colours import COLOURS
from default_model.evaluation import named_objects, names_object, unseen_questions
from default_model.facts import PHRASES, groups
from default_model.grammar import Grammar
from default_model.language import Language
from default_model.photo import Photo
from default_model.plain_questions import PLAIN_KINDS, plain_question
from default_model.qa import KINDS, QA
from default_model.scene_questions import SceneQuestions
from default_model.scenes import Composer, Noun, Scene, relation
from default_model.wordings import Split


@pytest.fixture(scope="module")
def scenes(composer: Composer) -> list[Scene]:
    return [composer.compose(seed, "test" if seed % 2 else "train") for seed in range(200)]


def _answer(grammar: Grammar, scene: Scene, question: str) -> str | None:
    """The true answer to a question in a plain wording, None where this test does not know it."""
    named = {g.noun: g for g in groups(scene)}
    if question.startswith("how many "):
        if re.search("how many (objects|things|shapes) ", question):
            return str(len(scene.objects))
        (noun,) = named_objects(re.split(" are | do ", question[9:])[0], grammar.nouns)
        return str(len(named[noun].members) if noun in named else 0)
    if re.match("is there|do you see|are there", question):
        (noun,) = named_objects(question, grammar.nouns)
        colour = re.search(rf"(\w+) (?:of )?{noun}\b", question)
        if noun not in named:
            return "no"
        if colour and colour.group(1) in COLOURS:
            return "yes" if named[noun].colour == colour.group(1) else "no"
        return "yes"
    match = re.match(r"is the (.+?) (to the left of|to the right of|above|below) the (.+)\?", question)
    if match:
        (a,), (b,) = (named_objects(match.group(i), grammar.nouns) for i in (1, 3))
        side = relation(scene.side, named[a].members[0], named[b].members[0])
        return "yes" if PHRASES[side or ""] == match.group(2) else "no"
    match = re.match(r"what is (to the left of|to the right of|above|below) the (.+)\?", question)
    if match:
        (anchor,) = named_objects(match.group(2), grammar.nouns)
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
        nouns = list(named_objects(match.group(1), grammar.nouns)) or list(named)
        return named[nouns[0]].colour
    return None


def test_plain_answers_are_true(language: Language, scenes: list[Scene]) -> None:
    rng, checked = random.Random(0), dict.fromkeys(PLAIN_KINDS, 0)
    for scene in scenes:
        for kind in PLAIN_KINDS:
            qa = plain_question(language, scene, rng, kind)
            if qa is None:
                continue
            assert len(qa.answer.split()) <= 4 and qa.answer == qa.answer.lower()
            truth = _answer(language, scene, qa.question)
            if truth is not None:
                assert qa.answer == truth, (qa, scene.objects)
                checked[kind] += 1
            elif kind == "object":
                assert any(names_object(qa.answer, o.noun, language.nouns) for o in scene.objects)
    assert all(n > 10 for n in checked.values()), checked


class Recorded(SceneQuestions):
    """Asks as its base does and notes form and slots of every question, for a test to find the answer itself."""

    form = ""
    slots: dict[str, str]

    def ask(self, form: str, answer: str, **slots: str) -> QA:
        self.form, self.slots = form, slots
        return super().ask(form, answer, **slots)


def _truth(grammar: Grammar, scene: Scene, form: str, slots: dict[str, str]) -> str | None:
    """The answer to a form of question from the objects alone; None where this test does not know it."""
    nouns = [o.noun for o in scene.objects]
    phrase = slots.get("the", slots.get("a", slots.get("many", slots.get("those", slots.get("one", "")))))
    asked = list(named_objects(phrase, grammar.nouns))
    one = asked[0] if len(asked) == 1 else ""
    colours = {o.noun: o.colour for o in scene.objects}
    missing = f"there is no {phrase.removeprefix('the ')}"
    if form == "count.all":
        return str(len(nouns))
    if form == "count.some" and one:
        return str(nouns.count(one))
    if form in ("presence.any", "presence.bare") and one:
        return "yes" if one in nouns else "no"
    if form == "presence.one" and one:
        colour = re.sub(r"\b(an?|pair of|piece of)\b", "", phrase).split()[0]
        there = one in nouns and (colour not in COLOURS or colour == one or colours[one] == colour)
        return "yes" if there else "no"
    if form in ("color.one", "color.many"):
        return str(colours[one]) if one in nouns else missing
    if form == "color.check":
        return "yes" if colours[one] == slots["color"] else "no"
    if form == "position.where" and one not in nouns:
        return missing
    if form == "position.where":
        (box,) = [o.box for o in scene.objects if o.noun == one]
        x, y = (box[0] + box[2]) / 2 / scene.side - 0.5, (box[1] + box[3]) / 2 / scene.side - 0.5
        if max(abs(x), abs(y)) < 0.09:
            return "in the center"
        across, along = "left" if x < 0 else "right", "top" if y < 0 else "bottom"
        if min(abs(x), abs(y)) > 0.14:
            return f"at the {along} {across}"
        return f"on the {across}" if abs(x) > abs(y) else f"at the {along}"
    if form == "object.color":
        (noun,) = [o.noun for o in scene.objects if o.colour == slots["color"]]
        return noun
    return None


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true(language: Language, scenes: list[Scene], split: Split) -> None:
    checked: Counter[str] = Counter()
    for seed, scene in enumerate(scenes * 2):
        asker = Recorded(language, scene, random.Random(seed), split)
        for kind in KINDS:
            qa = asker.question(kind)
            truth = qa and _truth(language, scene, asker.form, asker.slots)
            if qa is not None and truth is not None:
                assert qa.answer == truth, (qa, scene.objects)
                checked[kind] += 1
    assert all(checked[kind] > 50 for kind in ("color", "count", "presence", "position")), checked


def test_yes_no_and_numbers_are_balanced(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(1)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes * 3:
        for kind in ("presence", "count"):
            qa = language.question(scene, rng, kind)
            answers[kind][qa.answer if qa else ""] += 1
    assert 0.42 < answers["presence"]["yes"] / answers["presence"].total() < 0.58
    assert {"0", "1", "2", "3", "4"} <= set(answers["count"])


def test_no_wording_betrays_yes_or_no(language: Language, scenes: list[Scene]) -> None:
    """Every wording of a form of yes-or-no question is met with both answers."""
    seen: dict[str, set[str]] = defaultdict(set)
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(6_000):
        asker = Recorded(language, scenes[seed % len(scenes)], random.Random(seed), "test")
        qa = asker.question(("presence", "position", "category", "color")[seed % 4])
        if qa is not None and qa.answer in ("yes", "no"):
            wording = qa.question.replace("grey", "gray")
            for slot in sorted(asker.slots.values(), key=len, reverse=True):
                wording = wording.replace(slot, "_") if slot else wording
            wording = re.sub("picture|image|photograph|photo|things|objects|items", "_", wording)
            seen[f"{asker.form}: {wording}"].add(qa.answer)
            forms[asker.form][qa.answer] += 1
    assert len(forms) == 7
    assert all(0.35 < answers["yes"] / answers.total() < 0.65 for answers in forms.values()), forms
    assert not [wording for wording, answers in seen.items() if len(answers) < 2]


def test_what_is_no_question_about_the_picture(language: Language, scenes: list[Scene]) -> None:
    answers = Counter(
        qa.answer
        for seed in range(200)
        if (qa := language.question(scenes[0], random.Random(seed), "nonsense"))
    )
    assert set(answers) == {*REPLIES.values(), CANNOT_TELL}


@pytest.fixture(scope="module")
def speaker() -> Language:
    rows = [
        ("dog", "animal"), ("wombat", "animal"), ("bear", "animal"), ("taxi", "vehicle"),
        ("harp", "musical instrument"), ("tomato", "vegetable"), ("chair", "household item"),
    ]  # fmt: skip
    nouns = {noun: Noun(noun, f"{noun}s", "a", category) for noun, category in rows}
    return Language(nouns, {}, {"dog": ("beagle", "poodle")})


def _asked(language: Language, photo: Photo, kind: str) -> dict[str, str]:
    drawn = (language.question(photo, random.Random(seed), kind, "test") for seed in range(300))
    return {qa.question: qa.answer for qa in drawn if qa is not None}


def test_photographs_are_asked_about_what_is_known(speaker: Language) -> None:
    beagle = Photo("dog", "beagle", "animal", "brown")
    assert set(_asked(speaker, beagle, "object").values()) == {"dog"}
    assert set(_asked(speaker, beagle, "description").values()) == {"a dog", "a brown dog"}
    breeds = _asked(speaker, beagle, "breed")
    assert {answer for question, answer in breeds.items() if "dog" in question} == {"beagle"}
    assert set(_asked(speaker, beagle, "count").values()) == {"0"}
    for question, answer in _asked(speaker, beagle, "presence").items():
        assert answer == ("yes" if re.search(r"dog|animal", question) else "no"), question
    for question, answer in _asked(speaker, beagle, "category").items():
        if re.search("would|believe|of a|can you say", question):
            fitting = re.search(r"\b(dog|animal|beagle)\b", question.removeprefix("what"))
            assert answer in (("yes", "dog") if fitting else ("no",)) or answer == "dog", question


def test_photographs_of_unknown_things(speaker: Language) -> None:
    animal = Photo(category="animal")
    assert set(_asked(speaker, animal, "object").values()) == {"an animal"}
    assert not _asked(speaker, animal, "color") or set(_asked(speaker, animal, "color").values()) <= {
        f"there is no {noun}" for noun in ("taxi", "harp", "tomato")
    }
    checks = _asked(speaker, animal, "category")
    assert {answer for question, answer in checks.items() if "dog" in question} == {CANNOT_TELL}
    assert not _asked(speaker, Photo(), "presence") and not _asked(speaker, Photo(), "count")
    assert set(_asked(speaker, Photo(colour="red"), "color").values()) == {"red"}


def test_questions_in_turn(composer: Composer) -> None:
    kinds = [qa.kind for _, qa in unseen_questions(composer, 10)]
    assert kinds == list(PLAIN_KINDS) * 2
