"""easy-VQA (PyPI `easy-vqa`, MIT licence): 64 px images of one plain shape each, with questions and answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class EasyImage:
    """image is [64, 64, 3] uint8; questions are (question, answer) as published.

    caption is read off the answers: "a blue rectangle", or "a rectangle" or "a blue shape" where they tell no more.
    """

    image: NDArray[np.uint8]
    questions: tuple[tuple[str, str], ...]
    caption: str


def load(folder: Path | str, split: Literal["train", "test"]) -> list[EasyImage]:
    """Reads DIR/easy_vqa, as `default_model.materials` unpacks it; in the order of the published numbers."""
    root = Path(folder) / "easy_vqa/data" / split
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, index in json.loads((root / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(index, []).append((question, answer))
    loaded = []
    for index in range(len(list((root / "images").glob("*.png")))):
        image = np.array(Image.open(root / "images" / f"{index}.png").convert("RGB"))
        asked = tuple(questions.get(index, ()))
        loaded.append(EasyImage(image, asked, caption(asked)))
    return loaded


def caption(questions: Iterable[tuple[str, str]]) -> str:
    """What the one shape in an image is, as far as its questions and answers tell."""
    found: dict[str, str] = {}
    for question, answer in questions:
        words = set(question.rstrip("?").split())
        for kind, values in (("shape", SHAPES), ("colour", COLOURS)):
            if answer in values:
                found[kind] = answer
            named = words & set(values)
            # "is there (not) a red shape?" tells when it says that there is; "what color is the circle?" always does.
            told = answer not in ("yes", "no") or (answer == "yes") == words.isdisjoint(("not", "no"))
            if named and told:
                found[kind] = next(iter(named))
    return " ".join(["a", *([found["colour"]] if "colour" in found else []), found.get("shape", "shape")])
