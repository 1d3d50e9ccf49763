"""A picture in words, where its queries will stand: four queries for each of up to four things, from left to right.

They say the thing's column and row in tenths of the picture, its color, and its name; "," where it has no color, "."
where there is nothing more. The query that says the name says the other three at the same time: what a question asks
of a thing is then found where its name is. The language model learns to read pictures so before it has seen one, the
queries to say them so: a list in a fixed order is what it can go through without losing or repeating a thing.
"""

from __future__ import annotations

import random
from functools import cached_property
from itertools import permutations

import torch
from torch import Tensor

from blip2.text import Tokenizer
from default_model import easyvqa, recipe
from default_model.colours import COLOURS
from default_model.easyvqa import EasyImage
from default_model.language import standard
from default_model.scenes import MAX_OBJECTS, Scene

WORDS = 4  # of a thing, and at once
SEEN_ROUGHLY = 0.03  # standard deviation of a place as the image encoder tells it, as a share of the side
BESIDE = 0.08  # things less than this apart from left to right may come in either order
WAYS = 6  # at most so many orders are told
NO_COLOUR, NOTHING = ",", "."
COLUMNS, ROWS = "0123456789", "ABCDEFGHIJ"

_SIGNS = (*COLUMNS, *ROWS, NO_COLOUR, NOTHING)

assert MAX_OBJECTS * WORDS == recipe.QUERIES

Spelled = list[
    list[int]
]  # for each query the numbers of what it says, WORDS of them, -1 where there are fewer


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
        things = [] if picture is None else _things(picture)
        if rng is not None:
            things = [
                (rng.gauss(x, SEEN_ROUGHLY), rng.gauss(y, SEEN_ROUGHLY), *said) for x, y, *said in things
            ]
        return self._listed(sorted(things, key=lambda thing: thing[0]))

    def ways(self, picture: Scene | EasyImage) -> list[Spelled]:
        """All orders in which a picture may be said, `WAYS` of them: the plainest first, repeated to fill up."""
        things = sorted(_things(picture), key=lambda thing: thing[0])
        found: list[tuple[int, list[_Thing]]] = []
        for order in permutations(range(len(things))):
            turned = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if a > b]
            if all(things[a][0] - things[b][0] < BESIDE for a, b in turned):
                found.append((len(turned), [things[i] for i in order]))
        kept = [self._listed(listed) for _, listed in sorted(found, key=lambda way: way[0])[:WAYS]]
        return kept + kept[:1] * (WAYS - len(kept))

    def _listed(self, things: list[_Thing]) -> Spelled:
        rows: Spelled = []
        for across, down, colour, noun in things:
            words = (_tenth(across, COLUMNS), _tenth(down, ROWS), colour or NO_COLOUR, noun)
            column, row, tint, name = (self._number[word] for word in words)
            rows += [[each, -1, -1, -1] for each in (column, row, tint)] + [[name, column, row, tint]]
        nothing = [self._number[NOTHING], -1, -1, -1]
        return rows + [nothing] * (recipe.QUERIES - len(rows))


_Thing = tuple[float, float, str | None, str]  # column and row of its middle, colour, noun


def _things(picture: Scene | EasyImage) -> list[_Thing]:
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
