"""Colour names: of a pixel, and of a whole cut-out if one colour dominates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")

# Typical sRGB values, used to paint plain shapes; each is well inside its own region of `name_pixels`.
SHAPE_RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 34),
    "orange": (246, 134, 18),
    "yellow": (248, 220, 30),
    "green": (40, 160, 56),
    "blue": (36, 80, 210),
    "purple": (126, 40, 176),
    "pink": (250, 130, 186),
    "brown": (122, 74, 36),
    "black": (18, 18, 20),
    "white": (248, 248, 248),
    "gray": (132, 132, 134),
}


def name_pixels(rgb: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Index into COLOURS for every pixel of [..., 3]; -1 where no single name fits (cyan, skin, olive...)."""
    x = rgb.astype(np.float32) / 255
    value, low = x.max(-1), x.min(-1)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-6)
    safe = np.maximum(chroma, 1e-6)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    hue = (
        np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
        * 60
    )

    out = np.full(value.shape, -1, np.int8)

    def paint(name: str, mask: NDArray[np.bool_]) -> None:
        out[mask] = COLOURS.index(name)

    paint("red", ((hue < 12) | (hue >= 345)) & (saturation >= 0.5))
    paint("pink", ((hue < 12) | (hue >= 345)) & (saturation < 0.5) & (value > 0.75))
    paint("pink", (hue >= 300) & (hue < 345) & (value > 0.6))
    paint("purple", (hue >= 255) & (hue < 300))
    paint("purple", (hue >= 300) & (hue < 345) & (value <= 0.6))
    paint("blue", (hue >= 195) & (hue < 255))
    paint("green", (hue >= 66) & (hue < 165))
    paint("yellow", (hue >= 44) & (hue < 66) & (value > 0.6) & (saturation > 0.3))
    paint("orange", (hue >= 12) & (hue < 44) & (value > 0.7) & (saturation > 0.6))
    paint("brown", (hue >= 8) & (hue < 44) & (value <= 0.7) & (saturation > 0.25))
    paint("brown", ((hue < 12) | (hue >= 345)) & (value < 0.35) & (saturation > 0.3))
    paint("gray", (saturation < 0.14) & (value <= 0.84))
    paint("white", (saturation < 0.14) & (value > 0.84))
    paint("black", (value < 0.22) | ((value < 0.3) & (saturation < 0.3)))
    return out


def dominant(rgba: NDArray[np.uint8], outlined: bool = False) -> str:
    """The name of the colour most of a cut-out has, "" without one. rgba: [H, W, 4], not premultiplied.

    Black outlines of drawings do not count: a red apple drawn with a pen is red. `outlined` says that the cut-out
    is such a drawing, so that only an almost black one is black.
    """
    names = name_pixels(rgba[..., :3])[rgba[..., 3] > 128]
    if not len(names):
        return ""
    counts = np.bincount(names + 1, minlength=len(COLOURS) + 1)[1:] / len(names)
    black = COLOURS.index("black")
    if counts[black] < (0.8 if outlined else 0.5):
        best = int(np.argmax(np.where(np.arange(len(COLOURS)) == black, 0, counts)))
        share = counts[best] / (1 - counts[black])
    else:
        best, share = black, counts[black]
    return COLOURS[best] if share >= 0.65 and counts[best] >= (0.3 if outlined else 0.5) else ""
