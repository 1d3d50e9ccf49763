"""Bulk captioning with the default model beside a plain batch loop in transformers with the same weights.

    python -m benchmarks.bulk [--count 2000]

Generated pictures, 2 % of them damaged and 5 % the same bytes as an earlier one, are captioned by `blip2 caption FOLDER
--out FILE` and by the loop most people write: open, preprocess, generate, decode, write a line. Each is a process of
its own, one after the other, with 5 beams, 30 tokens and 8 images at a time. Seconds are of the clock and of the CPU;
those of starting (Python, the model, one image) are measured apart and taken off. On a busy machine the clock says
little, the CPU's seconds are then the better measure. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from blip2.text import CAPTION_PROMPT

MODEL = Path(__file__).parents[1] / "blip2" / "assets" / "default"
BEAMS, TOKENS, BATCH = 5, 30, 8
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


class Took(NamedTuple):
    """Seconds of a process, by the clock and of the CPU."""

    clock: float
    cpu: float

    def __sub__(self, other: Took) -> Took:
        return Took(self.clock - other.clock, self.cpu - other.cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--loop", nargs=2, metavar=("FOLDER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        loop(*map(Path, arguments.loop))
        return
    with tempfile.TemporaryDirectory() as place:
        one, all_of_them = Path(place, "one"), Path(place, "all")
        make_pictures(one, 1)
        make_pictures(all_of_them, arguments.count)
        took: dict[str, Took] = {}
        for name, command in (("blip2", ours), ("transformers", theirs)):
            start = run(command(one, Path(place, f"{name}-one.jsonl")))
            took[name] = run(command(all_of_them, Path(place, f"{name}.jsonl"))) - start
            print(
                f"{name}: {took[name].clock:.1f} s, {took[name].cpu:.1f} s of CPU, "
                f"after {start.clock:.1f} s ({start.cpu:.1f} s of CPU) to start",
                flush=True,
            )
        said = [json.loads(line) for line in Path(place, "blip2.jsonl").read_text("utf-8").splitlines()]
        plain = dict(map(json.loads, Path(place, "transformers.jsonl").read_text("utf-8").splitlines()))
    captions = {row["image"]: row["caption"] for row in said if "caption" in row}
    result = {
        "pictures": arguments.count,
        "failed": len(said) - len(captions),
        "captions": len(captions),
        "same_caption": sum(plain.get(name) == caption for name, caption in captions.items()),
        "seconds": {name: round(each.clock, 2) for name, each in took.items()},
        "cpu_seconds": {name: round(each.cpu, 2) for name, each in took.items()},
        "ratio": round(took["transformers"].clock / took["blip2"].clock, 2),
        "cpu_ratio": round(took["transformers"].cpu / took["blip2"].cpu, 2),
    }
    print(json.dumps(result))


def make_pictures(folder: Path, count: int) -> None:
    """Two shapes on a ground, in sizes from 160 to 640; every 50th is damaged, every 20th an earlier one again."""
    folder.mkdir()
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


def ours(folder: Path, file: Path) -> list[str]:
    """The command that captions a folder with this package."""
    decoding = ["--beams", str(BEAMS), "--max-new-tokens", str(TOKENS), "--batch-size", str(BATCH)]
    return ["-m", "blip2", "caption", str(folder), "--out", str(file), "--quiet", *decoding]


def theirs(folder: Path, file: Path) -> list[str]:
    """The command that captions a folder with transformers."""
    return ["-m", "benchmarks.bulk", "--loop", str(folder), str(file)]


def run(command: list[str]) -> Took:
    """What a Python process took. Pictures that fail make blip2's exit status 1."""
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=dict(os.environ))
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - clock
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        raise SystemExit(done.stderr)
    return Took(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def loop(folder: Path, file: Path) -> None:
    """Caption a folder with transformers, as one does without this package."""
    import torch
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(MODEL)
    model = Blip2ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    paths = sorted(folder.iterdir())
    with file.open("w", encoding="utf-8") as out:
        for first in range(0, len(paths), BATCH):
            images, names = [], []
            for path in paths[first : first + BATCH]:
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
            said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for name, text in zip(names, said, strict=True):
                out.write(json.dumps([name, text.strip()]) + "\n")


if __name__ == "__main__":
    main()
