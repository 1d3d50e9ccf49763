"""The training pictures as the stem sees them: composed and folded once, kept in DIR/features.

A kind of picture is a row of shards of `SHARD` pictures: KIND-0000.safetensors with `cells` [n, 768, 8, 8] in fp16, and
KIND-0000.json with the facts of each. Picture `i` of a kind is a pure function of its number, so a killed run goes on with
the first shard that is missing.

    scene        one to four objects on a painted background         (composer, split "train")
    easy         easy-VQA's training images
    photograph   a part of an unlabelled photograph, with the probabilities of the names it may have
    pasted       one cut-out, large or many times, on a part of a photograph
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2.images import random_resized_crop
from blip2.modeling.stem import Stem
from default_model import easyvqa
from default_model.materials import Cutouts
from default_model.scenes import GRID, IMAGE_PX, Composer, Placed, Scene

Kind = Literal["scene", "easy", "photograph", "pasted"]
Pixels = NDArray[np.uint8]
SHARD = 512
STEM_PX = 256
STEM_BATCH = 8  # more do not fit the processor's cache
SHARP = 0.45  # of the scenes are composed in the stem's size, the others in that of the evaluation sets
OBJECTS = (22, 26, 28, 24)  # weights of one to four objects in a scene
KEPT_NAMES = 24  # of a photograph's probable names
CROP = (0.25, 1.0)  # least and greatest part of a photograph


@dataclass(frozen=True)
class Painter:
    """Draws picture `i` of every kind: an image [S, S, 3] and its facts."""

    folder: Path

    @cached_property
    def sizes(self) -> dict[int, Composer]:
        return {
            IMAGE_PX: Composer(Cutouts.load(self.folder)),
            STEM_PX: Composer(Cutouts.load(self.folder / "cutouts-224.npz")),
        }

    @cached_property
    def easy_images(self) -> list[easyvqa.EasyImage]:
        return easyvqa.load(self.folder, "train")

    @cached_property
    def photographs(self) -> list[Path]:
        return sorted((self.folder / "photographs").glob("*.jpg"))

    def draw(self, kind: Kind, i: int) -> tuple[Pixels, dict[str, Any]]:
        rng = random.Random(f"bank {kind} {i}")
        if kind == "easy":
            return self.easy_images[i].image, {"easy": i}
        if kind == "photograph":
            return np.asarray(self._crop(rng)), {}
        if kind == "pasted":
            return self._pasted(rng)
        side = STEM_PX if rng.random() < SHARP else IMAGE_PX
        objects = None
        seed = rng.getrandbits(48)
        objects = rng.choices((1, 2, 3, 4), OBJECTS)[0]
        scene = self.sizes[side].compose(seed, "train", objects=objects, side=side)
        return scene.image, {
            "side": side,
            "patch": scene.patch_object.tolist(),
            "objects": [[o.id, o.noun, o.colour, list(o.box), o.is_shape] for o in scene.objects],
        }

    def _crop(self, rng: random.Random) -> Image.Image:
        image = Image.open(rng.choice(self.photographs)).convert("RGB")
        return random_resized_crop(image, STEM_PX, np.random.default_rng(rng.getrandbits(32)), scale=CROP)

    def _pasted(self, rng: random.Random) -> tuple[Pixels, dict[str, Any]]:
        composer = self.sizes[STEM_PX]
        row = rng.choice([row for row in composer.cutouts.rows if row.source == "stamps"])
        canvas = self._crop(rng)
        many = rng.random() < 0.35
        for _ in range(rng.randint(6, 24) if many else 1):
            share = rng.uniform(0.22, 0.4) if many else rng.uniform(0.55, 1.0)
            sprite = composer.sprite(rng, row.id, share, STEM_PX)
            low, wide, high = -0.15 if many else 0.0, STEM_PX - sprite.width, STEM_PX - sprite.height
            x = rng.randint(round(low * STEM_PX), max(1, wide - round(low * STEM_PX)))
            y = rng.randint(round(low * STEM_PX), max(1, high - round(low * STEM_PX)))
            canvas.paste(sprite, (x, y), sprite)
        return np.asarray(canvas), {"noun": row.noun, "colour": row.colour, "many": many}


def fold_pictures(painter: Painter, stem: Stem, kind: Kind, numbers: Iterable[int], path: Path) -> None:
    """Write one shard: PATH.safetensors, then PATH.json, which tells that it is complete."""
    cells: list[Tensor] = []
    facts: list[dict[str, Any]] = []
    waiting: list[Pixels] = []

    def flush() -> None:
        folded, names = stem_cells(stem, waiting)
        cells.append(folded.half())
        if kind in ("photograph", "pasted"):
            for row, probabilities in zip(facts[-len(waiting) :], names, strict=True):
                top = probabilities.topk(KEPT_NAMES)
                row["names"] = [
                    [i, round(p, 4)] for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
        waiting.clear()

    for i in numbers:
        image, row = painter.draw(kind, i)
        facts.append(row)
        waiting.append(image)
        if len(waiting) == STEM_BATCH:
            flush()
    if waiting:
        flush()
    save_file({"cells": torch.cat(cells)}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def stem_cells(stem: Stem, images: list[Pixels]) -> tuple[Tensor, Tensor]:
    """Images [S, S, 3] -> the stem's cells [B, 768, 8, 8] and the names' probabilities [B, K + P]."""
    fine, head = stem.maps(stem_pixels(images))
    return stem.readout(fine, head), stem.readout.probabilities(head.mean((2, 3)))


def stem_pixels(images: list[Pixels]) -> Tensor:
    """Images [S, S, 3] -> what the stem takes, [B, 3, 256, 256]."""
    resized = [
        np.asarray(Image.fromarray(image).resize((STEM_PX, STEM_PX), Image.Resampling.BICUBIC))
        for image in images
    ]
    return torch.from_numpy(np.stack(resized)).float().sub_(127).div_(128).permute(0, 3, 1, 2)


def make_features(folder: Path, stem: Stem, kind: Kind, count: int, share: tuple[int, int] = (0, 1)) -> None:
    """Write the shards of `count` pictures that are missing; `share` (i, n): every n-th alone, from the i-th."""
    painter = Painter(folder)
    (folder / "features").mkdir(exist_ok=True)
    for shard in range(share[0], -(-count // SHARD), share[1]):
        path = folder / "features" / f"{kind}-{shard:04d}"
        if not path.with_suffix(".json").exists():
            fold_pictures(painter, stem, kind, range(shard * SHARD, min(count, (shard + 1) * SHARD)), path)
            print(path, flush=True)


class Bank:
    """The stored pictures of one kind. Values stay in the files until they are asked for."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.paths = [path.with_suffix("") for path in sorted((folder / "features").glob(f"{kind}-*.json"))]
        if not self.paths:
            raise FileNotFoundError(
                f"{folder / 'features'} holds no pictures of the kind {kind!r}: run the stage features"
            )
        self.facts = [row for path in self.paths for row in json.loads(path.with_suffix(".json").read_text())]

    def __len__(self) -> int:
        return len(self.facts)

    @cached_property
    def _files(self) -> list[Any]:
        return [safe_open(path.with_suffix(".safetensors"), "pt").get_slice("cells") for path in self.paths]

    def cells(self, i: int) -> Tensor:
        """Picture i, float32 [768, 8, 8]."""
        slice_: Callable[..., Any] = self._files[i // SHARD].__getitem__
        cells: Tensor = slice_(i % SHARD)
        return cells.float()


_BLACK = np.zeros((1, 1, 3), np.uint8)


def scene_of(facts: dict[str, Any]) -> Scene:
    """The scene of stored facts, without its image."""
    objects = tuple(
        Placed(id, noun, colour, tuple(box), is_shape) for id, noun, colour, box, is_shape in facts["objects"]
    )
    image = np.broadcast_to(_BLACK, (facts["side"], facts["side"], 3))
    return Scene(-1, "train", image, objects, "", np.array(facts["patch"], np.int8).reshape(GRID, GRID))
