"""The stored pictures: drawn the same every time, a shard complete or absent, facts that come back as they were."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stem import tiny_stem_tensors

from blip2.modeling.stem import Stem
from default_model import features
from default_model.features import (
    Bank,
    Facts,
    Painter,
    Pixels,
    make_features,
    names_of,
    scene_of,
    stem_pixels,
)
from default_model.kinds import Kind
from default_model.scenes import IMAGE_PX, Composer
from default_model.stem import IMAGE_PX as STEM_PX
from default_model.stem import build_stem


@pytest.fixture(scope="module")
def stem() -> Stem:
    return build_stem(tiny_stem_tensors())


@pytest.fixture
def painter(composer: Composer, tmp_path: Path) -> Painter:
    """Draws the few cut-outs of the tests on two photographs."""
    (tmp_path / "photographs").mkdir()
    noise = np.random.default_rng(0)
    for number in range(2):
        image = Image.fromarray(noise.integers(0, 256, (90, 120, 3), np.uint8))
        image.save(tmp_path / "photographs" / f"{number}.jpg")
    painter = Painter(tmp_path)
    painter.__dict__["sizes"] = {IMAGE_PX: composer, STEM_PX: composer}
    painter.__dict__["everything"] = composer
    return painter


@pytest.mark.parametrize("kind", ["scene", "varied", "photograph", "pasted"])
def test_the_same_picture_twice_is_the_same(painter: Painter, kind: Kind) -> None:
    (image, facts), (again, same), (other, _) = (painter.draw(kind, i) for i in (3, 3, 4))
    assert np.array_equal(image, again) and facts == same
    assert image.shape != other.shape or not np.array_equal(image, other)


def test_a_pasted_cut_out_is_what_its_facts_say(painter: Painter) -> None:
    rows = {(row.noun, row.colour) for row in painter.gallery.cutouts.rows}
    assert rows and all(row.source != "openmoji" for row in painter.gallery.cutouts.rows)
    drawn = [painter.draw("pasted", i) for i in range(12)]
    assert all((facts["noun"], facts["colour"]) in rows for _, facts in drawn)
    assert {facts["many"] for _, facts in drawn} == {True, False}
    assert all(image.shape == (STEM_PX, STEM_PX, 3) for image, _ in drawn)


def test_specimens_are_of_every_cut_out_in_turn(painter: Painter, composer: Composer) -> None:
    rows = composer.cutouts.rows
    for i in range(len(rows)):
        image, cells, noun = painter.specimen(i)
        assert image.shape == (STEM_PX, STEM_PX, 3) and cells.shape == (8, 8) and cells.any()
        assert noun == rows[i].noun


def test_varied_scenes_stand_on_photographs_and_on_patterns(painter: Painter) -> None:
    drawn = [painter.draw("varied", i) for i in range(20)]
    assert {len(facts["objects"]) for _, facts in drawn} == {1, 2, 3, 4}
    assert {image.shape[0] for image, _ in drawn} == {IMAGE_PX, STEM_PX}
    backdrops = [painter._backdrop(random.Random(i), 64) for i in range(20)]
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in backdrops)
    assert len({image.tobytes() for image in backdrops}) == 20


def test_scenes_come_back_as_they_were(painter: Painter) -> None:
    image, facts = painter.draw("scene", 2)
    scene = scene_of(facts)
    again = painter.sizes[scene.side].compose
    rng = random.Random("bank scene 2")
    rng.random()  # the size
    composed = again(rng.getrandbits(48), "train", objects=len(scene.objects), side=scene.side)
    assert np.array_equal(composed.image, image)
    assert scene.objects == composed.objects
    assert np.array_equal(scene.patch_object, composed.patch_object)
    assert scene.side == image.shape[0]


def test_names_come_back_by_number() -> None:
    assert names_of({"names": [[7, 0.5], [2, 0.25]]}) == {7: 0.5, 2: 0.25}


def test_pixels_are_what_the_stem_takes() -> None:
    white = np.full((IMAGE_PX, IMAGE_PX, 3), 255, np.uint8)
    pixels = stem_pixels([white, np.zeros((STEM_PX, STEM_PX, 3), np.uint8)])
    assert pixels.shape == (2, 3, STEM_PX, STEM_PX)
    assert (pixels[0] == 1).all() and (pixels[1] == -127 / 128).all()


class Plain:
    """Draws small pictures of one colour each, and counts them."""

    drawn = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def draw(self, kind: Kind, i: int) -> tuple[Pixels, Facts]:
        Plain.drawn += 1
        return np.full((64, 64, 3), 40 * i, np.uint8), {"number": i}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHARD": 2, "KEPT_NAMES": 3, "Painter": Plain}.items():
        monkeypatch.setattr(features, name, value)
    monkeypatch.setattr(Plain, "drawn", 0)


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_complete_or_absent(stem: Stem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for last in (
        "save_file",
        "write_file",
    ):  # the cells are written first, the facts then tell that all is there
        with monkeypatch.context() as patch:
            patch.setattr(features, last, killed)
            with pytest.raises(KeyboardInterrupt):
                make_features(tmp_path, stem, "photograph", 3)
        assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.unfinished"))
        assert len(list(tmp_path.rglob("*.safetensors"))) == (last == "write_file")
        with pytest.raises(FileNotFoundError, match="run the stage features"):
            Bank(tmp_path, "photograph")
    Plain.drawn = 0
    make_features(tmp_path, stem, "photograph", 3)
    assert Plain.drawn == 3
    make_features(tmp_path, stem, "photograph", 3)
    assert Plain.drawn == 3  # nothing is missing
    bank = Bank(tmp_path, "photograph")
    assert [row["number"] for row in bank.facts] == [0, 1, 2] and len(bank) == 3
    assert all(len(row["names"]) == 3 for row in bank.facts)
    white = stem_pixels([np.full((64, 64, 3), 80, np.uint8)])
    torch.testing.assert_close(bank.cells(2), stem.readout(*stem.maps(white))[0], rtol=1e-2, atol=1e-2)
    assert not torch.equal(bank.cells(0), bank.cells(1))
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*-*.*")}) == 1


@pytest.mark.usefixtures("small_shards")
def test_two_processes_share_the_shards(stem: Stem, tmp_path: Path) -> None:
    make_features(tmp_path, stem, "scene", 5, (1, 2))
    assert [path.name for path in tmp_path.rglob("*.json")] == ["scene-0001.json"]
    make_features(tmp_path, stem, "scene", 5, (0, 2))
    bank = Bank(tmp_path, "scene")
    assert [row["number"] for row in bank.facts] == [0, 1, 2, 3, 4]
    assert all("names" not in row for row in bank.facts)
