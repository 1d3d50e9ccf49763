from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from default_model import easyvqa, materials
from default_model.colours import COLOURS, SHAPE_RGB, dominant, name_pixels
from default_model.materials import (
    PICTURES,
    ROOTS,
    TABLE,
    Cutouts,
    build_pictures,
    rasterise,
    read_table,
    soften,
)

# The people of Scratch whose pictures are kept for measuring; none of their poses is trained on.
HELD_BACK = ("dan", "mako", "marissa", "sam", "thai", "referee")


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


def test_pictures_have_the_grammar_of_the_other_tables() -> None:
    rows = read_table(PICTURES)
    assert 600 < len(rows) < 1400
    ids = [row.id for row in rows + read_table()]
    assert len(ids) == len(set(ids))
    with TABLE.with_name("imagenet.csv").open(encoding="utf-8", newline="") as file:
        known = {
            (row["noun"], row["plural"], row["article"], row["category"]) for row in csv.DictReader(file)
        }
    known |= {(row.noun, row.plural, row.article, row.category) for row in read_table()}
    grammar = known | {(row.noun, row.plural, row.article, row.category) for row in rows}
    assert len(grammar) == len({noun for noun, *_ in grammar})
    assert {category for *_, category in grammar} == {category for *_, category in known}
    forms: dict[str, str] = {}
    for noun, plural, article, _category in grammar:
        for form in {noun, plural}:
            assert forms.setdefault(form, noun) == noun, form  # no word means two things
        assert re.fullmatch(r"an?|an? [a-z]+ of", article), noun
    assert 40 <= len(grammar - known) <= 70
    wanted = {"woman", "boy", "girl", "baby", "person", "shorts", "melon", "hand", "sushi", "rice", "coin"}
    assert wanted <= {noun for noun, *_ in grammar - known}
    assert {row.colour for row in rows} == {"", *COLOURS}
    assert {row.source for row in rows} == {"fluent", "scratch", "sweethome"} <= set(ROOTS)
    # the colour of a cut-out person would be that of the clothes or of the skin
    assert {row.colour for row in rows if row.category in ("person", "body part")} == {""}


def test_people_kept_for_measuring_are_not_among_the_pictures() -> None:
    shown = [row.file for row in read_table(PICTURES) if row.source == "scratch"]
    assert sum("People/" in file for file in shown) > 30
    assert not [file for file in shown if Path(file).name.startswith(HELD_BACK)]


def test_all_or_nothing_edges_become_gradual_inwards() -> None:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[10:30, 10:30] = (200, 20, 20, 255)
    alpha = np.asarray(soften(Image.fromarray(pixels)))[..., 3]
    assert alpha[20, 20] == 255 and alpha[20, 9] == 0 and 0 < alpha[20, 10] < 255
    gradual = np.array(pixels)
    gradual[9, 10:30] = (200, 20, 20, 128)
    assert np.array_equal(np.asarray(soften(Image.fromarray(gradual))), gradual)


def test_pictures_are_enlarged_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        materials.ObjectRow("s", "scratch", "People/s.gif", "woman", "women", "a", "", "person"),
        materials.ObjectRow("h", "sweethome", "Set/set/h.png", "chair", "chairs", "a", "", "household item"),
    ]
    (tmp_path / ROOTS["scratch"] / "People").mkdir(parents=True)
    small = Image.new("RGBA", (60, 50), (0, 0, 0, 0))
    small.paste((250, 0, 0, 255), (10, 10, 50, 30))
    small.save(tmp_path / ROOTS["scratch"] / "People/s.gif")
    (tmp_path / ROOTS["sweethome"]).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / ROOTS["sweethome"] / "Set.sh3f", "w") as archive:
        content = io.BytesIO()
        Image.new("RGBA", (300, 150), (0, 0, 250, 255)).save(content, "PNG")
        archive.writestr("set/h.png", content.getvalue())
    monkeypatch.setattr(materials, "read_table", lambda table: rows if table == PICTURES else [])
    pictures = build_pictures(tmp_path)
    assert [max(image.shape[:2]) for image in pictures.images] == [80, 224]
    assert [tuple(image[image.shape[0] // 2, image.shape[1] // 2]) for image in pictures.images] == [
        (250, 0, 0, 255),
        (0, 0, 250, 255),
    ]
    pictures.save(tmp_path / "pictures.npz")
    assert Cutouts.load(tmp_path / "pictures.npz", PICTURES).rows == tuple(rows)


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
    monkeypatch.setattr(materials, "read_table", lambda table: list(cutouts.rows))
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
