"""The training pictures as the stem sees them: composed and read once, kept in DIR/features.

A kind of picture is stored in shards of `SHARD`: KIND-0000.safetensors with `cells` [n, 768, 8, 8] in fp16, and
KIND-0000.json with the facts of each, which is written last. Picture `i` of a kind is a pure function of its number, so
a killed run goes on with the first shard that is missing. The facts:

    scene        one to four objects on a painted background: {"side", "patch", "objects"}, see `scene_of`
    varied       the same on parts of photographs, two backgrounds mixed, and many more painted ones
    easy         an image of easy-VQA's training set: {"easy": its number}
    photograph   a part of an unlabelled photograph: {"names"}, see `names_of`
    pasted       one cut-out, large or many times, on such a part: {"noun", "colour", "many", "names"}; "" is no colour
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2.images import random_resized_crop
from blip2.inputs import in_batches
from blip2.modeling.stem import Stem
from blip2.storage import replace_file, write_file
from default_model import easyvqa
from default_model.backgrounds import POOL, background
from default_model.kinds import Kind
from default_model.materials import PICTURES, Cutouts
from default_model.scenes import GRID, IMAGE_PX, Backdrop, Composer, Placed, Scene
from default_model.stem import IMAGE_PX as STEM_PX

Pixels = NDArray[np.uint8]
Facts = dict[str, Any]  # of a picture, as JSON keeps them
SHARD = 512  # pictures
STEM_BATCH = 4  # images the stem is given at a time: of more the maps leave the cache
SHARP = 0.45  # of the scenes are composed in the stem's size, the others in that of the evaluation sets
OBJECTS = (22, 26, 28, 24)  # weights of one to four objects in a scene
KEPT_NAMES = 24  # of a photograph's probable names
CROP = (0.25, 1.0)  # least and greatest share of a photograph's area in a part of it
COVERED = 77  # of 255: the share of a cell, 30 %, from which on a cut-out covers it


@dataclass(frozen=True)
class Painter:
    """Draws picture `i` of every kind, from the materials in a folder."""

    folder: Path

    @cached_property
    def sizes(self) -> dict[int, Composer]:
        """The composers of scenes, by the side of the image in px."""
        return {
            IMAGE_PX: Composer(Cutouts.load(self.folder)),
            STEM_PX: Composer(Cutouts.load(self.folder / "cutouts-224.npz")),
        }

    @cached_property
    def gallery(self) -> Composer:
        """Every cut-out that may be pasted on a photograph: those of both tables, but no drawings in outline."""
        every = self.everything.cutouts
        kept = [i for i, row in enumerate(every.rows) if row.source != "openmoji"]
        return Composer(Cutouts(tuple(every.rows[i] for i in kept), tuple(every.images[i] for i in kept)))

    @cached_property
    def everything(self) -> Composer:
        """The cut-outs of both tables."""
        sharp, pictures = self.sizes[STEM_PX].cutouts, Cutouts.load(self.folder / "pictures.npz", PICTURES)
        return Composer(Cutouts(sharp.rows + pictures.rows, sharp.images + pictures.images))

    @cached_property
    def easy_images(self) -> list[easyvqa.EasyImage]:
        return easyvqa.load(self.folder, "train")

    @cached_property
    def photographs(self) -> list[Path]:
        return sorted((self.folder / "photographs").glob("*.jpg"))

    def draw(self, kind: Kind, i: int) -> tuple[Pixels, Facts]:
        """An image [S, S, 3] and its facts, without what the stem says of it."""
        rng = random.Random(f"bank {kind} {i}")
        if kind == "easy":
            return self.easy_images[i].image, {"easy": i}
        if kind == "photograph":
            return np.asarray(self._crop(rng)), {}
        if kind == "pasted":
            return self._pasted(rng)
        return self._scene(rng, None if kind == "scene" else self._backdrop)

    def _scene(self, rng: random.Random, backdrop: Backdrop | None) -> tuple[Pixels, Facts]:
        side = STEM_PX if rng.random() < SHARP else IMAGE_PX
        seed = rng.getrandbits(48)
        objects = rng.choices((1, 2, 3, 4), OBJECTS)[0]
        scene = self.sizes[side].compose(seed, "train", objects=objects, side=side, backdrop=backdrop)
        return scene.image, {
            "side": side,
            "patch": scene.patch_object.tolist(),
            "objects": [[o.id, o.noun, o.colour, list(o.box), o.is_shape] for o in scene.objects],
        }

    def _backdrop(self, rng: random.Random, side: int) -> Pixels:
        """A background unlike others: with the painted pool alone, things were known on no others."""
        draw = rng.random()
        if draw < 0.4:
            return np.asarray(self._crop(rng, side))
        first, second = rng.getrandbits(31), rng.getrandbits(31)
        if draw < 0.6:
            return background(first, "train", side)[0]
        if draw < 0.8:
            mask = Image.new("L", (side, side), rng.randint(60, 195))
        else:  # parts of both, with an edge somewhere
            small = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (3, 3), np.uint8)
            mask = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
            mask = mask.point(lambda value: 255 * (value > 127))
        images = (Image.fromarray(background(index, "train", side)[0]) for index in (first, second))
        return np.asarray(Image.composite(*images, mask))

    def _crop(self, rng: random.Random, side: int = STEM_PX) -> Image.Image:
        image = Image.open(rng.choice(self.photographs)).convert("RGB")
        return random_resized_crop(image, side, np.random.default_rng(rng.getrandbits(32)), scale=CROP)

    def _pasted(self, rng: random.Random) -> tuple[Pixels, Facts]:
        noun = rng.choice(self.gallery.names)
        row = rng.choice([row for row in self.gallery.cutouts.rows if row.noun == noun])
        canvas = self._crop(rng)
        many = rng.random() < 0.35
        for _ in range(rng.randint(6, 24) if many else 1):
            share = rng.uniform(0.22, 0.4) if many else rng.uniform(0.5, 1.0)
            sprite = self.gallery.sprite(rng, row.id, share, STEM_PX)
            out = STEM_PX // 7 if many else 0  # px beyond the image's edge, at most
            x = rng.randint(-out, max(1 - out, STEM_PX - sprite.width + out))
            y = rng.randint(-out, max(1 - out, STEM_PX - sprite.height + out))
            canvas.paste(sprite, (x, y), sprite)
        return np.asarray(canvas), {"noun": noun, "colour": row.colour, "many": many}

    def specimen(self, i: int) -> tuple[Pixels, NDArray[np.bool_], str]:
        """Cut-out `i % n` of n alone, large, on a photograph or a painted background.

        Returns:
            The image [S, S, 3], which of its cells [8, 8] the cut-out covers, and its noun.
        """
        rng = random.Random(f"specimen {i}")
        composer = self.everything
        row = composer.cutouts.rows[i % len(composer.cutouts.rows)]
        if rng.random() < 0.5:
            canvas = self._crop(rng)
        else:
            canvas = Image.fromarray(background(rng.randrange(POOL), "train", STEM_PX)[0])
        sprite = composer.sprite(rng, row.id, rng.uniform(0.5, 1.0), STEM_PX)
        x, y = (rng.randint(0, max(1, STEM_PX - length)) for length in sprite.size)
        mask = Image.new("L", (STEM_PX, STEM_PX))
        mask.paste(sprite.getchannel("A"), (x, y))
        canvas.paste(sprite, (x, y), sprite)
        shares = np.asarray(mask.resize((GRID, GRID), Image.Resampling.BOX))
        return np.asarray(canvas), shares >= min(COVERED, int(shares.max())), row.noun


def store_pictures(painter: Painter, stem: Stem, kind: Kind, numbers: range, path: Path) -> None:
    """Write one shard: PATH.safetensors, then PATH.json, which tells that it is complete."""
    cells: list[Tensor] = []
    facts: list[Facts] = []
    for _, some in in_batches(numbers, STEM_BATCH):
        images, rows = zip(*(painter.draw(kind, i) for i in some), strict=True)
        values, probabilities = stem_cells(stem, images)
        cells.append(values.half())
        facts += rows
        if kind in ("photograph", "pasted"):
            for row, top in zip(rows, top_names(probabilities), strict=True):
                row["names"] = top
    with replace_file(path.with_suffix(".safetensors")) as beside:
        save_file({"cells": torch.cat(cells).contiguous()}, beside)
    with replace_file(path.with_suffix(".json")) as beside:
        write_file(beside, json.dumps(facts))


def top_names(probabilities: Tensor) -> list[list[tuple[int, float]]]:
    """The `KEPT_NAMES` likeliest names of each row of [B, K + P], by number, with their probabilities."""
    top = probabilities.topk(KEPT_NAMES)
    return [
        [(i, round(p, 4)) for i, p in zip(indices, values, strict=True)]
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def specimen_features(painter: Painter, stem: Stem, count: int) -> tuple[Tensor, list[str], Tensor]:
    """What the stem's maps are at cut-outs of every noun.

    Returns:
        The head's mean over the cells that each specimen covers, [count, H]; the specimens' nouns; and every sixteenth
        position of their fine maps, [16 count, F].
    """
    heads: list[Tensor] = []
    fines: list[Tensor] = []
    nouns: list[str] = []
    for turn, (_, numbers) in enumerate(in_batches(range(count), STEM_BATCH)):
        drawn = [painter.specimen(i) for i in numbers]
        fine, head = stem.maps(stem_pixels([image for image, _, _ in drawn]))
        masks = torch.from_numpy(np.stack([cells for _, cells, _ in drawn])).float()
        heads.append(torch.einsum("bhij,bij->bh", head, masks) / masks.sum((1, 2))[:, None])
        fines.append(fine.flatten(2).mT[:, turn % 16 :: 16].flatten(0, 1))
        nouns += [noun for _, _, noun in drawn]
    return torch.cat(heads), nouns, torch.cat(fines)


def photograph_heads(painter: Painter, stem: Stem, count: int) -> Tensor:
    """The head's mean over parts of unlabelled photographs, [count, H]."""
    heads = []
    for _, numbers in in_batches(range(count), STEM_BATCH):
        images = [painter.draw("photograph", i)[0] for i in numbers]
        heads.append(stem.maps(stem_pixels(images))[1].mean((2, 3)))
    return torch.cat(heads)


