"""A composer over a handful of drawn cut-outs, so that nothing has to be downloaded."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from default_model.language import Language, language_of
from default_model.materials import Cutouts, ObjectRow
from default_model.scenes import Composer

ROWS = (
    ObjectRow("a1", "stamps", "a1.png", "apple", "apples", "an", "red", "fruit"),
    ObjectRow("a2", "stamps", "a2.png", "apple", "apples", "an", "green", "fruit"),
    ObjectRow("b1", "stamps", "b1.png", "bear", "bears", "a", "brown", "animal"),
    ObjectRow("b2", "stamps", "b2.png", "teddy bear", "teddy bears", "a", "", "toy"),
    ObjectRow("c1", "stamps", "c1.png", "scissors", "scissors", "a pair of", "gray", "tool"),
    ObjectRow("d1", "openmoji", "d1.svg", "mouse", "mice", "a", "", "animal"),
    ObjectRow("e1", "openmoji", "e1.svg", "bus", "buses", "a", "yellow", "vehicle"),
    ObjectRow("f1", "openmoji", "f1.svg", "orange", "oranges", "an", "orange", "fruit"),
)
PAINTS = ("red", "green", "brown", "tan", "gray", "silver", "gold", "orange")


def _drawn(paint: str, width: int, height: int) -> np.ndarray:
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((0, 0, width - 1, height - 1), paint)
    return np.asarray(image)


@pytest.fixture(scope="session")
def cutouts() -> Cutouts:
    sizes = ((96, 90), (90, 96), (96, 60), (50, 96), (96, 30), (96, 70), (96, 50), (96, 96))
    return Cutouts(ROWS, tuple(_drawn(p, w, h) for p, (w, h) in zip(PAINTS, sizes, strict=True)))


@pytest.fixture(scope="session")
def composer(cutouts: Cutouts) -> Composer:
    return Composer(cutouts)


@pytest.fixture(scope="session")
def language(cutouts: Cutouts) -> Language:
    return language_of(cutouts.rows)
