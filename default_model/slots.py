"""What each query is to say, from the facts of a picture: the prefix that the language model first learns to read.

`PARTS` queries stand for the cells of a square grid over the picture: each names the object whose middle is in its
cell, with its colour and its place. The last query stands for the whole picture: what a photograph shows, with the
probabilities the stem gives, or that this is a scene.

A slot is tokens with weights: the weighted sum of the language model's own embeddings, so that these carry the names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from blip2.text import Tokenizer
from default_model.photo import Photo
from default_model.recipe import PARTS, QUERIES
from default_model.scenes import Scene

EMPTY, OBJECT, SCENE, PHOTOGRAPH = range(4)  # the kinds of slots
TOKENS = 24  # of a slot, at most
NAME_GAIN, COLOUR_GAIN, BREED_GAIN = 1.5, 0.7, 0.5  # weights of what is certain
PLACE_WAVES = 4  # frequencies of the sines and cosines of column and row

Weights = Mapping[str, float]  # of words


@dataclass(frozen=True)
class Slot:
    """One query's content.

    words: nouns, colours and breeds with their weights. place: of the object's middle, column and row as shares of the
    image's side. known: False where the picture's facts do not say it; a query then learns nothing from the slot.
    """

    kind: int
    words: Weights
    place: tuple[float, float] = (0.5, 0.5)
    known: bool = True


def scene_slots(scene: Scene) -> list[Slot]:
    """The slots of a scene, PARTS + 1."""
    middles = torch.tensor([[(o.box[0] + o.box[2]), (o.box[1] + o.box[3])] for o in scene.objects])
    middles = middles / (2 * scene.side)
    slots = [Slot(EMPTY, {})] * PARTS + [Slot(SCENE, {})]
    for owner, placed, middle in zip(
        assign_parts(middles, PARTS).tolist(), scene.objects, middles.tolist(), strict=True
    ):
        words = {placed.noun: NAME_GAIN}
        if placed.colour is not None and placed.colour != placed.noun:
            words[placed.colour] = COLOUR_GAIN
        slots[owner] = Slot(OBJECT, words, (middle[0], middle[1]))
    return slots


def photo_slots(photo: Photo, nouns: Weights, breeds: Weights) -> list[Slot]:
    """The slots of a photograph, PARTS + 1: the last alone says something.

    nouns, breeds: what it may show, with probabilities.
    """
    words = {noun: NAME_GAIN * p for noun, p in nouns.items()}
    for breed, p in breeds.items():
        words[breed] = words.get(breed, 0.0) + BREED_GAIN * p
    if photo.colour is not None and photo.noun is None:
        words[photo.colour] = words.get(photo.colour, 0.0) + COLOUR_GAIN
    return [Slot(EMPTY, {})] * PARTS + [Slot(PHOTOGRAPH, words)]


@dataclass(frozen=True)
class SlotEncoder:
    """Slots -> tensors, with the language model's tokenizer."""

    tokenizer: Tokenizer

    def encode(self, pictures: Sequence[Sequence[Slot]]) -> dict[str, Tensor]:
        """The slots of B pictures, QUERIES each.

        Returns:
            slot_kinds: int64 [B, Q], EMPTY, OBJECT, SCENE or PHOTOGRAPH.
            slot_ids, slot_weights: [B, Q, TOKENS], tokens (int64) and their weights, 0 where there are fewer; of more
                the heaviest are kept.
            slot_places: [B, Q, 2], column and row in 0..1; the middle for all but objects.
            slots_known: [B, Q], 1 or 0.
        """
        shape = len(pictures), QUERIES
        kinds, places = torch.full(shape, EMPTY), torch.full((*shape, 2), 0.5)
        known = torch.ones(shape)
        ids, weights = torch.zeros((*shape, TOKENS), dtype=torch.int64), torch.zeros((*shape, TOKENS))
        for b, slots in enumerate(pictures):
            for q, slot in enumerate(slots):
                kinds[b, q] = slot.kind
                known[b, q] = float(slot.known)
                if slot.kind == OBJECT:
                    places[b, q] = torch.tensor(slot.place)
                tokens = [(t, w) for word, w in slot.words.items() for t in bag(self.tokenizer, word)]
                tokens = sorted(tokens, key=lambda pair: -pair[1])[:TOKENS]
                if tokens:
                    ids[b, q, : len(tokens)] = torch.tensor([t for t, _ in tokens])
                    weights[b, q, : len(tokens)] = torch.tensor([w for _, w in tokens])
        return {
            "slot_kinds": kinds,
            "slot_ids": ids,
            "slot_weights": weights,
            "slot_places": places,
            "slots_known": known,
        }


@lru_cache(maxsize=8192)
def bag(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """The tokens of a word within a sentence."""
    return tuple(tokenizer.encode(f" {word}", frame=False))


class SlotPrefix(nn.Module):
    """Slots -> prefix: the sum of the words' embeddings, an object's place, and a vector for each kind of slot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.zeros(4, width))
        self.place = nn.Linear(4 * PLACE_WAVES, width, bias=False)

    def forward(self, embeddings: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The language model's embeddings [V, W], and slots as `SlotEncoder.encode` gives them -> prefix [B, Q, W]."""
        kinds = batch["slot_kinds"]
        place = self.place(waves(batch["slot_places"])) * (kinds == OBJECT).unsqueeze(-1)
        out: Tensor = slot_words(embeddings, batch) + place + self.kinds[kinds]
        return out


def slot_words(embeddings: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """What the words add to a prefix: embeddings [V, W], slots as `SlotEncoder.encode` gives them -> [B, Q, W]."""
    return torch.einsum("bqtw,bqt->bqw", embeddings[batch["slot_ids"]], batch["slot_weights"])


def waves(places: Tensor) -> Tensor:
    """Places [..., 2] -> sines and cosines of column and row, [..., 4 * PLACE_WAVES]."""
    steps = math.pi * 2.0 ** torch.arange(-1.0, PLACE_WAVES - 1, device=places.device)
    angles = (places.unsqueeze(-1) * steps).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def assign_parts(middles: Tensor, parts: int) -> Tensor:
    """The part for each object of one image: int64 [K], all different.

    Parts are the cells of a square grid, row by row. An object belongs to the part its middle is in, or to the nearest
    that is still free.

    Args:
        middles: [K, 2], column and row as shares of the image's side; K <= parts.
        parts: how many, a square number.
    """
    side = math.isqrt(parts)
    distance = torch.cdist(middles.float(), centres(side))  # [K, parts]
    inside = ((middles * side).long().clamp(0, side - 1) * torch.tensor([1, side])).sum(1)
    distance[torch.arange(len(middles)), inside] = 0.0
    taken: list[int] = []
    for row in distance:
        row[taken] = math.inf
        taken.append(int(row.argmin()))
    return torch.tensor(taken, dtype=torch.int64)


def centres(side: int) -> Tensor:
    """The middles of the cells of a grid [side, side], row by row: [side * side, 2], column and row in 0..1."""
    steps = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(steps, steps).flip(1)
