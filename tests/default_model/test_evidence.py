"""Imagined probabilities of names, and what is said of a photograph that has some."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from default_model.evidence import DRAWN, SHOWN, UNSURE, WRONG, Evidence, sums
from default_model.namer import Names

CATEGORIES = {
    "bear": "animal", "bus": "vehicle", "apple": "fruit", "mouse": "animal", "orange": "fruit", "scissors": "tool",
    "teddy bear": "toy",
}  # fmt: skip
SHARP, SOFT = [0.5, 0.2, 0.1], [0.1, 0.05]


@pytest.fixture
def evidence(names: Names) -> Evidence:
    count = len(names.nouns)
    alike = [[other for other in range(count) if other != name] for name in range(count)]
    return Evidence(names, CATEGORIES, alike, [(SHARP, SOFT)])


def test_imagined_probabilities_are_those_of_a_photograph(evidence: Evidence) -> None:
    for seed in range(50):
        found = evidence.imagine(random.Random(seed))
        first = evidence.names.classes
        classes = sorted((p for name, p in found.items() if name < first), reverse=True)
        learned = sorted((p for name, p in found.items() if name >= first), reverse=True)
        assert classes == SHARP[: len(classes)] and len(classes) >= 2
        assert learned == SOFT
        assert sum(found.values()) <= 1
        vector = evidence.vector(found)
        assert vector.shape == (len(evidence.names.nouns),)
        torch.testing.assert_close(vector.sum(), torch.tensor(sum(found.values())))


def test_the_noun_itself_comes_first_but_for_mistakes(evidence: Evidence) -> None:
    right = shown = 0
    for seed in range(3000):
        found = evidence.imagine(random.Random(seed))
        noun = random.Random(seed).choice(evidence.nouns)  # what it draws first
        own = [name for name in evidence.by_noun[noun] if name < evidence.names.classes]
        if own:
            shown += 1
            right += max(found, key=found.__getitem__) in own
    # Both classes of a bear are a bear, so that some mistakes among classes are none.
    assert shown > 600 and 1 - WRONG - 0.03 < right / shown < 1 - WRONG / 4


def test_names_of_one_noun_are_one(evidence: Evidence) -> None:
    sight = evidence.sight({0: 0.4, 1: 0.2, 2: 0.1, 4: 0.1}, random.Random(0))
    assert sight.nouns == pytest.approx({"bear": 0.7, "bus": 0.1})
    assert sight.breeds == {"polar bear": 0.4}
    assert evidence.sight({0: 0.2, 1: 0.4}, random.Random(0)).breeds == {}  # more likely another bear


def test_a_slot_holds_a_few_nouns(evidence: Evidence) -> None:
    every = {name: 0.1 - name / 1000 for name in range(len(evidence.names.nouns))}
    assert len(evidence.sight(every, random.Random(0)).nouns) == SHOWN


@pytest.mark.parametrize(
    ("probabilities", "category"),
    [
        ({2: 0.04}, "vehicle"),
        ({6: 0.05, 2: 0.01}, "animal"),  # a mouse
        ({6: 0.04, 2: 0.04}, None),
    ],
)
def test_unsure_the_caption_names_a_category_or_nothing(
    evidence: Evidence, probabilities: dict[int, float], category: str | None
) -> None:
    assert max(probabilities.values()) < UNSURE
    for seed in range(10):
        photo = evidence.sight(probabilities, random.Random(seed), "red").photo
        assert (photo.noun, photo.breed, photo.category, photo.colour) == (None, None, category, "red")


def test_what_is_said_is_drawn_from_the_probabilities(evidence: Evidence) -> None:
    rng, draws = random.Random(0), 6000
    said = Counter(evidence.sight({2: 0.5, 3: 0.3}, rng).photo.noun for _ in range(draws))
    rest = 0.2 / len(evidence.nouns)
    assert said["bus"] / draws == pytest.approx(1 - DRAWN + DRAWN * (0.5 + rest), abs=0.02)
    assert said["apple"] / draws == pytest.approx(DRAWN * (0.3 + rest), abs=0.02)
    others = {noun for noun in said if noun not in ("bus", "apple")}
    assert others == set(evidence.nouns) - {"bus", "apple"}


def test_a_breed_is_named_with_its_noun_alone(evidence: Evidence) -> None:
    for seed in range(100):
        photo = evidence.sight({0: 0.5, 2: 0.4}, random.Random(seed)).photo
        assert (photo.breed == "polar bear") == (photo.noun == "bear")
        assert photo.noun is not None and photo.category == CATEGORIES[photo.noun]


def test_sums() -> None:
    assert sums([("a", 0.5), ("b", 1.0), ("a", 0.25)]) == {"a": 0.75, "b": 1.0}
