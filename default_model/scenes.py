"""The composer: from a number to an image of named objects, with all facts about it.

`Composer(cutouts).compose(seed, split)` is pure. In the test split the backgrounds are of kinds that training never
shows, and scenes of several things pair things that training never shows together; every cut-out occurs in training.
"""

from __future__ import annotations

import io
import math
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from default_model.backgrounds import POOL, background, cached_background
from default_model.colours import COLOURS, SHAPE_RGB
from default_model.materials import Cutouts, ObjectRow

Split = Literal["train", "test"]
IMAGE_PX = 128
GRID = 8  # patches along a side of the default model's image encoder
MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "rectangle", "star", "heart", "diamond", "oval")
# Longest side of an object as a share of the image's side, by the number of objects.
SCALES = {1: (0.45, 0.95), 2: (0.35, 0.55), 3: (0.28, 0.48), 4: (0.28, 0.42)}
RELATION_DISTANCE = 0.25  # of the image's side


@dataclass(frozen=True)
class Noun:
    """A thing's name with its grammar: article "a", "an" or "a pair of"; plural without counting word."""

    singular: str
    plural: str
    article: str
    category: str


def nouns_of(rows: Iterable[ObjectRow]) -> dict[str, Noun]:
    """The nouns of a table's rows, and those of the plain shapes."""
    nouns = {shape: Noun(shape, shape + "s", "an" if shape == "oval" else "a", "shape") for shape in SHAPES}
    for row in rows:
        nouns[row.noun] = Noun(row.noun, row.plural, row.article, row.category)
    return nouns


