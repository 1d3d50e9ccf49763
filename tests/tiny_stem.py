"""A tiny random stem, and models that read images through it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2.checkpoint import load_model, save_model
from blip2.images import ImageProcessor
from blip2.stemfiles import STEM_FILE, STEM_LICENSE, load_stem

ORIGIN = "a tiny network, MIT"
IMAGE_PX = 64  # two cells a side: an image encoder of 32 px
STAGES = (
    (1, 3, 1, 6),
    (2, 3, 2, 8),
    (1, 5, 3, 10),
    (1, 3, 2, 14),
    (2, 5, 2, 12),
    (1, 5, 2, 18),
    (1, 3, 2, 16),
)
FIRST, FINE, HEAD, CLASSES = 8, 12, 20, 5


def tiny_stem_tensors(seed: int = 0, *, detail: int = 32, evidence: int = 64) -> dict[str, Tensor]:
    """A stem's tensors; of STAGES each is (blocks, kernel, expansion, width)."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        fan_in = torch.tensor(shape[1:]).prod().item()
        tensors[f"{name}.weight"] = 1.6 * fan_in**-0.5 * torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)

    add("first", FIRST, 3, 3, 3)
    number, width = 0, FIRST
    for blocks, kernel, expansion, outputs in STAGES:
        for _ in range(blocks):
            middle = width * expansion
            if expansion > 1:
                add(f"blocks.{number}.expand", middle, width, 1, 1)
            add(f"blocks.{number}.depth", middle, 1, kernel, kernel)
            add(f"blocks.{number}.project", outputs, middle, 1, 1)
            number, width = number + 1, outputs
    add("head", HEAD, width, 1, 1)
    add("readout.coarse", 768 - 4 * detail - evidence, HEAD)
    add("readout.fine", detail, FINE)
    if evidence:
        add("readout.classifier", CLASSES, HEAD)
        add("readout.evidence", evidence, CLASSES)
        del tensors["readout.evidence.bias"]
    return tensors


def tiny_processor(folder: Path, seed: int = 0) -> ImageProcessor:
    """An image processor that ends with a tiny stem, whose file is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tiny_stem_tensors(seed).items()}, folder / STEM_FILE)
    (folder / STEM_LICENSE).write_text("a licence\n")
    stem = load_stem(folder / STEM_FILE, ORIGIN)
    return ImageProcessor(IMAGE_PX, (127 / 255,) * 3, (128 / 255,) * 3, stem=stem)


def with_stem(source: Path, folder: Path, processor: ImageProcessor, beside: str | None = None) -> Path:
    """The model of one folder in another, reading images through a stem: its own, or that of the folder `beside`."""
    save_model(load_model(source), folder, tokenizer=source, image_processor=processor)
    if beside is not None:
        settings = folder / "preprocessor_config.json"
        raw = json.loads(settings.read_text())
        raw["stem"]["file"] = f"../{beside}/{STEM_FILE}"
        settings.write_text(json.dumps(raw))
        (folder / STEM_FILE).unlink()
    return folder
