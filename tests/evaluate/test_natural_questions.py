"""Questions in natural wordings: how they are judged, and what counts as a change with the letter case."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

import blip2
from blip2.evaluate.protocols import PROTOCOLS
from blip2.evaluate.run import EvalSettings, _natural_questions, scenes_report
from blip2.evaluate.scenes import Scenes, scene_item
from blip2.predict import Predictor

PICTURE = Image.new("RGB", (8, 8))
ROWS: list[dict[str, Any]] = [
    {"question": "WHAT IS THIS?", "answer": "cat", "kind": "object"},
    {"question": "Is There A Dog", "answer": "no", "kind": "presence"},
    {"question": "describe it.", "things": {"cat": 1, "dog": 1}, "kind": "description"},
    {"question": "Describe this.", "things": {"cat": 1, "dog": 1}, "kind": "description"},
]


class Answering:
    """A model that reads only capitals wrongly."""

    def encode(self, images: list[Image.Image], batch_size: int) -> list[Image.Image]:
        return images

    def ask(self, images: list[Image.Image], questions: list[str], **options: object) -> list[str]:
        return [self.answer(question) for question in questions]

    def answer(self, question: str) -> str:
        if question.isupper():
            return "a cat."
        return {"is there a dog": "no", "describe this.": "two cats"}.get(question.lower(), "a dog and a cat")


def _scenes() -> Scenes:
    natural = [scene_item(f"natural-{i}", PICTURE, row) for i, row in enumerate(ROWS)]
    one = [scene_item("singles-0", PICTURE, {"things": {"cat": 1}, "captions": ["a cat"]})]
    return Scenes({"cat": "cats", "dog": "dogs"}, one, one, [], natural, [])


def test_how_they_are_judged() -> None:
    model = cast(Predictor, Answering())
    metrics, outcomes = _natural_questions(
        model, _scenes(), PROTOCOLS["default"]["questions"], EvalSettings()
    )
    assert [outcome.quality for outcome in outcomes] == [1.0, 1.0, 1.0, 0.0]
    assert metrics == {
        "questions, natural wordings": 0.75,
        "  of which natural object": 1.0,
        "  of which natural presence": 1.0,
        "  of which natural description": 0.5,
        # every upper case differs from the lower one, no other does
        "answers that change with letter case": pytest.approx(1 / 3),
    }


def test_they_are_in_the_report(generator_folder: Path) -> None:
    model = blip2.load(generator_folder)
    report = scenes_report(model, _scenes(), EvalSettings(), model_name="small")
    assert report.metrics["questions, natural wordings"] is not None
    assert [o.item.id for o in report.outcomes][-4:] == [f"natural-{i}" for i in range(4)]
