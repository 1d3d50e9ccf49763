"""Bulk captioning with the default model beside a plain batch loop in transformers with the same weights.

    python -m benchmarks.bulk [--count 20000] [--batches 8 16 32] [--place DIR]

Generated pictures, 2 % of them damaged and 5 % the same bytes as an earlier one, are captioned by `blip2 caption FOLDER
--out FILE` and by the loop most people write: open, preprocess, generate, decode, write a line. Each is a process of
its own, one after the other, in fp32, with 5 beams and 30 tokens, and with that of the batch sizes which was fastest on
the first pictures for it; transformers has what it chooses for itself: fused attention, and the fastest image processor
that is installed. Seconds are of the clock and of the CPU; those of starting (Python, the model, one image) are
measured apart and taken off. On a busy machine the clock says little, the CPU's seconds are then the better measure.

Every half minute a line says how far a side is and how much memory it holds. With --place, pictures, captions and
figures stay in a folder: what stands there already is not measured again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from blip2.text import CAPTION_PROMPT

MODEL = Path(__file__).parents[1] / "blip2" / "assets" / "default"
BEAMS, TOKENS = 5, 30
TRIED = 160  # pictures that choose the batch size
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
Command = Callable[[Path, Path, int], list[str]]


class Took(NamedTuple):
    """Seconds of a process, by the clock and of the CPU; how much it had written and held, in MiB, as time went."""

    clock: float
    cpu: float
    memory: list[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], metavar="N")
    parser.add_argument("--place", type=Path, metavar="DIR", help="keep everything here, and go on from it")
    parser.add_argument("--loop", nargs=3, metavar=("FOLDER", "FILE", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        loop(Path(arguments.loop[0]), Path(arguments.loop[1]), int(arguments.loop[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.place or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        print(json.dumps(compare(place, arguments.count, arguments.batches)))


def compare(place: Path, count: int, batches: list[int]) -> dict[str, Any]:
    """Both sides over so many pictures: their figures, and in how many captions they agree."""
    tried = min(TRIED, count)
    for number in {1, tried, count}:
        make_pictures(place / f"pictures-{number}", number)
    sides: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, str]] = {}
    for name, command, read in (("blip2", ours, read_ours), ("transformers", theirs, read_theirs)):
        start = measured(place, name, command, 1, batches[0])
        trials = {size: measured(place, name, command, tried, size)["clock"] for size in batches}
        size = min(batches, key=lambda size: trials[size])
        figures = measured(place, name, command, count, size)
        sides[name] = {
            "batch": size,
            "trials": {size: round(seconds - start["clock"], 2) for size, seconds in trials.items()},
            "seconds": round(figures["clock"] - start["clock"], 2),
            "cpu_seconds": round(figures["cpu"] - start["cpu"], 2),
            "start_seconds": round(start["clock"], 2),
            "start_cpu_seconds": round(start["cpu"], 2),
            "memory_mib": quarters(figures["memory"], count),
        }
        print(name, json.dumps(sides[name]), flush=True)
        texts[name] = read(place / f"{name}-{count}-{size}.jsonl")
    captions, plain = texts["blip2"], texts["transformers"]
    return {
        "pictures": count,
        "captions": len(captions),
        "same_caption": sum(plain.get(name) == caption for name, caption in captions.items()),
        **sides,
        "ratio": round(sides["transformers"]["seconds"] / sides["blip2"]["seconds"], 2),
        "cpu_ratio": round(sides["transformers"]["cpu_seconds"] / sides["blip2"]["cpu_seconds"], 2),
    }


def quarters(memory: list[tuple[int, int]], count: int) -> dict[str, int]:
    """The most memory held in each quarter of the pictures."""
    largest: dict[str, int] = {}
    for done, size in memory:
        part = f"{min(3, 4 * done // count) * 25}-{min(3, 4 * done // count) * 25 + 25} %"
        largest[part] = max(largest.get(part, 0), size)
    return largest


def make_pictures(folder: Path, count: int) -> None:
    """Two shapes on a ground, in sizes from 160 to 640; every 50th is damaged, every 20th an earlier one again."""
    if (finished := folder.with_name(f"{folder.name}.made")).exists():
        return
    folder.mkdir(exist_ok=True)
    rng, contents = random.Random(0), list[bytes]()
    for i in range(count):
        if i % 20 == 19:
            content = contents[rng.randrange(0, i) // 20 * 20]  # never one of the damaged
        elif i % 50 == 25:
            content = contents[-1][: len(contents[-1]) // 2]
        else:
            content = picture(rng)
        contents.append(content)
        (folder / f"{i:06}.jpg").write_bytes(content)
    finished.touch()


def picture(rng: random.Random) -> bytes:
    """A JPEG file."""
    width, height = rng.randrange(160, 641), rng.randrange(160, 641)
    ground, *colors = rng.sample(COLORS, 3)
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    for color in colors:
        size = rng.randrange(30, min(width, height) // 2)
        x, y = rng.randrange(0, width - size), rng.randrange(0, height - size)
        kind = rng.choice(("circle", "square", "triangle"))
        if kind == "circle":
            draw.ellipse((x, y, x + size, y + size), color)
        elif kind == "square":
            draw.rectangle((x, y, x + size, y + size), color)
        else:
            draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], color)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def ours(folder: Path, file: Path, batch: int) -> list[str]:
    """The command that captions a folder with this package."""
    decoding = ["--beams", str(BEAMS), "--max-new-tokens", str(TOKENS), "--batch-size", str(batch)]
    fixed = ["--dtype", "fp32", "--quiet"]
    return ["-m", "blip2", "caption", str(folder), "--out", str(file), *fixed, *decoding]


def theirs(folder: Path, file: Path, batch: int) -> list[str]:
    """The command that captions a folder with transformers."""
    return ["-m", "benchmarks.bulk", "--loop", str(folder), str(file), str(batch)]


def read_ours(file: Path) -> dict[str, str]:
    """The name of each picture and its caption."""
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    return {row["image"]: row["caption"] for row in rows if "caption" in row}


def read_theirs(file: Path) -> dict[str, str]:
    """The same of the loop's file."""
    return dict(map(json.loads, file.read_text("utf-8").splitlines()))


