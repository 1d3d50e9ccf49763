"""Bulk captioning: sources, outputs, and that no kill, full disk or second run changes the result."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_runs import make_folder, png, run, say, settings

import blip2
from blip2.bulk import BulkError, ImageItem, Inputs, caption_all
from blip2.bulk.database import Database, Row
from blip2.bulk.describe import decoding, make_captioner, parallel_batches
from blip2.bulk.progress import progress_bar
from blip2.bulk.run import Progress
from blip2.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")


# --- survival ---


@pytest.mark.parametrize("kills", [20, pytest.param(500, marks=pytest.mark.full)])
def test_kills_change_nothing(kills: int, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    folder = make_folder(tmp_path / "in", 120)
    begin = time.perf_counter()
    rows = run(folder, straight)
    seconds = time.perf_counter() - begin
    assert [row["image"] for row in rows] == sorted(map(str, folder.iterdir()))
    rng = random.Random(kills)
    landed = finished = 0
    while landed < kills:
        child = os.fork()
        if child == 0:
            caption_all(Inputs(sources=[str(folder)]), settings(out), say)
            os._exit(0)
        time.sleep(rng.random() * seconds * 0.6)  # in recovery too: it comes first
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        landed += killed
        assert not out.exists() or out.read_bytes() == straight.read_bytes()  # never half of it
        if out.exists():  # begin anew, until enough kills have landed
            finished += 1
            run(folder, out)
            out.unlink()
            (tmp_path / ".out.jsonl.blip2" / "state.sqlite").unlink()
    run(folder, out)
    assert out.read_bytes() == straight.read_bytes()


def test_full_disk(tmp_path: Path) -> None:
    """Of a disk that takes no file above a size, from one that takes nothing to one that takes all."""
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    folder = make_folder(tmp_path / "in", 40)
    run(folder, straight)
    stopped, limit, status = 0, 0, 1
    while status != 0:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                caption_all(Inputs(sources=[str(folder)]), settings(out), say)
            except BulkError as error:
                os._exit(1 if "disk is full" in str(error) and "same command" in str(error) else 3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0 or (status == 1 and not out.exists())
        stopped, limit = stopped + status, limit + 3000
    assert stopped > 10 and out.read_bytes() == straight.read_bytes()


def test_a_second_run_and_other_settings_are_refused(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 5), tmp_path / "out.jsonl"
    run(folder, out)
    database = Database(tmp_path / ".out.jsonl.blip2", {"model": "m"})
    with pytest.raises(BulkError, match="another run"):
        run(folder, out)
    database.close()
    with pytest.raises(BulkError, match="model was 'm', now 'n'"):
        run(folder, out, run_config={"model": "n"})
    run(folder, out, run_config={"model": "m"})


def test_a_run_without_a_result_binds_no_other(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 5), tmp_path / "out.jsonl"

    def fail(images: Sequence[Image.Image]) -> list[list[Row]]:
        raise ValueError("lower max_new_tokens")

    with pytest.raises(ValueError, match="lower"):
        caption_all(Inputs(sources=[str(folder)]), settings(out, run_config={"tokens": 9999}), fail)
    run(folder, out, run_config={"tokens": 9})
    with pytest.raises(BulkError, match="tokens was 9, now 8"):
        run(folder, out, run_config={"tokens": 8})


def test_new_images_are_added_and_equal_ones_described_once(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 15), tmp_path / "out.jsonl"
    seen: list[bytes] = []

    def count(images: Sequence[Image.Image]) -> list[list[Row]]:
        seen.extend(image.tobytes() for image in images)
        return say(images)

    for beside in (2, 1):
        caption_all(Inputs(sources=[str(folder)]), settings(out, parallel_batches=beside), count)
    assert len(seen) == len(set(seen)) == 12  # of 15 one is damaged and two are the first again
    (folder / "00002b.png").write_bytes(png(0))
    (folder / "new.png").write_bytes(png(99))
    done = caption_all(Inputs(sources=[str(folder), str(folder / "new.png")]), settings(out), count)
    assert (done.done, done.before, len(seen)) == (3, 15, 13)  # one fails again
    names = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert len(names) == len(set(names)) == 17


def test_memory_does_not_grow(tmp_path: Path) -> None:
    content, alive = png(1), []

    def many() -> Iterator[ImageItem]:
        for i in range(3000):
            alive.append(i)
            # a PNG with something behind its end
            yield ImageItem(f"{i}", "", content=content + str(i).encode())

    def check(images: Sequence[Image.Image]) -> list[list[Row]]:
        described.extend(images)
        ahead.append(len(alive) - len(described))
        return [[{"caption": "x", "score": 0.0}]] * len(images)

    described: list[Any] = []
    ahead: list[int] = []
    caption_all(many(), settings(tmp_path / "out.jsonl", batch_size=50), check)
    assert len(described) == 3000 and max(ahead) < 256 + 4 * 50


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
def test_memory_is_flat_over_5000_images(generator_folder: Path, tmp_path: Path) -> None:
    """With a model; one image kept of each would be 700 MiB, one at the model's size 15."""
    file = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(file, "JPEG")
    items = (ImageItem(str(i), "", content=file.getvalue() + str(i).encode()) for i in range(5000))
    model = blip2.load(generator_folder)
    describe = make_captioner(lambda: model, {"max_new_tokens": 4, "num_beams": 2})
    resident: list[float] = []

    def measure(progress: Progress) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize() / 2**20)

    with decoding(model.generator.image_processor, workers=2) as decode_image:
        caption_all(
            items,
            settings(tmp_path / "o.jsonl", batch_size=25),
            describe,
            decode_image=decode_image,
            progress=measure,
        )
    early, late = max(resident[20:60]), max(resident[-40:])
    print(f"{early:.0f} MiB after 500 images, {late:.0f} MiB after 5,000")
    assert len(resident) == 201 and late < early + 10


