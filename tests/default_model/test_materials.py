from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from default_model import easyvqa, materials
from default_model.colours import COLOURS, SHAPE_RGB, dominant, name_pixels
from default_model.materials import Cutouts, rasterise, read_table


def test_the_table_is_sound() -> None:
    rows = read_table()
    assert len(rows) == len({row.id for row in rows}) > 800
    grammar = {(row.noun, row.plural, row.article, row.category) for row in rows}
    # a noun has one plural, article and category
    assert len(grammar) == len({row.noun for row in rows}) > 400
    forms: dict[str, str] = {}
    for noun, plural, article, category in grammar:
        assert noun == noun.strip().lower() and plural and category
        assert article in ("a", "an") or article.endswith(" of")
        for form in {noun, plural}:
            assert forms.setdefault(form, noun) == noun, form  # no word means two things
    assert {row.colour for row in rows} == {"", *COLOURS}
    assert {row.source for row in rows} == {"stamps", "openmoji"}


def test_shape_colours_have_their_names() -> None:
    for name, rgb in SHAPE_RGB.items():
        jittered = np.array(rgb)[None] + np.array([[0, 0, 0], [9, 9, 9], [-9, -9, -9]])
        assert [COLOURS[i] for i in name_pixels(np.clip(jittered, 0, 255).astype(np.uint8))] == [name] * 3


def test_dominant_colour() -> None:
    image = np.zeros((10, 10, 4), np.uint8)
    assert dominant(image) == ""
    image[:8] = (200, 20, 20, 255)
    image[8:] = (10, 10, 10, 255)  # an outline
    assert dominant(image) == "red"
    image[:4] = (20, 40, 220, 255)
    assert dominant(image) == ""


def test_cutting_out_keeps_hidden_colour_out_of_edges(tmp_path: Path) -> None:
    pixels = np.zeros((200, 300, 4), np.uint8)
    pixels[..., 1] = 255  # green, fully transparent
    pixels[50:150, 60:260] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    cut = np.asarray(rasterise(tmp_path / "x.png", 96))
    assert cut.shape == (48, 96, 4)
    assert cut[cut[..., 3] > 0][:, 1].max() == 0
    Image.new("RGBA", (5, 5), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="empty"):
        rasterise(tmp_path / "empty.png", 96)


def test_saved_cutouts_load_unchanged(
    tmp_path: Path, cutouts: Cutouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutouts.save(tmp_path / "cutouts.npz")
    with pytest.raises(ValueError, match=r"objects\.csv"):
        Cutouts.load(tmp_path)
    monkeypatch.setattr(materials, "read_table", lambda: list(cutouts.rows))
    again = Cutouts.load(tmp_path)
    assert again.rows == cutouts.rows
    assert all(np.array_equal(a, b) for a, b in zip(again.images, cutouts.images, strict=True))


def test_easy_vqa(tmp_path: Path) -> None:
    root = tmp_path / "easy_vqa/data/train"
    (root / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(root / "images" / f"{i}.png")
    rows = [["what is the teal shape?", "circle", 1], ["is there a red shape?", "yes", 0]]
    (root / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    first, second = easyvqa.load(tmp_path, "train")
    assert first.image.shape == (64, 64, 3) and second.image[0, 0, 0] == 1
    assert second.questions == (("what is the teal shape?", "circle"),)
    assert (first.caption, second.caption) == ("a red shape", "a teal circle")
    assert (
        easyvqa.caption([("is there not a green shape?", "no"), ("is no circle present?", "no")])
        == "a green circle"
    )
    assert (
        easyvqa.caption([("is there not a green shape?", "yes"), ("is there a circle?", "no")]) == "a shape"
    )