def measured(place: Path, name: str, command: Command, count: int, batch: int) -> dict[str, Any]:
    """What a side took for so many pictures: as the folder has it, or measured now and put there."""
    record, called = place / "figures.jsonl", f"{name}-{count}-{batch}"
    for line in record.read_text("utf-8").splitlines() if record.is_file() else ():
        if (known := json.loads(line))["called"] == called:
            return dict(known)
    file = place / f"{called}.jsonl"
    file.unlink(missing_ok=True)
    database = file.parent / f".{file.name}.blip2" / "state.sqlite"
    database.unlink(missing_ok=True)  # of a run that was stopped: the clock would not have all of it
    done = partial(recorded, database) if name == "blip2" else partial(lines, file)
    took = run(command(place / f"pictures-{count}", file, batch), done, called)
    figures = {"called": called, "clock": took.clock, "cpu": took.cpu, "memory": took.memory}
    with record.open("a", encoding="utf-8") as out:
        out.write(json.dumps(figures) + "\n")
    return figures


def recorded(database: Path) -> int:
    """How many pictures a run of blip2 has done."""
    with (
        contextlib.suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as run,
    ):
        return int(run.execute("SELECT max(id) FROM inputs").fetchone()[0] or 0)
    return 0


def lines(file: Path) -> int:
    """How many pictures the loop has done."""
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def run(command: list[str], progress: Callable[[], int], called: str) -> Took:
    """What a Python process took; `progress` tells how far it is. Pictures that fail make blip2's exit status 1."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    memory: list[tuple[int, int]] = []
    reported = begin
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=errors)
        while child.poll() is None:
            time.sleep(0.5 if time.perf_counter() - begin > 10 else 0.05)
            done = progress()
            size = resident(child.pid)
            if size and (not memory or memory[-1] != (done, size)):
                memory.append((done, size))
            if time.perf_counter() - reported > 30:
                reported = time.perf_counter()
                print(f"{called}: {done} pictures, {reported - begin:.0f} s, {size} MiB", flush=True)
        clock = time.perf_counter() - begin
        errors.seek(0)
        complaint = errors.read()
    if child.returncode not in (0, 1) or "Traceback" in complaint:
        raise SystemExit(complaint)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, memory)


def resident(process: int) -> int:
    """MiB of memory that a process holds; 0 where Linux does not tell."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() >> 20


def loop(folder: Path, file: Path, batch: int) -> None:
    """Caption a folder with transformers, as one does without this package."""
    import torch
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(MODEL)
    model = Blip2ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    paths = sorted(folder.iterdir())
    with file.open("w", encoding="utf-8") as out:
        for first in range(0, len(paths), batch):
            images, names = [], []
            for path in paths[first : first + batch]:
                try:
                    images.append(Image.open(path).convert("RGB"))
                    names.append(str(path))
                except OSError:
                    continue
            if not images:
                continue
            inputs = processor(images=images, text=[CAPTION_PROMPT] * len(images), return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**inputs, num_beams=BEAMS, max_new_tokens=TOKENS)
            texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for name, text in zip(names, texts, strict=True):
                out.write(json.dumps([name, text.strip()]) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
