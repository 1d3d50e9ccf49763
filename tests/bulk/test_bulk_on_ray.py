"""Bulk captioning on a Ray cluster of two CPUs: what comes out is what comes out without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2.bulk import BulkError, Inputs, RunSettings, caption_all
from blip2.bulk.database import Row
from blip2.bulk.run import Describe, Progress
from blip2.cli import main

ray = pytest.importorskip("ray", reason="captioning on a cluster is the extra blip2[ray]")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def say() -> Describe:
    """A caption that depends on the image. A function within one travels to Ray's processes as it is."""

    def say(images: Sequence[Image.Image]) -> list[list[Row]]:
        return [[{"caption": hashlib.sha256(image.tobytes()).hexdigest()[:8]}] for image in images]

    return say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """22 images: every tenth is damaged, every seventh the first one again."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(22):
        path = folder / f"{i:05}.png"
        Image.new("RGB", (4, 4), (0, 0, 0 if i % 7 == 6 else i)).save(path)
        if i % 10 == 9:
            path.write_bytes(b"\x89PNG damaged")
    return folder


def stop_after(batches: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.done >= 4 * batches:
            raise KeyboardInterrupt

    return stop


def settings(out: Path, kind: str = "jsonl") -> RunSettings:
    return RunSettings(out=out, kind=kind, run_config={"model": "m"}, batch_size=4, existing="append")


def test_the_output_is_that_of_one_machine(
    folder: Path, say: Describe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip2.bulk.on_ray import on_ray

    monkeypatch.chdir(tmp_path)
    inputs, out, straight = Inputs(sources=["in"]), tmp_path / "o.jsonl", tmp_path / "s.jsonl"
    caption_all(inputs, settings(straight), say)
    with pytest.raises(KeyboardInterrupt):
        caption_all(inputs, settings(out), say, progress=stop_after(2), engine=on_ray)
    assert not out.exists()
    done = caption_all(inputs, settings(out), say, engine=on_ray)
    assert (done.done, done.before, done.failed) == (14, 8, 2)
    assert out.read_bytes() == straight.read_bytes()


def test_text_files_too(folder: Path, say: Describe, tmp_path: Path) -> None:
    from blip2.bulk.on_ray import on_ray

    (folder / "00003.txt").write_text("old\n")
    (folder / "00003.jpg").write_bytes((folder / "00004.png").read_bytes())
    texts = []
    for name, engine in (("here", None), ("ray", on_ray)):
        out = tmp_path / name
        done = caption_all(Inputs(sources=[str(folder)]), settings(out, "txt"), say, engine=engine)
        texts.append({path.name: path.read_text() for path in out.glob("*.txt")})
        assert (done.done, done.failed) == (23, 3)
        (out / "00004.txt").unlink()
        (out / "00005.txt").write_text("mine")
        (folder / "00009.png").write_bytes((folder / "00008.png").read_bytes())
        changed = replace(settings(out, "txt"), prefix="a ")
        done = caption_all(Inputs(sources=[str(folder)]), changed, say, engine=engine)
        assert (done.captioned, done.failed, done.edited, done.again) == (1, 2, 1, 19)
        assert (out / "00004.txt").read_text() == "a " + texts[-1]["00004.txt"]
        assert (out / "00005.txt").read_text() == "mine"
        (folder / "00009.png").write_bytes(b"\x89PNG damaged")
    assert texts[0] == texts[1] and len(texts[0]) == 20


def test_what_fails_on_a_machine_is_reported(folder: Path, tmp_path: Path) -> None:
    from blip2.bulk.on_ray import on_ray

    def fail(images: Sequence[Image.Image]) -> list[list[Row]]:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match=r"^no such model$"):
        caption_all(Inputs(sources=[str(folder)]), settings(tmp_path / "o.jsonl"), fail, engine=on_ray)
    with pytest.raises(BulkError, match="no-such-list"):
        caption_all(Inputs(sources=["no-such-list.txt"]), settings(tmp_path / "p.jsonl"), fail, engine=on_ray)


def test_the_command(generator_folder: Path, pictures: list[Path], tmp_path: Path, capsys: Any) -> None:
    rows = []
    for engine in ("local", "ray"):
        out = tmp_path / f"{engine}.jsonl"
        command = ["caption", str(pictures[0].parent), "--out", str(out), "--model", str(generator_folder)]
        assert main([*command, "--max-new-tokens", "6", "--quiet", "--engine", engine]) == 0
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
    assert len(rows[0]) == len(pictures)
    for here, there in zip(*rows, strict=True):
        assert there == here | {"score": pytest.approx(here["score"], rel=1e-4)}
