"""imagenet.csv: the 1,000 classes in their order, one grammar for each noun, and the words that people use."""

from __future__ import annotations

import csv
import re

import pytest

from default_model.materials import TABLE, read_table

COLUMNS = ["index", "wnid", "name", "noun", "plural", "article", "category", "breed"]
ADDED_CATEGORIES = {"document", "drink", "place", "shape"}  # the others are those of objects.csv

# Words with several meanings, the few with an unexpected class beside them, and words nobody uses.
NOUNS = {
    0: "fish", 5: "stingray", 7: "rooster", 8: "chicken", 17: "bird", 21: "hawk", 97: "duck", 117: "shell",
    134: "crane", 145: "penguin", 207: "dog", 264: "dog", 286: "cougar", 339: "horse", 345: "cow",
    348: "sheep", 387: "red panda", 388: "panda", 403: "ship", 416: "gymnast", 417: "hot air balloon",
    437: "lighthouse", 439: "hat", 452: "hat", 456: "bow and arrow", 457: "bow tie", 463: "bucket",
    468: "taxi", 474: "sweater", 480: "atm", 497: "church", 504: "cup", 506: "spiral",
    517: "construction crane", 528: "telephone", 553: "cabinet", 581: "car", 593: "harmonica", 594: "harp",
    608: "jeans", 610: "t-shirt", 638: "swimsuit", 639: "swimsuit", 657: "missile", 664: "monitor",
    673: "computer mouse", 677: "nail", 681: "laptop", 701: "parachute", 714: "guitar pick",
    726: "hand plane", 744: "missile", 747: "punching bag", 761: "remote control", 770: "sneaker",
    776: "saxophone", 782: "monitor", 783: "screw", 800: "slot machine", 824: "scarf", 836: "sunglasses",
    837: "sunglasses", 876: "bathtub", 884: "ceiling", 897: "washing machine", 899: "jug",
    908: "airplane wing", 916: "website", 924: "guacamole", 933: "hamburger", 936: "cabbage",
    937: "broccoli", 945: "pepper", 948: "apple", 956: "custard apple", 966: "wine", 968: "cup",
    971: "bubble", 981: "baseball player", 982: "groom", 983: "scuba diver", 989: "berry", 998: "corn",
    999: "toilet paper",
}  # fmt: skip


@pytest.fixture(scope="module")
def classes() -> list[dict[str, str]]:
    with TABLE.with_name("imagenet.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_classes_are_in_the_order_of_pretrained_classifiers(classes: list[dict[str, str]]) -> None:
    assert [row["index"] for row in classes] == [str(i) for i in range(1000)]
    wnids = [row["wnid"] for row in classes]
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    assert wnids == sorted(set(wnids))  # the usual order sorts by WordNet's number
    ends = {0: ("n01440764", "tench"), 1: ("n01443537", "goldfish"), 999: ("n15075141", "toilet tissue")}
    for index, (wnid, name) in ends.items():
        assert classes[index]["wnid"] == wnid and classes[index]["name"].split(",")[0] == name


def test_a_noun_has_one_grammar_over_both_tables(classes: list[dict[str, str]]) -> None:
    grammar = {(row.noun, row.plural, row.article, row.category) for row in read_table()}
    grammar |= {(row["noun"], row["plural"], row["article"], row["category"]) for row in classes}
    assert len(grammar) == len({noun for noun, *_ in grammar}) > 800
    forms: dict[str, str] = {}
    for noun, plural, article, _category in grammar:
        assert re.fullmatch(r"[a-z]+([ -][a-z]+)*", noun) and re.fullmatch(r"[a-z]+([ -][a-z]+)*", plural)
        for form in {noun, plural}:
            assert forms.setdefault(form, noun) == noun, form  # no word means two things
        if article in ("a", "an"):
            vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "u-"))
            assert article == ("an" if vowel else "a"), noun
        else:
            assert re.fullmatch(r"an? [a-z]+ of", article), noun


def test_categories_are_few(classes: list[dict[str, str]]) -> None:
    known = {row.category for row in read_table()}
    assert {row["category"] for row in classes} - known == ADDED_CATEGORIES


def test_words_are_those_that_people_use(classes: list[dict[str, str]]) -> None:
    assert {i: classes[i]["noun"] for i in NOUNS} == NOUNS
    assert {row["noun"] for row in classes[151:269]} == {"dog"}
    assert {row["noun"] for row in classes[281:286]} == {"cat"}
    british = {"colour", "grey", "aeroplane", "tyre", "pyjamas", "sulphur", "theatre", "trousers", "jumper"}
    for row in classes:
        assert not british & set(f"{row['noun']} {row['breed']}".split()), row


def test_a_breed_says_more_than_its_noun(classes: list[dict[str, str]]) -> None:
    breeds = [row["breed"] for row in classes if row["breed"]]
    assert len(breeds) == len(set(breeds)) > 500
    for row in classes:
        assert row["breed"] not in (row["noun"], row["plural"])
        assert re.fullmatch(r"([a-z]+([ -][a-z]+)*)?", row["breed"])
    assert all(row["breed"] for row in classes[151:269])
    nouns = {row["noun"] for row in classes} | {row.noun for row in read_table()}
    assert nouns & set(breeds) == {"kite"}  # the bird of prey has the toy's name
    named = {
        "beagle": 162,
        "siamese cat": 284,
        "bald eagle": 22,
        "granny smith apple": 948,
        "sports car": 817,
    }
    assert {breed: classes[i]["breed"] for breed, i in named.items()} == {breed: breed for breed in named}
