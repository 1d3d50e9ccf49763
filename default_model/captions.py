"""Captions of scenes and photographs, lower case. They continue "a photo of": "a dog", "two cats and a ball"."""

from __future__ import annotations

import random

from default_model.facts import OPPOSITE, PHRASES, Group, groups
from default_model.grammar import NUMBERS, Grammar, listed, with_article
from default_model.photo import Photo
from default_model.scenes import Scene, relation

UNKNOWN_THING = "something i do not know"


def some(grammar: Grammar, group: Group, colour: bool = False) -> str:
    """ "a dog", "three red apples"."""
    tint = group.colour if colour or group.is_shape else None
    if len(group.members) == 1:
        return grammar.one(group.noun, tint)
    return f"{NUMBERS[len(group.members)]} {grammar.many(group.noun, tint)}"


def scene_caption(grammar: Grammar, scene: Scene, *, colour: bool, relate: bool, reverse: bool) -> str:
    """Every noun with its number; colour: with its colour; relate: two things by where they are, in either order."""
    named = groups(scene)
    if len(scene.objects) == 2 and len(named) == 2 and relate:
        first, second = named
        side = relation(scene.side, first.members[0], second.members[0])
        if side in ("right", "below"):
            first, second, side = second, first, OPPOSITE[side]
        if side is not None:
            if reverse:
                first, second, side = second, first, OPPOSITE[side]
            return f"{some(grammar, first, colour)} {PHRASES[side]} {some(grammar, second, colour)}"
    return listed([some(grammar, group, colour) for group in named])


def photo_caption(grammar: Grammar, photo: Photo, rng: random.Random) -> str:
    """What a photograph shows, as far as it is known: "a dog", "an animal", "some food", "something red"."""
    if photo.noun is not None:
        return grammar.one(photo.noun, photo.colour if rng.random() < 0.3 else None)
    return hedge(photo)


def hedge(photo: Photo) -> str:
    """What can be said of a thing whose noun is not known."""
    if photo.category is not None:
        return "some food" if photo.category == "food" else with_article(photo.category)
    return UNKNOWN_THING if photo.colour is None else f"something {photo.colour}"
