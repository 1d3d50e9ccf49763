from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from default_model.backgrounds import TEST_FAMILIES, TRAIN_FAMILIES, background
from default_model.materials import Cutouts
from default_model.scenes import (
    MAX_OBJECTS,
    SHAPES,
    Composer,
    Placed,
    Scene,
    _patch_grid,
    held_out_pair,
    relation,
)


def scenes(composer: Composer, split: str, count: int = 150) -> list[Scene]:
    return [composer.compose(seed, split) for seed in range(count)]  # type: ignore[arg-type]


def test_the_same_number_gives_the_same_scene(composer: Composer, cutouts: Cutouts) -> None:
    other = Composer(cutouts)
    for seed in range(20):
        a, b = composer.compose(seed), other.compose(seed)
        assert np.array_equal(a.image, b.image) and a.objects == b.objects
        assert np.array_equal(a.patch_object, b.patch_object)
    assert not np.array_equal(composer.compose(0).image, composer.compose(1).image)
    assert not np.array_equal(composer.compose(0).image, composer.compose(0, "test").image)


def test_splits_share_no_pairs_and_no_backgrounds(composer: Composer) -> None:
    for scene in scenes(composer, "train"):
        nouns = {o.noun for o in scene.objects}
        assert not any(held_out_pair(a, b) for a, b in combinations(nouns, 2))
        assert scene.background in {f.__name__ for f in TRAIN_FAMILIES}
    unseen = 0
    for scene in scenes(composer, "test"):
        nouns = {o.noun for o in scene.objects}
        unseen += scene.background in {f.__name__ for f in TEST_FAMILIES}
        assert len(nouns) == 1 or any(held_out_pair(a, b) for a, b in combinations(nouns, 2))
    assert unseen > 75
    # The families that both splits know are painted in hues that training never has.
    assert not np.array_equal(background(4, "train", 32)[0], background(4, "test", 32)[0])


def test_boxes_lie_in_the_image_and_objects_are_ordered_left_to_right(composer: Composer) -> None:
    for scene in scenes(composer, "train"):
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        for o in scene.objects:
            assert 0 <= o.box[0] < o.box[2] <= 128 and 0 <= o.box[1] < o.box[3] <= 128
        centres = [o.box[0] + o.box[2] for o in scene.objects]
        assert centres == sorted(centres)


def test_patch_grid() -> None:
    owner = np.full((128, 128), -1, np.int8)
    owner[0:16, 0:16] = 1
    owner[16:32, 0:4] = 0  # a quarter of a patch: too little
    owner[32:48, 0:8] = 0  # one half against the other: the larger
    owner[32:48, 8:14] = 1
    grid = _patch_grid(owner, [1, 0])  # objects are renumbered by their order
    assert grid.shape == (8, 8)
    assert grid[0, 0] == 0 and grid[1, 0] == -1 and grid[2, 0] == 1
    assert (grid[3:] == -1).all()


def test_patches_agree_with_boxes(composer: Composer) -> None:
    for scene in scenes(composer, "train", 60):
        for y, x in np.argwhere(scene.patch_object >= 0):
            x0, y0, x1, y1 = scene.objects[scene.patch_object[y, x]].box
            assert x0 < x * 16 + 16 and x * 16 < x1 and y0 < y * 16 + 16 and y * 16 < y1


def test_objects_are_where_the_labels_say(composer: Composer) -> None:
    scene = composer.compose(3, objects=1, cutout="a1")
    x0, y0, x1, y1 = scene.objects[0].box
    middle = scene.image[(y0 + y1) // 2, (x0 + x1) // 2].astype(int)
    assert middle[0] > 150 and middle[1] < 110 and middle[2] < 110  # the apple is red


def test_ambiguous_relations_are_none() -> None:
    def at(x: int, y: int) -> Placed:
        return Placed("", "apple", None, (x - 5, y - 5, x + 5, y + 5), False)

    assert relation(128, at(20, 64), at(100, 70)) == "left"
    assert relation(128, at(100, 70), at(20, 64)) == "right"
    assert relation(128, at(60, 20), at(64, 100)) == "above"
    assert relation(128, at(60, 100), at(64, 20)) == "below"
    assert relation(128, at(50, 64), at(64, 64)) is None  # too close
    assert relation(128, at(20, 20), at(100, 100)) is None  # as far left as above


def test_options(composer: Composer) -> None:
    assert len(composer.compose(1, objects=3).objects) == 3
    assert composer.compose(1, side=256).image.shape == (256, 256, 3)
    assert not any(o.is_shape for seed in range(30) for o in composer.compose(seed, shapes=False).objects)
    assert {o.noun for seed in range(300) for o in composer.compose(seed).objects if o.is_shape} == set(
        SHAPES
    )
    with pytest.raises(ValueError, match="1 to 4"):
        composer.compose(1, objects=5)
    with pytest.raises(ValueError, match="multiple of 8"):
        composer.compose(1, side=100)
    with pytest.raises(ValueError, match=r"objects\.csv"):
        composer.compose(1, cutout="nothing")
