"""Backgrounds generated from numbers alone: plain colours, gradients, noise and textures.

`background(index, split, side)` is pure. Some families, and a band of hues, are kept for the test split.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Painter = Callable[[np.random.Generator, int, "Palette"], Array]

POOL = 1500  # different backgrounds of a split, before crops, flips and brightness
TEST_HUES = (0.44, 0.56)  # turns: cyan and teal, the only hues of training's families in the test split


class Palette:
    """Draws RGB colours in 0..255 for one background, in the hues its split may use."""

    def __init__(self, rng: np.random.Generator, held_out: bool) -> None:
        self.rng, self.held_out = rng, held_out
        self.base = self._hue()

    def _hue(self) -> float:
        low, high = TEST_HUES
        if self.held_out:
            return float(self.rng.uniform(low, high))
        return float((high + self.rng.uniform(0, 1 - (high - low))) % 1)

    def draw(self) -> Array:
        """A colour; near the base hue half of the time, pale or dull more often than bright."""
        hue = self.base if self.held_out or self.rng.random() < 0.5 else self._hue()
        style = self.rng.random()
        if style < 0.25 and not self.held_out:  # gray, white, black
            saturation, value = self.rng.uniform(0, 0.06), self.rng.uniform(0.05, 1)
        elif style < 0.65:
            saturation, value = self.rng.uniform(0.1, 0.45), self.rng.uniform(0.6, 1)
        else:
            saturation, value = self.rng.uniform(0.3, 0.95), self.rng.uniform(0.2, 0.95)
        return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255

    def near(self, colour: Array, spread: float = 22) -> Array:
        """A colour a little lighter or darker than `colour`."""
        step = self.rng.normal(0, spread) + self.rng.normal(0, spread / 4, 3)
        return np.clip(colour + step, 0, 255).astype(np.float32)

    def pair(self) -> tuple[Array, Array]:
        """Two colours, often close to each other so that the pattern stays behind the objects."""
        first = self.draw()
        return first, self.near(first, 35) if self.rng.random() < 0.6 else self.draw()


def _grid(side: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return x, y


def _turned(rng: np.random.Generator, side: int, right_angles: bool = False) -> tuple[Array, Array]:
    x, y = _grid(side)
    angle = rng.integers(0, 2) * np.pi / 2 if right_angles else rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s, y * c - x * s


def _mix(a: Array, b: Array, amount: Array) -> Array:
    return a + (b - a) * amount[..., None]


def _noise(rng: np.random.Generator, side: int, cells: tuple[int, int], octaves: int = 3) -> Array:
    """Smooth noise in 0..1: small random grids, enlarged and added."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        size = (max(2, cells[1] * 2**octave), max(2, cells[0] * 2**octave))
        small = Image.fromarray(rng.random(size, np.float32))
        total += np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def plain(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    return np.broadcast_to(palette.draw(), (side, side, 3)).copy()


def linear(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    u, _ = _turned(rng, side)
    u = (u - u.min()) / (u.max() - u.min())
    return _mix(palette.draw(), palette.draw(), u ** np.float32(rng.uniform(0.6, 1.6)))


def radial(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    x, y = _grid(side)
    d = np.hypot(x - np.float32(rng.uniform(0, 1)), y - np.float32(rng.uniform(0, 1)))
    return _mix(palette.draw(), palette.draw(), np.clip(d / rng.uniform(0.6, 1.3), 0, 1).astype(np.float32))


def clouds(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    cells = int(rng.integers(2, 7))
    a, b = palette.pair()
    return _mix(a, b, _noise(rng, side, (cells, cells), int(rng.integers(1, 5))))


def blocks(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    n = int(rng.integers(2, 14))
    a, b = palette.pair()
    amount = Image.fromarray(rng.random((n, n), np.float32)).resize((side, side), Image.Resampling.NEAREST)
    return _mix(a, b, np.asarray(amount))


def stripes(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    u, _ = _turned(rng, side)
    wave = u * rng.uniform(3, 16) % 1
    a, b = palette.pair()
    return _mix(a, b, (wave < rng.uniform(0.25, 0.75)).astype(np.float32))


def checks(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    u, v = _turned(rng, side, right_angles=bool(rng.random() < 0.6))
    n = rng.uniform(3, 12)
    a, b = palette.pair()
    return _mix(a, b, ((np.floor(u * n) + np.floor(v * n)) % 2).astype(np.float32))


def dots(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    u, v = _turned(rng, side)
    n = rng.uniform(4, 12)
    d = np.hypot(u * n % 1 - 0.5, v * n % 1 - 0.5)
    a, b = palette.pair()
    return _mix(a, b, np.clip((rng.uniform(0.15, 0.4) - d) * 12, 0, 1).astype(np.float32))


def bricks(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    x, y = _grid(side)
    rows = int(rng.integers(5, 14))
    row = np.floor(y * rows)
    across = x * rows / 2 + (row % 2) / 2
    joint = rng.uniform(0.05, 0.14)
    mortar = (y * rows % 1 < joint) | (across % 1 < joint / 2)
    shade = rng.random((rows + 1, rows + 2), np.float32)[
        row.astype(int), np.floor(across).astype(int) % (rows + 2)
    ]
    brick = palette.draw()
    image = _mix(brick, palette.near(brick, 40), shade)
    return np.where(mortar[..., None], palette.near(palette.draw(), 10), image).astype(np.float32)


def wood(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    _, y = _grid(side)
    grain = _noise(rng, side, (2, int(rng.integers(8, 20))), 2)
    planks = int(rng.integers(2, 7))
    lines = np.abs(y * planks % 1 - 0.5) > 0.5 - 0.02 * planks / 2
    tone = palette.near(palette.draw(), 10)
    ripple = (np.sin((grain * rng.uniform(2, 6) + y * planks) * 6.28) + 1) / 2
    image = _mix(tone, palette.near(tone, 25), ripple.astype(np.float32))
    image = np.where(lines[..., None], image * 0.7, image)
    return (image if rng.random() < 0.5 else image.transpose(1, 0, 2)).astype(np.float32)


def grass(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    blades = _noise(rng, side, (int(rng.integers(25, 50)), int(rng.integers(4, 10))), 2)
    a, b = palette.pair()
    return _mix(a, b, blades)


def horizon(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    """Ground below, sky above: the background of most photographs."""
    _, y = _grid(side)
    line = rng.uniform(0.35, 0.8) + 0.06 * (_noise(rng, side, (3, 2), 2)[0] - 0.5)[None]
    sky_tone, ground_tone = palette.draw(), palette.draw()
    sky = _mix(sky_tone, palette.near(sky_tone, 40), y)
    ground = _mix(ground_tone, palette.near(ground_tone, 30), _noise(rng, side, (8, 16), 2))
    return np.where((y > line)[..., None], ground, sky).astype(np.float32)


def speckle(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    a, b = palette.pair()
    return _mix(a, b, rng.random((side, side), np.float32) ** 2)


def rings(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    x, y = _grid(side)
    d = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1)) * rng.uniform(4, 14)
    a, b = palette.pair()
    return _mix(a, b, (d % 1 < 0.5).astype(np.float32))


def zigzag(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    u, v = _turned(rng, side)
    n = rng.uniform(4, 10)
    wave = (v * n + np.abs(u * n % 1 - 0.5) * rng.uniform(0.8, 2)) % 1
    a = palette.draw()
    b = palette.near(a, 35)
    return _mix(a, b, (wave < 0.5).astype(np.float32))


def bokeh(rng: np.random.Generator, side: int, palette: Palette) -> Array:
    x, y = _grid(side)
    image = linear(rng, side, palette)
    for _ in range(int(rng.integers(6, 16))):
        d = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1))
        disc = np.clip((rng.uniform(0.05, 0.2) - d) * 25, 0, 1) * rng.uniform(0.2, 0.6)
        image = _mix(image, palette.draw(), disc.astype(np.float32))
    return image


TRAIN_FAMILIES: tuple[Painter, ...] = (
    plain, linear, radial, clouds, blocks, stripes, checks, dots, bricks, wood, grass, horizon, speckle,
)  # fmt: skip
TEST_FAMILIES: tuple[Painter, ...] = (rings, zigzag, bokeh)


def background(index: int, split: str, side: int) -> tuple[NDArray[np.uint8], str]:
    """Background number `index` of a split -> ([side, side, 3], family name)."""
    rng = np.random.default_rng([index, split == "test"])
    if split == "test" and index % 4:  # three of four in families that training never shows
        family, held_out = TEST_FAMILIES[index % len(TEST_FAMILIES)], False
    else:
        # More plain colours and gradients, as in users' clean pictures.
        place = int(rng.integers(0, len(TRAIN_FAMILIES) + 5))
        family = TRAIN_FAMILIES[
            place if place < len(TRAIN_FAMILIES) else (0, 0, 1, 2, 3)[place - len(TRAIN_FAMILIES)]
        ]
        held_out = split == "test"
    image = family(rng, side, Palette(rng, held_out))
    return np.clip(image, 0, 255).astype(np.uint8), family.__name__


# Drawing one takes a few milliseconds; a process draws each of a pool once and then cuts new crops from it.
cached_background = lru_cache(maxsize=POOL)(background)
