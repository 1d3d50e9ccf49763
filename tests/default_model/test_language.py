from __future__ import annotations

import random
import re
from itertools import islice, pairwise

import pytest

from default_model.captions import hedge
from default_model.corpus import imagined, imagined_photo
from default_model.evaluation import counts_right, named_objects, names_object
from default_model.facts import PHRASES
from default_model.language import Language, standard
from default_model.overlaps import same_thing
from default_model.photo import Photo
from default_model.qa import KINDS
from default_model.scenes import Composer, Placed, Scene, relation
from default_model.together import may_show


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


def test_grammar(language: Language) -> None:
    assert language.one("apple") == "an apple" and language.one("apple", "red") == "a red apple"
    assert language.one("bus", "orange") == "an orange bus"
    assert language.one("orange", "orange") == "an orange"
    assert language.one("scissors", "gray") == "a pair of gray scissors"
    assert language.many("scissors") == "pairs of scissors" and language.many("mouse") == "mice"
    assert language.the("scissors") == "the pair of scissors"
    assert (
        language.no("bear") == "there is no bear"
        and language.no("scissors") == "there is no pair of scissors"
    )


def test_names_that_may_both_be_true_and_categories(language: Language) -> None:
    assert language.related("bear", "teddy bear") and language.related("teddy bear", "bear")
    assert not language.related("apple", "orange") and not language.related("bus", "mouse")
    assert language.related("square", "rectangle")
    assert language.is_a("apple", "fruit") is True and language.is_a("bus", "fruit") is False
    assert language.is_a("apple", "vegetable") is None and language.is_a("teddy bear", "animal") is None


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
    scene = _scene(language, ("apple", 20), ("bear", 100))
    assert counts_right("a bear and an apple", scene, language.nouns)
    assert not counts_right("two bears and an apple", scene, language.nouns)


def _scene(language: Language, *things: tuple[str, int]) -> Scene:
    blank = imagined(language, random.Random(0))
    objects = tuple(Placed("", noun, None, (x - 15, 50, x + 15, 80), False) for noun, x in things)
    return Scene(0, "test", blank.image, objects, "", blank.patch_object)


def test_captions_by_hand(language: Language) -> None:
    two = _scene(language, ("apple", 20), ("bear", 100))
    assert language.canonical_caption(two) == "an apple to the left of a bear"
    assert language.canonical_caption(_scene(language, ("apple", 50), ("bear", 70))) == "an apple and a bear"
    three = _scene(language, ("apple", 20), ("bear", 60), ("apple", 100))
    assert language.canonical_caption(three) == "two apples and a bear"


def test_a_photograph_is_called_what_is_known(language: Language) -> None:
    rng = random.Random(0)
    assert {language.caption(Photo("bear", None, "animal", "brown"), rng) for _ in range(50)} == {
        "a bear",
        "a brown bear",
    }
    assert language.caption(Photo(None, None, "animal", "brown"), rng) == "an animal"
    assert hedge(Photo(category="food")) == "some food"
    assert hedge(Photo(colour="red")) == "something red"
    assert hedge(Photo()) == "something i do not know"
    with pytest.raises(ValueError, match="needs the noun"):
        Photo(breed="beagle")


def test_absent_things_fit_nothing_that_is_there() -> None:
    everything, rng = standard(), random.Random(0)
    assert len(everything.nouns) > 800
    for noun in everything.all:
        other = everything.absent([noun, "dog"], rng)
        assert not same_thing(noun, other) and not {*noun.split()} & {*other.split()}
        assert other not in ("dog", "hot dog", "wolf", "animal")
        assert not any(may_show(noun, other) for other in everything.not_shown(noun, None))
    unknown = everything.not_shown(None, "animal")
    assert "violin" in unknown and not {"ball", "grass", "dog", "wolf", "tree"} & {*unknown}
    assert everything.not_shown(None, None) == []


def test_turns_are_short_and_of_every_kind(language: Language, scenes: list[Scene]) -> None:
    rng = random.Random(0)
    pictures = [*scenes, *(imagined_photo(language, rng) for _ in range(200))]
    starts = set()
    for picture in pictures:
        turns = language.turns(picture, rng)
        assert 1 <= len(turns) <= 4
        assert all(answer and answer == answer.lower() and "." not in answer for _, answer in turns)
        starts |= {question.split()[0] for question, _ in turns if question}
    assert {"how", "How", "HOW", "what", "Where", "is", "Is"} <= starts
    assert language.turns(scenes[0], random.Random(1)) == language.turns(scenes[0], random.Random(1))


def test_later_turns_speak_of_what_an_earlier_one_named(language: Language) -> None:
    scene, seen = _scene(language, ("apple", 20), ("bear", 100)), set()
    for seed in range(400):
        turns = language.turns(scene, random.Random(seed), split="test")
        for (_, before), (question, answer) in pairwise(turns):
            if question in ("where can i see it?", "and where exactly is it?") and before in (
                "apple",
                "bear",
            ):
                assert answer == ("on the left" if before == "apple" else "on the right")
                seen.add("place")
            if question == "and what might the other one be?" and before in ("apple", "bear"):
                assert answer == ("bear" if before == "apple" else "apple")
                seen.add("other")
            if question == "where can i see it?" and before == "no":
                assert answer.startswith("there is no ")
                seen.add("absent")
    assert seen == {"place", "other", "absent"}


def test_text_ends_in_newlines(language: Language) -> None:
    lines = list(islice(language.text_corpus(random.Random(0)), 300))
    assert lines == list(islice(language.text_corpus(random.Random(0)), 300))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    starts = [line.partition(" ")[0] for line in lines]
    assert "Question:" in starts and any(line.startswith("a photo of ") for line in lines)


def test_a_kind_that_does_not_exist(language: Language, scenes: list[Scene]) -> None:
    with pytest.raises(ValueError, match=f"must be one of {', '.join(KINDS)}"):
        language.question(scenes[0], random.Random(0), "smell")
