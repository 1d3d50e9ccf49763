"""A picture in words, where its queries will stand: each query says what has its middle in its part of the image.

It says the thing's name, its column and row in tenths of the picture, and its color, all at once, as the sum of their
embeddings; "," where it has no color, "." where there is nothing. What a question asks of a thing is then found where
its name is. The language model learns to read pictures so before it has seen one, the queries to say them so.
"""

from __future__ import annotations

import random
from functools import cached_property

import torch
from torch import Tensor

from blip2.text import Tokenizer
from blip2.train.queries import parts_of
from default_model import easyvqa, recipe
from default_model.colours import COLOURS
from default_model.easyvqa import EasyImage
from default_model.language import standard
from default_model.scenes import Scene

SEEN_ROUGHLY = 0.03  # standard deviation of a place as the image encoder tells it, as a share of the side
NO_COLOUR, NOTHING = ",", "."
COLUMNS, ROWS = "0123456789", "ABCDEFGHIJ"

_SIGNS = (*COLUMNS, *ROWS, NO_COLOUR, NOTHING)

Spelled = list[list[int]]  # for each query the numbers of the four words it says, -1 where there are fewer


class Speller:
    """Everything that can be said of a thing, and how a picture is said."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        words = (*COLOURS, *easyvqa.COLOURS, *sorted(standard().nouns), "shape")
        self.choices = tuple(dict.fromkeys((*_SIGNS, *words)))  # an orange is orange
        self._number = {word: i for i, word in enumerate(self.choices)}

    @cached_property
    def bags(self) -> Tensor:
        """The tokens of every choice, int64 [C, K], -1 where there are fewer: a name of two words is both at once."""
        rows = [
            torch.tensor(self._tokenizer.encode(word if word in _SIGNS else f" {word}", frame=False))
            for word in self.choices
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def spell(self, picture: Scene | EasyImage | None, rng: random.Random | None = None) -> Spelled:
        """A picture as numbers of choices; with `rng` its places are a little off, as if seen. None: of nothing."""
        rows = [[self._number[NOTHING], -1, -1, -1] for _ in range(recipe.QUERIES)]
        things = [] if picture is None else _things(picture)
        if rng is not None:
            things = [
                (rng.gauss(x, SEEN_ROUGHLY), rng.gauss(y, SEEN_ROUGHLY), *said) for x, y, *said in things
            ]
        middles = torch.tensor([thing[:2] for thing in things]).reshape(-1, 2)
        for part, thing in zip(parts_of(middles, recipe.QUERIES).tolist(), things, strict=True):
            rows[part] = self.words_of(*thing)
        return rows

    def words_of(self, across: float, down: float, colour: str | None, noun: str) -> list[int]:
        """What is said of one thing."""
        words = (noun, _tenth(across, COLUMNS), _tenth(down, ROWS), colour or NO_COLOUR)
        return [self._number[word] for word in words]


def _things(picture: Scene | EasyImage) -> list[tuple[float, float, str | None, str]]:
    """Column and row of each thing's middle, its colour and its noun."""
    if isinstance(picture, EasyImage):
        named = picture.caption.split()[1:]
        return [(*picture.middle, named[0] if named[1:] else None, named[-1])]
    return [
        (
            (o.box[0] + o.box[2]) / 2 / picture.side,
            (o.box[1] + o.box[3]) / 2 / picture.side,
            o.colour,
            o.noun,
        )
        for o in picture.objects
    ]


def _tenth(share: float, names: str) -> str:
    return names[min(9, max(0, int(10 * share)))]