@pytest.mark.full
@pytest.mark.parametrize("count", [10_000_000])
def test_ten_million_rows_are_listed_and_gone_on_with(count: int, tmp_path: Path) -> None:
    """In a process of its own, up to the first image that is new; what it took is printed."""
    out, rows, texts = (
        tmp_path / "out.jsonl",
        tmp_path / "rows.txt",
        '[{"caption":"a red square","score":-0.5}]',
    )
    state = tmp_path / ".out.jsonl.blip2"
    Database(state, {"model": "m"}).close()
    with closing(sqlite3.connect(state / "state.sqlite")) as database:
        for pragma in ("synchronous = OFF", "journal_mode = OFF", "cache_size = -4000000"):
            database.execute(f"PRAGMA {pragma}")
        hashes = ((i, hashlib.sha256(b"%d" % i).digest(), texts) for i in range(1, count + 1))
        database.executemany("INSERT INTO contents VALUES (?, ?, ?)", hashes)
        named = (
            (i, os.fsencode(tmp_path / f"folder/{i:08}.jpg"), 9, i * 10**9, i) for i in range(1, count + 1)
        )
        columns = "id, name, size, mtime_ns, content"
        database.executemany(f"INSERT INTO inputs ({columns}) VALUES (?, ?, ?, ?, ?)", named)
        database.commit()
    with rows.open("w") as file:
        file.writelines(f"folder/{i:08}.jpg\n" for i in range(1, count + 1))
        file.writelines(f"folder/new{i:03}.jpg\n" for i in range(1000))
    (tmp_path / "folder").mkdir()
    for i in range(1000):
        (tmp_path / "folder" / f"new{i:03}.jpg").write_bytes(png(i))
    program = f"""
import sys, time
from pathlib import Path
from blip2.bulk import Inputs, RunSettings, caption_all

begin = time.perf_counter()

def first(images):
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # in KiB
    print(len(images), time.perf_counter() - begin, time.process_time(), peak)
    sys.stdout.flush()
    raise SystemExit

settings = RunSettings(out=Path({str(out)!r}), kind="jsonl", run_config={{"model": "m"}})
caption_all(Inputs(sources=[{str(rows)!r}]), settings, first)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images, seconds, of_cpu, peak = done.stdout.split()
    print(
        f"{count:,} rows: {float(seconds):.0f} s, {float(of_cpu):.0f} s of CPU, {int(peak) / 2**20:.2f} GiB"
    )
    size = (state / "state.sqlite").stat().st_size
    print(f"{size / count:.0f} bytes of the database a row")
    assert images == "8" and int(peak) < 10**9 / 1024


# --- the command ---


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_command(
    generator_folder: Path,
    pictures: list[Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
) -> None:
    model = blip2.load(generator_folder)
    out, common = tmp_path / "c.jsonl", ["--model", str(generator_folder), "--max-new-tokens", "6", "--quiet"]
    (tmp_path / "bad.png").write_bytes(b"no image")
    for source, message in (
        ("no.jpg", "no such file or folder"),
        ("-", "save the image"),
        (str(tmp_path / "none"), "no images found"),
    ):
        (tmp_path / "none").mkdir(exist_ok=True)
        assert main(["caption", source, "--out", str(out), *common]) == 2 and not out.exists()
        assert message in capsys.readouterr().err
    command = ["caption", str(pictures[0].parent), str(tmp_path / "bad.png"), "--out", str(out), *common]
    with parallel_batches(model) as beside:
        assert beside == 2 and torch.get_num_threads() == 1
    assert main([*command, "--batch-size", "2"]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert torch.get_num_threads() == 2
    for path, row in zip(pictures, rows):
        alone = model.caption(path, max_new_tokens=6)
        assert row == {
            "image": str(path),
            "caption": alone,
            "score": pytest.approx(alone.score, rel=1e-4),
            "hash": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    assert [*rows[-1]] == ["image", "error"]
    assert json.loads((tmp_path / ".c.jsonl.blip2" / "errors.jsonl").read_text()) == rows[-1]
    assert main([*command, "--beams", "2"]) == 2
    assert "beams was 5, now 2" in capsys.readouterr().err
    assert main([*command, "--existing", "append"]) == 2
    assert "existing was None, now 'append'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "--engine", "ray"]) == 2 and "pip install 'blip2[ray]'" in capsys.readouterr().err

    (tmp_path / "q.txt").write_text("what is it?\nhow many?\n")
    out = tmp_path / "a.jsonl"
    command = ["caption", str(pictures[0]), "--out", str(out), *common, "--score"]
    assert main([*command, "--questions", str(tmp_path / "q.txt")]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == ["what is it?", "how many?"]
    assert all(row["logprob"] < 0 for row in rows)
    assert main(["caption", str(pictures[0]), "--out", str(tmp_path / "d.jsonl"), *common, "--dry-run"]) == 0
    assert "1 inputs" in capsys.readouterr().out and not (tmp_path / "d.jsonl").exists()


def test_options_of_files_need_an_output(capsys: Any) -> None:
    assert main(["caption", "x.png", "--format", "csv", "--existing", "skip", "--engine", "local"]) == 2
    assert "--format, --existing, --engine: only with --out PATH" in capsys.readouterr().err


def test_the_time_left_is_shown_where_inputs_can_be_counted(capfd: Any) -> None:
    def listed() -> Iterator[ImageItem]:
        yield from (ImageItem(str(i), "") for i in range(40))
        counted.set()

    for known in (True, False):
        counted = threading.Event()
        with progress_bar(listed() if known else None) as show:
            for thread in threading.enumerate():
                if known and thread.daemon and "count" in thread.name:
                    thread.join()
            show(Progress(done=3, before=10, failed=1))
        assert counted.is_set() == known
        shown = capfd.readouterr().err
        assert ("3/30" in shown) == known and "failed=1" in shown and "before=10" in shown


def test_match_and_keep_best(tmp_path: Path) -> None:
    image = Path(__file__).parents[2] / "examples" / "triangle-and-square.jpg"
    common = ["--num-captions", "3", "--beams", "3", "--max-new-tokens", "12", "--quiet"]
    rows_of: dict[str, list[Row]] = {}
    for option in ("--match", "--keep-best"):
        out = tmp_path / f"{option}.jsonl"
        assert main(["caption", str(image), "--out", str(out), *common, option]) == 0
        rows_of[option] = [json.loads(line) for line in out.read_text().splitlines()]
    rows = rows_of["--match"]
    captions = [row["caption"] for row in rows]
    assert len(set(captions)) == 3
    fits = blip2.load().match(image, captions)
    assert [row["match"] for row in rows] == pytest.approx([fit.probability for fit in fits], abs=1e-4)
    assert rows_of["--keep-best"] == [max(rows, key=lambda row: float(row["match"]))]


def test_the_last_line_says_what_was_done_and_what_was_left_alone(
    generator_folder: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    common = ["--model", str(generator_folder), "--max-new-tokens", "3", "--num-beams", "1"]
    folder, out = tmp_path / "in", tmp_path / "c.jsonl"
    folder.mkdir()
    for i, path in enumerate(pictures[:3]):
        (folder / f"{i}{path.suffix}").write_bytes(path.read_bytes())

    def go(*more: str) -> tuple[int, str]:
        status = main(["caption", str(folder), "--out", str(out), *common, *more])
        return status, capsys.readouterr().err.splitlines()[-1].removeprefix(f"{out}: ")

    assert go() == (0, "3 captioned, 0 failed, 0 left alone")
    lines = out.read_text().splitlines()
    out.write_text("\n".join([lines[0], lines[1].replace('"caption": "', '"caption": "my '), lines[0]]))
    (folder / "4.png").write_bytes(b"no image")
    errors = f"; errors: {tmp_path}/.c.jsonl.blip2/errors.jsonl"
    left = "3 left alone (1 edited, 1 added, 1 removed)"
    assert go() == (1, f"0 captioned, 1 failed, {left}; 3 inputs were known before{errors}")
    (folder / "4.png").unlink()
    assert go("--suffix", "!") == (0, f"0 captioned, 0 failed, {left}; 4 inputs were known before")
    captions = [json.loads(line).get("caption", "") for line in out.read_text().splitlines()]
    assert [caption.endswith("!") for caption in captions] == [True, False, False, False]
    out.unlink()
    assert "; 1 written again" in go("--suffix", "!")[1]
    replaced = "3 captioned, 0 failed, 0 left alone; 3 edits replaced and kept in .bak"
    assert go("--existing", "overwrite") == (0, replaced)
    out = folder
    (folder / "0.txt").write_text("mine")
    assert go() == (0, "2 captioned, 0 failed, 1 left alone (1 existing)")
    (folder / "1.txt").write_text("mine")
    (folder / "2.txt").write_text("")
    assert go() == (
        0,
        "0 captioned, 0 failed, 2 left alone (1 edited, 1 existing); 3 inputs were known before; 1 written again",
    )


@pytest.mark.parametrize(
    "arguments", [["--json"], ["--prefix", "a ", "--suffix", "!"], ["--questions", "q.txt"]]
)
def test_a_dash_is_standard_output(
    arguments: list[str],
    generator_folder: Path,
    pictures: list[Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("what?\nwhy?\n")
    command = [
        "caption",
        *map(str, pictures),
        "--model",
        str(generator_folder),
        "--max-new-tokens",
        "3",
        *arguments,
    ]
    printed = []
    for out in ([], ["--out", "-"]):
        assert main([*command, *out]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0].splitlines()) == 5 * (1 + ("--questions" in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]
    assert main([*command, "--out", "-", "--format", "csv"]) == 2
    assert main([*command, "--out", "/dev/null/x.jsonl"]) == 2