@dataclass(frozen=True)
class Placed:
    """One object of a scene. box is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    id: str
    noun: str
    colour: str | None
    box: tuple[int, int, int, int]
    is_shape: bool


@dataclass(frozen=True)
class Scene:
    """An image and the facts about it. Objects are in the order of their centres, left to right."""

    seed: int
    split: Split
    image: NDArray[np.uint8]  # [side, side, 3]
    objects: tuple[Placed, ...]
    background: str
    patch_object: NDArray[np.int8]  # [8, 8]: the object that covers most of a patch (30 % or more), else -1

    @property
    def side(self) -> int:
        return int(self.image.shape[0])


def held_out_pair(a: str, b: str) -> bool:
    """True for the tenth of all pairs of different nouns that only the test split shows together."""
    return a != b and zlib.crc32("|".join(sorted((a, b))).encode()) % 10 == 0


def relation(side: int, a: Placed, b: Placed) -> str | None:
    """Where `a` is, seen from `b`: "left", "right", "above", "below", or None where it is ambiguous."""
    dx = ((a.box[0] + a.box[2]) - (b.box[0] + b.box[2])) / 2 / side
    dy = ((a.box[1] + a.box[3]) - (b.box[1] + b.box[3])) / 2 / side
    if max(abs(dx), abs(dy)) <= RELATION_DISTANCE or max(abs(dx), abs(dy)) < 1.4 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


@lru_cache(maxsize=64)
def _shape_mask(shape: str, side: int, stretch: int) -> Image.Image:
    """The filled shape as an L image, `side` px at its longest; stretch in tenths for rectangle and oval."""
    k = side * 4
    image = Image.new("L", (k, k), 0)
    draw = ImageDraw.Draw(image)
    short = k * 10 // stretch
    if shape == "circle":
        draw.ellipse((0, 0, k - 1, k - 1), 255)
    elif shape == "oval":
        draw.ellipse((0, (k - short) // 2, k - 1, (k + short) // 2), 255)
    elif shape == "square":
        draw.rectangle((0, 0, k, k), 255)
    elif shape == "rectangle":
        draw.rectangle((0, (k - short) // 2, k, (k + short) // 2), 255)
    elif shape == "triangle":
        draw.polygon([(k / 2, 0), (k, k * 0.9), (0, k * 0.9)], 255)
    elif shape == "diamond":
        draw.polygon([(k / 2, 0), (k * 0.85, k / 2), (k / 2, k), (k * 0.15, k / 2)], 255)
    elif shape == "star":
        corners = [(math.pi * i / 5 - math.pi / 2, k / 2 if i % 2 == 0 else k / 5) for i in range(10)]
        draw.polygon([(k / 2 + r * math.cos(t), k / 2 + r * math.sin(t)) for t, r in corners], 255)
    elif shape == "heart":
        turns = [2 * math.pi * i / 60 for i in range(60)]
        points = [
            (
                16 * math.sin(t) ** 3,
                13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t),
            )
            for t in turns
        ]
        draw.polygon([(k / 2 + x * k / 34, k * 0.46 - y * k / 34) for x, y in points], 255)
    else:
        raise ValueError(f"no shape {shape!r}: it must be one of {', '.join(SHAPES)}")
    image = image.resize((side, side), Image.Resampling.BOX)
    return image.crop(image.getbbox())


@lru_cache(maxsize=1)
def _noise_tape() -> NDArray[np.int16]:
    """Normal noise to cut pieces from: drawing it anew for every image would cost more than composing."""
    return (np.random.default_rng(0).normal(0, 1, 1 << 20) * 64).astype(np.int16)


@lru_cache(maxsize=4096)
def _curve(gain: float, lift: int) -> list[int]:
    """The look-up table of x * gain + lift for one channel."""
    return [min(255, max(0, round(i * gain + lift))) for i in range(256)]


Backdrop = Callable[[random.Random, int], NDArray[np.uint8]]  # draws a background [S, S, 3] of a side S in px


@dataclass(frozen=True)
class _Thing:
    """An object to draw: a cut-out (row, index) or a shape of a colour."""

    id: str
    noun: str
    colour: str | None
    index: int  # into the cut-outs; -1 for a shape


class Composer:
    """Holds the cut-outs ready to draw. Immutable after construction; `compose` is a pure function of its arguments."""

    def __init__(self, cutouts: Cutouts) -> None:
        self.cutouts = cutouts
        self._pictures = [Image.fromarray(image) for image in cutouts.images]
        self._means = [
            (image[..., :3] * (image[..., 3:] / 255.0)).sum((0, 1))
            / max(float((image[..., 3] / 255.0).sum()), 1.0)
            for image in cutouts.images
        ]
        self._by_noun: dict[str, list[int]] = {}
        for i, row in enumerate(cutouts.rows):
            self._by_noun.setdefault(row.noun, []).append(i)
        self._by_id = {row.id: i for i, row in enumerate(cutouts.rows)}
        self._names = sorted(self._by_noun)
        self.nouns = nouns_of(cutouts.rows)

    @property
    def names(self) -> list[str]:
        """The cut-outs' nouns, sorted."""
        return self._names

    def row(self, id: str) -> ObjectRow:
        """The table's row of a cut-out."""
        return self.cutouts.rows[self._index(id)]

    def _index(self, id: str) -> int:
        if id not in self._by_id:
            raise ValueError(f"no cut-out {id!r}: ids are in objects.csv")
        return self._by_id[id]

    def compose(
        self,
        seed: int,
        split: Split = "train",
        *,
        objects: int | None = None,
        cutout: str | None = None,
        shapes: bool = True,
        side: int = IMAGE_PX,
        backdrop: Backdrop | None = None,
    ) -> Scene:
        """Scene number `seed` of a split.

        objects: how many, 1..4, or None for a number drawn. cutout: the id of a cut-out that must be the first object.
        shapes: False leaves plain geometric shapes out. side: of the image in px, a multiple of 8. backdrop: draws the
        background in place of the split's painted ones.
        """
        if objects is not None and not 1 <= objects <= MAX_OBJECTS:
            raise ValueError(f"objects={objects}: a scene has 1 to {MAX_OBJECTS} objects")
        if side % GRID:
            raise ValueError(f"side={side}: it must be a multiple of {GRID}")
        # A string seed goes through SHA-512: neighbouring numbers give unrelated scenes.
        rng = random.Random(f"{split}:{seed}:{objects}:{cutout}:{shapes}")
        count = objects or rng.choices((1, 2, 3, 4), (30, 36, 20, 14))[0]
        things = self._choose(rng, split, count, cutout, shapes)
        sprites, owner = self._lay_out(rng, things, side)
        canvas, family = self._backdrop(rng, split, side, things, backdrop)
        for sprite, (x, y) in sprites:
            canvas.paste(sprite, (x, y), sprite)
        image = self._finish(rng, canvas, side)

        placed = []
        for thing, (sprite, (x, y)) in zip(things, sprites, strict=True):
            box = sprite.getchannel("A").getbbox() or (0, 0, 1, 1)
            box = (x + box[0], y + box[1], x + box[2], y + box[3])
            placed.append(Placed(thing.id, thing.noun, thing.colour, box, thing.index < 0))
        order = sorted(range(count), key=lambda i: (placed[i].box[0] + placed[i].box[2], placed[i].box[1], i))
        patches = _patch_grid(owner, order)
        return Scene(seed, split, image, tuple(placed[i] for i in order), family, patches)

    # -- what is in the scene

    def _choose(
        self, rng: random.Random, split: Split, count: int, cutout: str | None, shapes: bool
    ) -> list[_Thing]:
        """Draws the things: their kinds first (pairs must fit the split), then one picture for each."""
        kinds = 1 if count == 1 else rng.choices(range(1, count + 1), [1.1] + [1.0] * (count - 2) + [2.5])[0]
        kinds = min(kinds, len(self._names) + (len(SHAPES) if shapes else 0))
        shapes_only = shapes and cutout is None and rng.random() < 0.08
        first = self.row(cutout).noun if cutout is not None else None
        for attempt in range(1000):
            names: list[str] = [first] if first else []
            while len(names) < kinds:
                name = self._draw_noun(rng, shapes, shapes_only)
                if name not in names:
                    names.append(name)
            pairs = [held_out_pair(a, b) for i, a in enumerate(names) for b in names[:i]]
            if kinds == 1 or (any(pairs) if split == "test" else not any(pairs)):
                break
            if attempt > 100:  # few nouns, or few shapes, may have no pair of this kind
                shapes_only = False
        else:
            if split == "train":  # no pair that is kept for the test split, whatever the table
                names, kinds = names[:1], 1
        copies = [1] * kinds
        for _ in range(count - kinds):
            copies[rng.randrange(kinds)] += 1
        things = []
        for name, n in zip(names, copies, strict=True):
            if cutout is not None and name == first:
                things += [self._thing(self._index(cutout))] * n
            elif name in SHAPES and (name not in self._by_noun or shapes_only or rng.random() < 0.5):
                colour = rng.choice(COLOURS)
                things += [_Thing(f"shape-{name}", name, colour, -1)] * n
            else:
                same = rng.randrange(len(self._by_noun[name]))
                mixed = rng.random() < 0.3
                for _ in range(n):
                    at = rng.randrange(len(self._by_noun[name])) if mixed else same
                    things.append(self._thing(self._by_noun[name][at]))
        return things

    def _draw_noun(self, rng: random.Random, shapes: bool, shapes_only: bool) -> str:
        if shapes_only or not self._names or (shapes and rng.random() < 0.08):
            return rng.choice(SHAPES)
        if rng.random() < 0.5:
            return rng.choice(self._names)
        return self.cutouts.rows[rng.randrange(len(self.cutouts.rows))].noun

    def sprite(self, rng: random.Random, id: str, share: float, side: int) -> Image.Image:
        """A cut-out as scenes show it, RGBA: flipped, turned, colours moved a little; longest side `share * side`."""
        return self._sprite(rng, self._thing(self._index(id)), share, side)

    def _thing(self, index: int) -> _Thing:
        row = self.cutouts.rows[index]
        return _Thing(row.id, row.noun, row.colour or None, index)

    # -- where it is

    def _lay_out(
        self, rng: random.Random, things: list[_Thing], side: int
    ) -> tuple[list[tuple[Image.Image, tuple[int, int]]], NDArray[np.int8]]:
        """Sizes and places such that at least 80 % of every object stays visible; the owner of every pixel."""
        low, high = SCALES[len(things)]
        for attempt in range(12):
            shrink = 1.0 if attempt < 4 else 0.9
            sizes = [rng.uniform(low, high) * shrink for _ in things]
            sprites = [
                self._sprite(rng, thing, size, side) for thing, size in zip(things, sizes, strict=True)
            ]
            places = _places(rng, sprites, side)
            if places is None:
                continue
            owner, visible = _ownership(sprites, places, side)
            if min(visible) >= 0.8:
                return list(zip(sprites, places, strict=True)), owner
        # Too crowded: one object a quarter of the image.
        corners = [(x, y) for x in (0, 1) for y in (0, 1)]
        rng.shuffle(corners)
        sprites = [self._sprite(rng, thing, min(low, 0.4), side, most=0.49) for thing in things]
        places = []
        for sprite, (cx, cy) in zip(sprites, corners, strict=False):
            free_x, free_y = side // 2 - sprite.width, side // 2 - sprite.height
            places.append(
                (
                    cx * side // 2 + rng.randint(0, max(0, free_x)),
                    cy * side // 2 + rng.randint(0, max(0, free_y)),
                )
            )
        owner, _ = _ownership(sprites, places, side)
        return list(zip(sprites, places, strict=True)), owner

    def _sprite(
        self, rng: random.Random, thing: _Thing, share: float, side: int, most: float = 0.97
    ) -> Image.Image:
        """The picture of a thing, RGBA, flipped, sized, turned, and its colours moved a little."""
        longest = share * side
        if thing.index < 0:
            picture = _shape_mask(thing.noun, 96 if side <= 192 else side, rng.randint(14, 24))
            turn = rng.uniform(-12, 12)
        else:
            picture = self._pictures[thing.index]
            turn = rng.uniform(-20, 20)
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.3:
            turn = 0.0
        width, height = picture.size
        # A pen drawn as long as a ball is wide would be two pixels thin: let narrow things be longer.
        longest *= min(1.5, max(1.0, max(width, height) / min(width, height) / 2.2) ** 0.5)
        longest = min(longest, most * side)
        t = math.radians(abs(turn))
        grown = max(
            (width * math.cos(t) + height * math.sin(t)), (height * math.cos(t) + width * math.sin(t))
        ) / max(width, height)
        longest = max(4.0, min(longest, (most * side - 2) / grown))
        scale = longest / max(width, height)
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        if thing.index < 0:
            mask = picture.resize(size, Image.Resampling.BILINEAR)
            rgb = tuple(min(255, max(0, c + rng.randint(-9, 9))) for c in SHAPE_RGB[thing.colour or "red"])
            sprite = Image.new("RGBA", size, (*rgb, 255))
            sprite.putalpha(mask)
            table = None
        else:
            # "reduce" style filters keep small objects sharp; premultiplication is Pillow's own for RGBA.
            sprite = picture.resize(size, Image.Resampling.BICUBIC)
            gain, lift = rng.uniform(0.88, 1.12), rng.uniform(-10, 10)
            table = _curve(round(gain, 2), round(lift))
        if turn:
            sprite = sprite.rotate(turn, Image.Resampling.BILINEAR, expand=True)
        if table is not None:
            sprite = sprite.point(table * 3 + _curve(1.0, 0))
        return sprite

    # -- what is behind it, and the camera

    def _backdrop(
        self,
        rng: random.Random,
        split: Split,
        side: int,
        things: list[_Thing],
        backdrop: Backdrop | None,
    ) -> tuple[Image.Image, str]:
        """A background on which every object stands out in colour."""
        colours = np.stack(
            [
                self._means[t.index] if t.index >= 0 else np.array(SHAPE_RGB[t.colour or "red"], float)
                for t in things
            ]
        )
        large = side + side // 8
        for _ in range(6):
            if backdrop is None:
                index = rng.randrange(POOL)
                draw = cached_background if side == IMAGE_PX else background
                pixels, family = draw(index, split, large)
            else:
                pixels, family = backdrop(rng, large), "given"
            x, y = rng.randint(0, large - side), rng.randint(0, large - side)
            pixels = pixels[y : y + side, x : x + side]
            if rng.random() < 0.5:
                pixels = pixels[:, ::-1]
            if rng.random() < 0.3 and family != "horizon":
                pixels = pixels.transpose(1, 0, 2)
            mean = pixels[::8, ::8].reshape(-1, 3).mean(0)
            if np.abs(colours - mean).sum(1).min() > 110:
                break
        return Image.fromarray(np.ascontiguousarray(pixels)), family

    def _finish(self, rng: random.Random, canvas: Image.Image, side: int) -> NDArray[np.uint8]:
        """Small changes of light and lens; too small to change a colour's name."""
        if rng.random() < 0.3:
            amount = rng.uniform(0.75, 1.2)
            canvas = Image.blend(canvas.convert("L").convert("RGB"), canvas, amount)
        if rng.random() < 0.5:
            gain, middle = rng.uniform(0.88, 1.1), 127 + rng.uniform(-10, 10)
            canvas = canvas.point(_curve(round(gain, 2), round(middle - 127 * gain)) * 3)
        if rng.random() < 0.12:
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9) * side / IMAGE_PX))
        if rng.random() < 0.25:
            strength = rng.uniform(1, 7)
            tape = _noise_tape()
            start = rng.randrange(len(tape) - side * side * 3) if side * side * 3 < len(tape) else 0
            noise = np.resize(tape[start : start + side * side * 3], (side, side, 3))
            scaled = (noise * int(strength * 16)) >> 10
            canvas = Image.fromarray(
                np.clip(np.asarray(canvas).astype(np.int16) + scaled, 0, 255).astype(np.uint8)
            )
        if rng.random() < 0.25:
            buffer = io.BytesIO()
            canvas.save(buffer, "JPEG", quality=rng.randint(40, 95))
            canvas = Image.open(buffer).convert("RGB")
        return np.array(canvas)


