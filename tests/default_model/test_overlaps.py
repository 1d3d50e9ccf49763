from __future__ import annotations

import csv

import pytest

from default_model.materials import TABLE, read_table
from default_model.overlaps import GENERAL, OVERLAPS, same_thing
from default_model.scenes import SHAPES
from default_model.together import ANYWHERE, COMPANIONS, TOGETHER, may_show


@pytest.fixture(scope="module")
def nouns() -> set[str]:
    with TABLE.with_name("imagenet.csv").open(encoding="utf-8", newline="") as file:
        named = {row["noun"] for row in csv.DictReader(file)}
    return named | {row.noun for row in read_table()} | set(SHAPES)


def test_only_nouns_of_the_tables_are_listed(nouns: set[str]) -> None:
    stars = [{noun, *others} for table in (GENERAL, COMPANIONS) for noun, others in table.items()]
    listed = set().union(*OVERLAPS, *TOGETHER, *stars, ANYWHERE)
    assert listed - nouns == set()
    assert all(len(group) > 1 for group in (*OVERLAPS, *TOGETHER))
    assert all(noun not in others for noun, others in GENERAL.items())


@pytest.mark.parametrize(
    ("noun", "other"),
    [
        ("coffee", "cup"), ("shirt", "t-shirt"), ("shirt", "sweatshirt"), ("hat", "cowboy hat"), ("bird", "duck"),
        ("sheep", "lamb"), ("hawk", "kite"), ("laptop", "computer"), ("jacket", "coat"), ("wine", "bottle"),
        ("alligator", "crocodile"), ("shoe", "sneaker"), ("monitor", "television"), ("leopard", "cheetah"),
        ("zucchini", "cucumber"), ("flower", "daisy"), ("airplane", "airplane wing"), ("castle", "palace"),
    ],
)  # fmt: skip
def test_one_thing_with_two_names(noun: str, other: str) -> None:
    assert same_thing(noun, other) and same_thing(other, noun) and may_show(noun, other)


@pytest.mark.parametrize(
    ("noun", "other"),
    [
        ("pizza", "plate"), ("desk", "keyboard"), ("groom", "dress"), ("skis", "mountain"), ("bathtub", "toilet"),
        ("baseball player", "baseball"), ("dog", "tennis ball"), ("spider web", "spider"), ("stage", "guitar"),
        ("gun", "uniform"), ("apple", "orange"), ("beach", "umbrella"), ("coral reef", "scuba diver"), ("car", "wheel"),
    ],
)  # fmt: skip
def test_two_things_of_one_photograph(noun: str, other: str) -> None:
    assert may_show(noun, other) and may_show(other, noun) and not same_thing(noun, other)


def test_most_things_may_be_asked_about_as_absent(nouns: set[str]) -> None:
    for noun in nouns:
        assert sum(same_thing(noun, other) for other in nouns) < 60, noun
        assert sum(not may_show(noun, other) for other in nouns) > 400, noun
    for noun, other in (
        ("dog", "elephant"),
        ("pizza", "horse"),
        ("car", "banana"),
        ("knight helmet", "cowboy hat"),
    ):
        assert not may_show(noun, other) and not same_thing(noun, other)
