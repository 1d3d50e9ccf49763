"""Plain text for the language model alone: captions, questions and conversations about pictures that do not exist."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from default_model.colours import COLOURS
from default_model.grammar import a_category
from default_model.photo import Photo
from default_model.scenes import GRID, IMAGE_PX, SCALES, Placed, Scene

if TYPE_CHECKING:
    from default_model.language import Language

PHOTOS = 0.35  # of the pictures
_EASY = (
    "a {colour} {shape}",
    "a photo of a {colour} {shape}",
    "Question: what color is the {shape}? Answer: {colour}",
    "Question: what is the {colour} shape? Answer: {shape}",
    "Question: what shape does the image contain? Answer: {shape}",
    "Question: is there not a {colour} shape in the image? Answer: yes",
    "Question: does the image contain a {shape}? Answer: no",
)
_BLACK = np.zeros((IMAGE_PX, IMAGE_PX, 3), np.uint8)
_EMPTY = np.full((GRID, GRID), -1, np.int8)


def text_corpus(language: Language, rng: random.Random) -> Iterator[str]:
    """Endless lines, each ending in a newline, in the formats the language model will read later."""
    while True:
        picture = imagined_photo(language, rng) if rng.random() < PHOTOS else imagined(language, rng)
        kind = rng.random()
        if kind < 0.2:
            yield language.caption(picture, rng) + "\n"
        elif kind < 0.4:
            yield f"a photo of {language.caption(picture, rng)}\n"
        elif kind < 0.82:
            yield ". ".join(f"Question: {q} Answer: {a}" for q, a in language.turns(picture, rng)) + "\n"
        elif kind < 0.86:
            shape, colour = rng.choice(("circle", "triangle", "rectangle")), rng.choice((*COLOURS, "teal"))
            yield rng.choice(_EASY).format(shape=shape, colour=colour) + "\n"
        else:
            yield _sentence(language, rng) + "\n"


def imagined_photo(language: Language, rng: random.Random) -> Photo:
    """The facts of a photograph that does not exist; some are not known."""
    noun, draw = rng.choice(language.all), rng.random()
    colour = rng.choice(COLOURS) if rng.random() < 0.4 else None
    category = language.nouns[noun].category
    if draw < 0.15:
        return Photo(None, None, category if draw < 0.1 else None, colour)
    breeds = language.breeds.get(noun)
    return Photo(noun, rng.choice(breeds) if breeds and rng.random() < 0.8 else None, category, colour)


def imagined(language: Language, rng: random.Random) -> Scene:
    """A scene of names and boxes without a picture (its image is black), for text alone."""
    count = rng.choices((1, 2, 3, 4), (30, 36, 20, 14))[0]
    kinds = 1 if count == 1 else rng.choices(range(1, count + 1), [1.1] + [1.0] * (count - 2) + [2.5])[0]
    names = rng.sample(language.all, kinds)
    names += [rng.choice(names) for _ in range(count - kinds)]
    colours: dict[str, str | None] = {}
    for name in names:
        options = language.colours.get(name, ())
        is_shape = language.nouns[name].category == "shape"
        colours.setdefault(name, rng.choice(COLOURS) if is_shape else rng.choice((*options, None)))
    objects = []
    for name in names:
        width, height = (int(rng.uniform(*SCALES[count]) * IMAGE_PX) for _ in range(2))
        x, y = rng.randint(0, IMAGE_PX - width), rng.randint(0, IMAGE_PX - height)
        is_shape = language.nouns[name].category == "shape"
        objects.append(Placed("", name, colours[name], (x, y, x + width, y + height), is_shape))
    objects.sort(key=lambda o: o.box[0] + o.box[2])
    return Scene(-1, "train", _BLACK, tuple(objects), "", _EMPTY)


def _sentence(language: Language, rng: random.Random) -> str:
    """A general sentence about a noun: what kind of thing it is, and what colour it can be."""
    noun = rng.choice(language.all)
    kind = language.category(noun) if rng.random() < 0.8 else language.nouns[noun].category
    other = rng.choice(language.all)
    draws = [
        f"{language.one(noun)} is {a_category(kind)}",
        f"what is {language.one(noun)}? {language.one(noun)} is {a_category(kind)}",
        f"Question: what is {language.one(noun)}? Answer: {a_category(kind)}",
        f"Question: is {language.one(noun)} {a_category(kind)}? Answer: yes",
        f"there is {language.one(noun)} in the picture",
        f"there are two {language.many(noun)} in the picture",
        f"this is {language.one(noun)} and that is {language.one(other)}",
        f"one {noun}, two {language.nouns[noun].plural}, three {language.nouns[noun].plural}",
        f"i can see {language.one(noun)} and {language.one(other)}",
    ]
    wrong = rng.choice(language.categories)
    if language.is_a(noun, wrong) is False:
        draws.append(f"Question: is {language.one(noun)} {a_category(wrong)}? Answer: no")
    if language.colours.get(noun):
        colour = rng.choice(language.colours[noun])
        draws += [f"{language.one(noun)} can be {colour}", f"this is {language.one(noun, colour)}"]
    return rng.choice(draws)