def _places(rng: random.Random, sprites: list[Image.Image], side: int) -> list[tuple[int, int]] | None:
    """Top left corners inside the image whose boxes overlap little, or None after enough tries."""
    places: list[tuple[int, int]] = []
    for i, sprite in enumerate(sprites):
        w, h = sprite.size
        for _ in range(25):
            x, y = rng.randint(0, max(0, side - w)), rng.randint(0, max(0, side - h))
            for other, (ox, oy) in zip(sprites[:i], places, strict=True):
                ow, oh = other.size
                overlap = max(0, min(x + w, ox + ow) - max(x, ox)) * max(0, min(y + h, oy + oh) - max(y, oy))
                if overlap > 0.18 * min(w * h, ow * oh):
                    break
            else:
                places.append((x, y))
                break
        else:
            return None
    return places


def _ownership(
    sprites: list[Image.Image], places: list[tuple[int, int]], side: int
) -> tuple[NDArray[np.int8], list[float]]:
    """The topmost object at every pixel (-1: none), and the visible share of every object."""
    owner = np.full((side, side), -1, np.int8)
    areas = []
    for i, (sprite, (x, y)) in enumerate(zip(sprites, places, strict=True)):
        mask = np.asarray(sprite.getchannel("A")) > 127
        owner[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = i
        areas.append(max(1, int(np.count_nonzero(mask))))
    counts = np.bincount((owner + 1).ravel(), minlength=len(sprites) + 1)[1:]
    return owner, [float(counts[i]) / areas[i] for i in range(len(sprites))]


def _patch_grid(owner: NDArray[np.int8], order: list[int]) -> NDArray[np.int8]:
    """[side, side] owners -> [8, 8]; position of the owner in `order`, -1 where none covers 30 % of the patch."""
    patch = owner.shape[0] // GRID
    tiles = owner.reshape(GRID, patch, GRID, patch)
    shares = np.stack([(tiles == i).mean((1, 3)) for i in order])  # [n, 8, 8]
    return np.where(shares.max(0) >= 0.3, shares.argmax(0), -1).astype(np.int8)