def stem_cells(stem: Stem, images: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
    """Images [S, S, 3] -> the stem's cells [B, 768, 8, 8] and the names' probabilities [B, K + P]."""
    fine, head = stem.maps(stem_pixels(images))
    return stem.readout(fine, head), stem.readout.probabilities(head.mean((2, 3)))


def stem_pixels(images: Sequence[Pixels]) -> Tensor:
    """Images [S, S, 3] -> what the stem takes, [B, 3, 256, 256], as the package's image processing gives it."""
    resized = [
        np.asarray(Image.fromarray(image).resize((STEM_PX, STEM_PX), Image.Resampling.BICUBIC))
        for image in images
    ]
    return torch.from_numpy(np.stack(resized)).float().sub_(127).div_(128).permute(0, 3, 1, 2)


def make_features(folder: Path, stem: Stem, kind: Kind, count: int, share: tuple[int, int] = (0, 1)) -> None:
    """Write the shards of `count` pictures that are missing. share: (i, n): every n-th shard alone, from the i-th."""
    painter = Painter(folder)
    (folder / "features").mkdir(exist_ok=True)
    for shard in range(share[0], -(-count // SHARD), share[1]):
        path = folder / "features" / f"{kind}-{shard:04d}"
        if not path.with_suffix(".json").exists():
            store_pictures(painter, stem, kind, range(shard * SHARD, min(count, (shard + 1) * SHARD)), path)
            print(path, flush=True)


class Bank:
    """The stored pictures of one kind. Values stay in the files until they are needed.

    FileNotFoundError where there are none.
    """

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
        files: list[Any] = [safe_open(path.with_suffix(".safetensors"), "pt") for path in self.paths]
        return [file.get_slice("cells") for file in files]

    def cells(self, i: int) -> Tensor:
        """Picture i, float32 [768, 8, 8]."""
        cells: Tensor = self._files[i // SHARD][i % SHARD]
        return cells.float()


_BLACK = np.zeros((1, 1, 3), np.uint8)


def names_of(facts: Facts) -> dict[int, float]:
    """The likeliest names of a stored photograph, by number, with the stem's probabilities."""
    return {int(name): float(p) for name, p in facts["names"]}


def scene_of(facts: Facts) -> Scene:
    """The scene of stored facts; its image is black."""
    objects = tuple(
        Placed(id, noun, colour, tuple(box), is_shape) for id, noun, colour, box, is_shape in facts["objects"]
    )
    image = np.broadcast_to(_BLACK, (facts["side"], facts["side"], 3))
    return Scene(-1, "train", image, objects, "", np.array(facts["patch"], np.int8).reshape(GRID, GRID))
