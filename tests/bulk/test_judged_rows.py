"""Rows of captions that a model judges: what they hold, which are left out, and which inputs count as flagged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from small_runs import make_folder, settings

from blip2.bulk import Inputs, caption_all
from blip2.bulk.database import Row
from blip2.bulk.describe import make_captioner
from blip2.bulk.outputs import is_flagged
from blip2.images import ImageProcessor
from blip2.results import Caption


def judged(text: str, probability: float | None) -> Caption:
    caption = Caption(text, score=-1.0, token_logprobs=[-0.5, -0.5])
    caption.probability_right = probability
    return caption


class Model:
    """A stand-in for a predictor that writes the same captions of every image."""

    def __init__(self, captions: dict[str, float | None], fits: Sequence[float] = ()) -> None:
        self._captions = captions
        match = [[SimpleNamespace(probability=fit) for fit in fits]]
        self.matcher = SimpleNamespace(match=lambda images, texts: match)
        self.generator = SimpleNamespace(image_processor=ImageProcessor())

    def caption(self, images: list[Image.Image], **_: Any) -> list[list[Caption]]:
        return [[judged(*item) for item in self._captions.items()] for _ in images]


def rows_of(model: Model, **options: Any) -> list[Row]:
    describe = make_captioner(lambda: model, {}, **options)  # type: ignore[arg-type, return-value]
    return describe([Image.new("RGB", (4, 4))])[0]


def test_rows_hold_the_probability_of_calibrated_models_alone() -> None:
    assert rows_of(Model({"a cat": 0.25})) == [{"caption": "a cat", "score": -1.0, "probability_right": 0.25}]
    assert rows_of(Model({"a cat": None})) == [{"caption": "a cat", "score": -1.0}]


def test_a_caption_at_the_bound_stays() -> None:
    rows = rows_of(Model({"a cat": 0.5, "a dog": 0.4999}), abstain=0.5, score=True)
    assert rows == [
        {"caption": "a cat", "score": -1.0, "logprob": -1.0, "probability_right": 0.5},
        {"score": -1.0, "logprob": -1.0, "probability_right": 0.4999, "abstained": True},
    ]


def test_the_caption_that_fits_best_is_chosen_before_it_is_left_out() -> None:
    model = Model({"a cat": 0.9, "a dog": 0.1}, fits=[0.2, 0.8])
    assert rows_of(model, keep_best=True)[0]["caption"] == "a dog"
    (row,) = rows_of(model, keep_best=True, abstain=0.5)
    assert row == {"score": -1.0, "match": 0.8, "probability_right": 0.1, "abstained": True}


@pytest.mark.parametrize(
    ("probabilities", "flagged"), [([0.1], True), ([0.5], False), ([0.1, 0.6], False), ([0.1, 0.2], True)]
)
def test_an_input_is_flagged_where_all_of_its_captions_are(probabilities: list[float], flagged: bool) -> None:
    row = {"image": "a.png", "texts": [{"caption": "a", "probability_right": p} for p in probabilities]}
    assert is_flagged(row, 0.5) is flagged
    assert not is_flagged(row, None)
    assert not is_flagged({"image": "a.png", "texts": [{"caption": "a"}]}, 0.5)
    assert not is_flagged({"image": "a.png", "error": "no image"}, 0.5)


def test_a_run_counts_what_is_new(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", 20)  # of which two are damaged
    describe = make_captioner(lambda: Model({"a cat": 0.25}), {}, abstain=0.5)  # type: ignore[arg-type, return-value]

    def run(**changes: Any) -> tuple[int, int, int, int]:
        made = settings(tmp_path / "x.jsonl", threshold=0.3, **changes)
        done = caption_all(Inputs(sources=[str(folder)]), made, describe)
        return done.captioned, done.flagged, done.abstained, done.failed

    assert run() == (18, 18, 18, 2)
    assert run() == (0, 0, 0, 2)
    assert run(prefix="it is ") == (0, 0, 0, 2)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert sum("abstained" in row for row in rows) == 18 and not any("caption" in row for row in rows)
