"""How long a run would take: by the pace of the real engine, over what is still to be done, without a trace."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from small_runs import png, run, say, settings

from blip2.bulk import BulkError, Estimate, Inputs, caption_all, estimate
from blip2.bulk.database import Row
from blip2.images import load_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 images, all different."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.png").write_bytes(png(i))
    return folder


class Clock:
    """Time that passes only while images are described: ten seconds the first time, then a second an image."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.described = 0.0, 0
        monkeypatch.setattr(
            sys.modules["blip2.bulk.estimate"], "time", SimpleNamespace(perf_counter=lambda: self.seconds)
        )

    def describe(self, images: Sequence[Image.Image]) -> list[list[Row]]:
        self.seconds += len(images) if self.described else 10
        self.described += len(images)
        return say(images)


def test_the_first_batch_is_no_measure_of_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    work = estimate(
        Inputs(sources=[str(folder)]),
        settings(tmp_path / "o.jsonl", parallel_batches=1),
        clock.describe,
        decode_image=load_image,
    )
    assert work == Estimate(inputs=100, done=0, seconds=10 + 96)
    assert clock.described == 12  # until there were five seconds of the usual pace
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    few = Inputs(sources=[str(folder)], limit=3)
    short = estimate(
        few, settings(tmp_path / "o.jsonl"), Clock(monkeypatch).describe, decode_image=load_image
    )
    assert short == Estimate(inputs=3, done=0, seconds=10)


def test_batches_are_computed_in_parallel_as_in_the_run(folder: Path, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20)

    def describe(images: Sequence[Image.Image]) -> list[list[Row]]:
        both.wait()  # never alone
        return say(images)

    work = estimate(
        Inputs(sources=[str(folder)], limit=32),
        settings(tmp_path / "o.jsonl"),
        describe,
        decode_image=load_image,
    )
    assert (work.inputs, work.done) == (32, 0)


def test_what_is_done_is_not_counted_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, inputs = tmp_path / "o.jsonl", Inputs(sources=[str(folder)])
    caption_all(Inputs(sources=[str(folder)], limit=40), settings(out), say)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def estimated(**changes: object) -> Estimate:
        return estimate(
            inputs, settings(out, **changes), Clock(monkeypatch).describe, decode_image=load_image
        )

    assert estimated(parallel_batches=1) == Estimate(inputs=100, done=40, seconds=10 + 56)
    assert estimated(parallel_batches=1, existing="overwrite").done == 0
    with pytest.raises(BulkError, match="model was 'm', now 'n'"):
        estimated(run_config={"model": "n"})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (folder / "000.txt").write_text("mine")
    assert estimate(inputs, settings(folder, kind="txt"), say, decode_image=load_image).done == 1
    assert len(run(folder, out)) == 100
