"""What each query is to say: the facts of a picture, by query, as tokens, as a prefix."""

from __future__ import annotations

import torch

from default_model.batches import Tokenizers
from default_model.photo import Photo
from default_model.recipe import PARTS, QUERIES
from default_model.scenes import Composer
from default_model.slots import (
    BREED_GAIN,
    COLOUR_GAIN,
    EMPTY,
    NAME_GAIN,
    OBJECT,
    PHOTOGRAPH,
    SCENE,
    TOKENS,
    Slot,
    SlotEncoder,
    SlotPrefix,
    assign_parts,
    bag,
    photo_slots,
    scene_slots,
    slot_words,
    waves,
)


def test_every_object_gets_the_part_its_middle_is_in_or_the_nearest_free_one() -> None:
    middles = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [1.0, 1.0]])
    assert assign_parts(middles, 4).tolist() == [0, 1, 2, 3]
    crowded = torch.tensor([[0.3, 0.3], [0.2, 0.4], [0.4, 0.2], [0.1, 0.1]])
    assert assign_parts(crowded, 4).tolist() == [0, 2, 1, 3]
    assert assign_parts(torch.tensor([[0.62, 0.3]]), 16).tolist() == [6]  # second row, third column


def test_a_scenes_slots_name_its_objects_where_they_are(composer: Composer) -> None:
    for number in range(20):
        scene = composer.compose(number)
        slots = scene_slots(scene)
        assert len(slots) == QUERIES and slots[PARTS] == Slot(SCENE, {})
        shown = [slot for slot in slots if slot.kind == OBJECT]
        assert len(shown) == len(scene.objects)
        assert all(slot == Slot(EMPTY, {}) for slot in slots[:PARTS] if slot.kind != OBJECT)
        for placed in scene.objects:
            x0, y0, x1, y1 = placed.box
            place = (x0 + x1) / (2 * scene.side), (y0 + y1) / (2 * scene.side)
            slot = min(shown, key=lambda s: abs(s.place[0] - place[0]) + abs(s.place[1] - place[1]))
            assert torch.allclose(torch.tensor(slot.place), torch.tensor(place))
            coloured = placed.colour is not None and placed.colour != placed.noun  # no "orange orange"
            colour = {placed.colour: COLOUR_GAIN} if coloured else {}
            assert slot.words == {placed.noun: NAME_GAIN} | colour


def test_of_a_photograph_the_last_query_alone_says_something() -> None:
    nouns, breeds = {"bear": 0.5, "bus": 0.25}, {"polar bear": 0.5}
    *others, whole = photo_slots(Photo("bear", "polar bear", "animal", "white"), nouns, breeds)
    assert others == [Slot(EMPTY, {})] * PARTS
    assert whole.kind == PHOTOGRAPH
    assert whole.words == {
        "bear": NAME_GAIN / 2, "bus": NAME_GAIN / 4, "polar bear": BREED_GAIN / 2
    }  # fmt: skip
    unnamed = photo_slots(Photo(None, None, "animal", "white"), nouns, {})[-1]
    assert unnamed.words == {"bear": NAME_GAIN / 2, "bus": NAME_GAIN / 4, "white": COLOUR_GAIN}


def test_slots_become_tokens_with_weights(words: Tokenizers) -> None:
    many = {f"number {i}": 0.1 + i / 100 for i in range(TOKENS)}
    slots = [
        Slot(OBJECT, {"teddy bear": 1.5, "red": 0.7}, (0.25, 0.75)),
        Slot(PHOTOGRAPH, many, (0.1, 0.1), known=False),
    ]
    encoded = SlotEncoder(words.language).encode([[*slots, *[Slot(EMPTY, {})] * (QUERIES - 2)]])
    assert encoded["slot_kinds"][0, :3].tolist() == [OBJECT, PHOTOGRAPH, EMPTY]
    expected = [*bag(words.language, "teddy bear"), *bag(words.language, "red")]
    count = len(expected)
    assert encoded["slot_ids"][0, 0, :count].tolist() == expected
    assert words.language.decode(expected) == " teddy bear red"
    weights = [1.5] * (count - 1) + [0.7]
    torch.testing.assert_close(
        encoded["slot_weights"][0, 0], torch.tensor(weights + [0.0] * (TOKENS - count))
    )
    torch.testing.assert_close(
        encoded["slot_places"][0, :3], torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    )
    assert encoded["slots_known"][0, :3].tolist() == [1, 0, 1]
    assert encoded["slot_weights"][0, 1].min() > 0.1  # of more than fit the heaviest are kept
    assert (encoded["slot_weights"][0, 1].diff() <= 0).all()
    assert encoded["slot_weights"][0, 2:].count_nonzero() == 0


def test_a_prefix_is_the_sum_of_words_place_and_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, prefix = torch.randn(10, 6, generator=generator), SlotPrefix(6)
    with torch.no_grad():
        prefix.kinds.copy_(torch.randn(4, 6, generator=generator))
        prefix.place.weight.copy_(torch.randn(6, 16, generator=generator))
    batch = {
        "slot_kinds": torch.tensor([[OBJECT, SCENE]]),
        "slot_ids": torch.tensor([[[3, 4], [0, 0]]]),
        "slot_weights": torch.tensor([[[1.5, 0.5], [0.0, 0.0]]]),
        "slot_places": torch.tensor([[[0.2, 0.9], [0.5, 0.5]]]),
    }
    words = 1.5 * embeddings[3] + 0.5 * embeddings[4]
    torch.testing.assert_close(slot_words(embeddings, batch)[0], torch.stack([words, torch.zeros(6)]))
    place = prefix.place.weight @ waves(torch.tensor([0.2, 0.9]))
    with torch.no_grad():
        out = prefix(embeddings, batch)[0]
    torch.testing.assert_close(out[0], (words + place + prefix.kinds[OBJECT]).detach())
    torch.testing.assert_close(out[1], prefix.kinds[SCENE].detach())  # a scene is at no place


def test_waves_tell_places_apart() -> None:
    grid = torch.cartesian_prod(torch.arange(1, 8) / 8, torch.arange(1, 8) / 8)
    assert torch.pdist(waves(grid)).min() > 0.3
