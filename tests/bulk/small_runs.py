"""What the tests of bulk captioning share: folders of tiny images, and a run over them without a model."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2.bulk import Inputs, RunSettings, caption_all
from blip2.bulk.database import Row


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    """Images of which every tenth is damaged and every seventh the first one again."""
    folder.mkdir()
    for i in range(count):
        content = b"\x89PNG damaged" if i % 10 == 9 else png(0 if i % 7 == 6 else i)
        (folder / f"{i:05}.png").write_bytes(content)
    return folder


def say(images: Sequence[Image.Image]) -> list[list[Row]]:
    """A caption that depends on the image, and a score that depends on all images in the batch."""
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    together = int(hashlib.sha256("".join(digests).encode()).hexdigest()[:8], 16)
    time.sleep(0.001)
    return [[{"caption": digest[:8], "score": float(together)}] for digest in digests]


def settings(out: Path, **changes: Any) -> RunSettings:
    fixed = {"kind": "jsonl", "run_config": {"model": "m"}, "batch_size": 4, "parallel_batches": 2}
    return RunSettings(**{"out": out, **fixed, **changes})


def run(folder: Path, out: Path, **changes: Any) -> list[Row]:
    caption_all(Inputs(sources=[str(folder)]), settings(out, **changes), say)
    return [json.loads(line) for line in out.read_text().splitlines()]
