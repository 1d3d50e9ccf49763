from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from blip2.evaluate.scenes import LETTER_CASES, in_case
from default_model import wordings as module
from default_model.qa import KINDS
from default_model.wordings import ask, typed, wordings


def test_every_kind_has_forty_wordings_and_a_tenth_are_held_out() -> None:
    lines: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for (form, split), found in wordings().items():
        lines[form.split(".")[0]] += len(found)
        held[form.split(".")[0]] += len(found) if split == "test" else 0
    assert set(lines) == set(KINDS)
    for kind in KINDS:
        assert lines[kind] >= 40, (kind, lines[kind])
        assert held[kind] >= max(4, lines[kind] // 10), (kind, held[kind], lines[kind])


def _plain(text: str) -> str:
    return re.sub(r"[?.!]|colour", lambda m: "color" if m[0] == "colour" else "", text).strip()


def test_wordings_of_the_test_are_never_drawn_in_training() -> None:
    every = {split: set() for split in ("train", "test")}
    for (_, split), found in wordings().items():
        every[split] |= {_plain(text) for line in found for text in line}
    assert not every["train"] & every["test"]
    assert all(text == text.lower() for text in every["train"] | every["test"])


def test_wordings_are_drawn_from_their_split() -> None:
    rng = random.Random(0)
    held = {text.format(the="the dog") for line in wordings()["color.one", "test"] for text in line}
    drawn = {ask("color.one", rng, "test", the="the dog") for _ in range(500)}
    assert drawn == held
    assert not held & {ask("color.one", rng, the="the dog") for _ in range(2_000)}


def test_mistakes_spare_the_slots() -> None:
    rng = random.Random(0)
    questions = [ask("count.some", rng, many="teddy bears") for _ in range(3_000)]
    known = {text.format(many="teddy bears") for line in wordings()["count.some", "train"] for text in line}
    wrong = [question for question in questions if question not in known]
    assert 30 < len(wrong) < 300
    assert all("teddy bears" in question for question in questions)


def test_people_type_in_every_way() -> None:
    rng = random.Random(0)
    drawn = {typed("where is the dog?", rng) for _ in range(2_000)}
    assert {
        "where is the dog?", "where is the dog", "Where is the dog?", "WHERE IS THE DOG?", "Where Is The Dog",
        "Please, where is the dog?", "where is the dog ?",
    } <= drawn  # fmt: skip
    assert all("where is the dog" in text.lower() for text in drawn)
    assert typed("", rng) == ""


def test_letter_cases() -> None:
    question = "hi. what's this? i see a t-shirt"
    assert [in_case(question, case) for case in LETTER_CASES] == [
        "hi. what's this? i see a t-shirt",
        "Hi. What's this? I see a t-shirt",
        "Hi. What's This? I See A T-shirt",
        "HI. WHAT'S THIS? I SEE A T-SHIRT",
    ]


def test_files_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "color.txt").write_text("what color is it?\n")
    with pytest.raises(ValueError, match="is in no section"):
        wordings.__wrapped__()
    (tmp_path / "color.txt").write_text("[one]\nwhat (color|(hue|shade)) is it?\n")
    with pytest.raises(ValueError, match=r"color\.one has no wording for the test split"):
        wordings.__wrapped__()
    (tmp_path / "color.txt").write_text("[one]\nwhat (color|(hue|shade)) is it?\n* <color>?\n")
    assert wordings.__wrapped__() == {
        ("color.one", "train"): (("what color is it?", "what hue is it?", "what shade is it?"),),
        ("color.one", "test"): (("color?", "colour?"),),
    }
