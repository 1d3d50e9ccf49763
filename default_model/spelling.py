"""A picture in words, where its queries will stand: sixteen words, four for each of up to four things.

From left to right, each thing's column and row in tenths of the picture, its color and its name; "," where it has no
color, "." where there is nothing more. The language model learns to read pictures so before it has seen one, the
queries to say them so: a list in a fixed order is what it can go through without losing or repeating a thing.
"""

from __future__ import annotations

import random
from functools import cached_property

import torch
from torch import Tensor

from blip2.text import Tokenizer
from default_model import easyvqa, recipe
from default_model.colours import COLOURS
from default_model.easyvqa import EasyImage
from default_model.language import standard
from default_model.scenes import MAX_OBJECTS, Scene

WORDS = 4  # of a thing
SEEN_ROUGHLY = 0.04  # standard deviation of a place as the image encoder tells it, as a share of the side
NO_COLOUR, NOTHING = ",", "."

_SIGNS = (*map(str, range(10)), NO_COLOUR, NOTHING)

assert MAX_OBJECTS * WORDS == recipe.QUERIES


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

    @property
    def nothing(self) -> list[int]:
        """A picture of nothing."""
        return [self._number[NOTHING]] * recipe.QUERIES

    def spell(self, picture: Scene | EasyImage, rng: random.Random | None = None) -> list[int]:
        """A picture as numbers of choices, one for each query; with `rng` its places are a little off, as if seen."""
        things: list[tuple[float, float, str | None, str]] = []
        if isinstance(picture, Scene):
            for placed in picture.objects:
                across, down = ((placed.box[i] + placed.box[i + 2]) / 2 / picture.side for i in (0, 1))
                if rng is not None:
                    across, down = (rng.gauss(share, SEEN_ROUGHLY) for share in (across, down))
                things.append((across, down, placed.colour, placed.noun))
        else:  # one shape, anywhere
            named = picture.caption.split()[1:]
            place = rng or random.Random(picture.caption)
            things.append((place.random(), place.random(), named[0] if named[1:] else None, named[-1]))
        words: list[str] = []
        for across, down, colour, noun in sorted(things, key=lambda thing: thing[0]):
            words += [_tenth(across), _tenth(down), colour or NO_COLOUR, noun]
        words += [NOTHING] * (recipe.QUERIES - len(words))
        return [self._number[word] for word in words]


def _tenth(share: float) -> str:
    return str(min(9, max(0, int(10 * share))))
