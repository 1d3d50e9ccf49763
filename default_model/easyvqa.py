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

    caption follows from the answers: "a blue rectangle", or "a rectangle" or "a blue shape" if they reveal no more.
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
        pairs = tuple(questions.get(index, ()))
        loaded.append(EasyImage(image, pairs, caption(pairs)))
    return loaded


def caption(questions: Iterable[tuple[str, str]]) -> str:
    """The caption of an image's one shape, as far as its questions and answers reveal it."""
    known: dict[str, str] = {}
    for question, answer in questions:
        words = set(question.rstrip("?").split())
        for kind, values in (("shape", SHAPES), ("colour", COLOURS)):
            if answer in values:
                known[kind] = answer
            named = words & set(values)
            # "is there (not) a red shape?" reveals it if there is one; "what color is the circle?" always does.
            true = answer not in ("yes", "no") or (answer == "yes") == words.isdisjoint(("not", "no"))
            if named and true:
                known[kind] = next(iter(named))
    return " ".join(["a", *([known["colour"]] if "colour" in known else []), known.get("shape", "shape")])
