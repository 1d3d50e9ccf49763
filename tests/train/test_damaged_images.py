"""Images that cannot be read: passed over the same way every time, counted, and reported."""

from __future__ import annotations

import csv
import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from blip2.data.loader import ExampleBatches
from blip2.data.sources import DataError, read_samples
from blip2.images import ImageProcessor
from blip2.train import FitOptions, FitResult, Task, fit, plots

PICTURES, STEPS = 40, 12


class Pixels:
    """The pixels of examples alone, flat."""

    def __init__(self, examples: ExampleBatches) -> None:
        self.examples = examples

    def __getitem__(self, position: int) -> dict[str, Any]:
        batch = self.examples[position]
        return batch.with_damaged({"pixels": batch.pixels.flatten(1)})


class Mean(Task):
    """Learns to tell the mean of an image; ends the run after some steps where it is told to."""

    def __init__(self, stop_after: int = 0) -> None:
        torch.manual_seed(0)
        self.module, self.stop_after = nn.Linear(3 * 8 * 8, 1), stop_after

    def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.keys() == {"pixels"}
        self.stop_after -= 1
        if self.stop_after == 0:
            signal.raise_signal(signal.SIGTERM)
        x = batch["pixels"]
        return {"loss": (self.module(x) - x.mean(1, keepdim=True)).pow(2).mean()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plots, "draw", lambda *_: None)
    noise = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a rose")
    return tmp_path


def batches(folder: Path) -> Pixels:
    return Pixels(ExampleBatches(read_samples(folder), ImageProcessor(size=8), batch_size=5, seed=3))


def train(folder: Path, run: str, stop_after: int = 0, workers: int = 0) -> tuple[FitResult, list[Tensor]]:
    task = Mean(stop_after)
    options = FitOptions(steps=STEPS, lr=0.01, log_every=2, workers=workers)
    result = fit(task, batches(folder), options, folder / ".runs" / run)
    return result, [parameter.detach() for parameter in task.module.parameters()]


def log_rows(folder: Path, run: str) -> list[dict[str, str]]:
    with open(folder / ".runs" / run / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


def damage(folder: Path, numbers: range) -> list[str]:
    for i in numbers:
        path = folder / f"{i:02d}.png"
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:50])
        elif i % 3 == 1:
            path.write_text("no image")
        else:
            path.unlink()
            path.symlink_to("nowhere.png")
    return [str(folder / f"{i:02d}.png") for i in numbers]


def test_sound_images_are_reported_as_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result, _ = train(folder, "a")
    assert result.damaged == () and {row["damaged"] for row in log_rows(folder, "a")} == {"0"}
    assert "passed over" not in caplog.text


@pytest.mark.parametrize("damaged", [range(1, 4), range(5, 39)])  # 34 of 40: more than any number in a row
def test_damaged_images_are_passed_over_and_a_resumed_run_is_the_same(
    folder: Path, damaged: range, caplog: pytest.LogCaptureFixture
) -> None:
    names = damage(folder, damaged)
    with caplog.at_level(logging.WARNING):
        whole, weights = train(folder, "whole")
    assert whole.finished and set(whole.damaged) == set(names)
    assert f"{len(names)} images cannot be read and were passed over: {names[0]}" in caplog.text
    counts = [int(row["damaged"]) for row in log_rows(folder, "whole")]
    assert counts == sorted(counts) and counts[-1] == len(names)

    assert not train(folder, "parts", stop_after=5)[0].finished
    assert not train(folder, "parts", stop_after=2, workers=2)[0].finished
    resumed, again = train(folder, "parts")
    assert resumed == whole and all(torch.equal(one, two) for one, two in zip(weights, again))
    assert log_rows(folder, "parts") == log_rows(folder, "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_all_damaged_is_an_error(folder: Path, workers: int) -> None:
    damage(folder, range(PICTURES))
    with pytest.raises(
        DataError, match=rf"{PICTURES} images in a row cannot be read, which are all; the last: .*png"
    ):
        train(folder, "none", workers=workers)
