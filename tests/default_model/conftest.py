"""A composer over a handful of drawn cut-outs, and a tiny run of training: nothing has to be downloaded."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from blip2.stemfiles import STEM_FILE
from default_model import batches
from default_model.batches import Tokenizers
from default_model.easyvqa import EasyImage
from default_model.evidence import EVIDENCE_FILE
from default_model.language import Language, language_of
from default_model.materials import Cutouts, ObjectRow
from default_model.namer import CODE, Names
from default_model.scenes import Composer
from default_model.vocab import save_language, save_matcher, train_language, train_matcher

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


@pytest.fixture(scope="session")
def words(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = list(islice(language.text_corpus(random.Random(0)), 500))
    for name in ("language", "matcher"):
        (folder / f"tokenizer-{name}").mkdir()
    save_language(train_language(iter(text), language), folder / "tokenizer-language")
    save_matcher(train_matcher(iter(text), language), folder / "tokenizer-matcher")
    return Tokenizers.load(folder)


@pytest.fixture(scope="session")
def names() -> Names:
    """Three classes, one of them a breed, and the nouns of the drawn cut-outs."""
    learned = ("apple", "bear", "bus", "mouse", "orange", "scissors", "teddy bear")
    return Names(("bear", "bear", "bus", *learned), ("polar bear", "", "", *[""] * 7), learned)


FACTS = {
    "easy": [{"easy": 0}, {"easy": 1}],
    "photograph": [{"names": [[0, 0.7], [2, 0.2]]}, {"names": [[4, 0.03], [2, 0.03]]}],
    "pasted": [{"noun": "apple", "colour": "red", "many": False, "names": [[2, 0.9]]}],
}


@pytest.fixture(scope="session")
def stored_run(composer: Composer, names: Names, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose stages names and features are done: random cells, a few pictures of each kind."""
    folder, generator = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(0)
    (folder / "features").mkdir()
    scenes = [composer.compose(number, objects=1 + number % 4) for number in range(6)]
    facts = FACTS | {
        "scene": [
            {
                "side": scene.side,
                "patch": scene.patch_object.tolist(),
                "objects": [[o.id, o.noun, o.colour, list(o.box), o.is_shape] for o in scene.objects],
            }
            for scene in scenes
        ]
    }
    for kind, rows in facts.items():
        cells = torch.randn(len(rows), 768, 8, 8, generator=generator).half()
        save_file({"cells": cells}, folder / "features" / f"{kind}-0000.safetensors")
        (folder / "features" / f"{kind}-0000.json").write_text(json.dumps(rows))
    matrix = torch.randn(CODE, len(names.nouns), generator=generator).half()
    save_file({"readout.evidence.weight": matrix}, folder / STEM_FILE)
    everything = list(range(len(names.nouns)))
    alike = [[other for other in everything if other != name] for name in everything]
    content = {"alike": alike, "patterns": [[[0.8, 0.1], [0.05, 0.02]], [[0.03, 0.02], [0.02, 0.01]]]}
    (folder / EVIDENCE_FILE).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run_folder(stored_run: Path, language: Language, names: Names, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`stored_run`, with the language of the drawn cut-outs as the standard one."""
    black = np.zeros((64, 64, 3), np.uint8)
    easy = [
        EasyImage(
            black, (("what color is the circle?", "teal"), ("is there a circle?", "yes")), "a teal circle"
        ),
        EasyImage(black, (("what shape is it?", "triangle"), ("is there a circle?", "no")), "a triangle"),
    ]
    monkeypatch.setattr(batches, "standard", lambda: language)
    monkeypatch.setattr(batches, "standard_names", lambda: names)
    monkeypatch.setattr(batches.easyvqa, "load", lambda folder, split: easy)
    return stored_run
