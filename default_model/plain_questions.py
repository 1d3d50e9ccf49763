"""Five kinds of questions about scenes in a few plain wordings, all lower case: the set "unseen questions".

The set stays as it is, so that its figures remain comparable; `scene_questions` asks as people do.
"""

from __future__ import annotations

import random

from default_model.colours import COLOURS
from default_model.facts import (
    EDGES,
    OPPOSITE,
    PHRASES,
    by_colour,
    groups,
    neighbours,
    outermost,
    place_name,
)
from default_model.grammar import Grammar
from default_model.qa import QA
from default_model.scenes import Scene, relation

PLAIN_KINDS = ("object", "color", "count", "presence", "position")
ASKED = (
    "animal", "bird", "insect", "fruit", "vegetable", "vehicle", "tool", "musical instrument", "piece of clothing",
    "flower", "building", "shape",
)  # fmt: skip


def plain_question(grammar: Grammar, scene: Scene, rng: random.Random, kind: str) -> QA | None:
    """A question of one of `PLAIN_KINDS`, or None if the scene allows none."""
    return _KINDS[kind](grammar, scene, rng)


def _object(grammar: Grammar, scene: Scene, rng: random.Random) -> QA | None:
    named = groups(scene)
    pairs: list[tuple[str, str]] = []
    if len(named) == 1:
        noun, single = named[0].noun, len(scene.objects) == 1
        first = "what is this?" if single else "what are these?"
        questions = (first, "what is in the picture?", "what is in the image?", "what do you see?")
        pairs += [(question, noun if single else grammar.many(noun)) for question in questions]
    else:
        pairs += _beside(grammar, scene)
        for side, place in EDGES.items():
            outer = outermost(scene, side)
            if outer is not None:
                pairs += [(f"what is {place}?", outer.noun)] * 2
        pairs += [(f"what is the {c} {thing}?", noun) for c, noun, thing in by_colour(named)]
    for category in ASKED:
        members = [g for g in named if category in (grammar.nouns[g.noun].category, grammar.category(g.noun))]
        if len(members) == 1:
            group = members[0]
            answer = group.noun if len(group.members) == 1 else grammar.many(group.noun)
            end = "this" if len(scene.objects) == 1 else "in the picture"
            pairs.append((f"what {category} is {end}?", answer))
    if not pairs:
        return None
    question, answer = rng.choice(pairs)
    return QA(question, answer, "object")


def _colour(grammar: Grammar, scene: Scene, rng: random.Random) -> QA | None:
    known = [g for g in groups(scene) if g.colour is not None]
    if not known:
        return None
    group = rng.choice(known)
    assert group.colour is not None
    if len(group.members) > 1:
        return QA(f"what color are the {grammar.many(group.noun)}?", group.colour, "color")
    questions = [
        f"what color is {grammar.the(group.noun)}?",
        f"what is the color of {grammar.the(group.noun)}?",
    ]
    if len(scene.objects) == 1:
        questions.append("what color is the shape?" if group.is_shape else "what color is it?")
    return QA(rng.choice(questions), group.colour, "color")


def _count(grammar: Grammar, scene: Scene, rng: random.Random) -> QA | None:
    named = groups(scene)
    draw = rng.random()
    if draw < 0.2:
        word = (
            "shapes"
            if all(g.is_shape for g in named) and rng.random() < 0.5
            else rng.choice(("objects", "things"))
        )
        number = len(scene.objects)
    elif draw < 0.4:
        word, number = grammar.many(grammar.absent([g.noun for g in named], rng)), 0
    else:
        # Groups of several first: most objects are single, and "1" must not become the answer to everything.
        group = max(named, key=lambda g: (len(g.members) * rng.random(), g.noun))
        word, number = grammar.many(group.noun), len(group.members)
    questions = (
        f"how many {word} are there?",
        f"how many {word} are in the picture?",
        f"how many {word} do you see?",
    )
    return QA(rng.choice(questions), str(number), "count")


def _presence(grammar: Grammar, scene: Scene, rng: random.Random) -> QA | None:
    named = groups(scene)
    yes = rng.random() < 0.5
    group = rng.choice(named)
    if group.colour not in (None, group.noun) and rng.random() < 0.3:
        colour = (
            group.colour if yes else rng.choice([c for c in COLOURS if c not in (group.colour, group.noun)])
        )
        thing = grammar.one(group.noun, colour)
    else:
        noun = group.noun if yes else grammar.absent([g.noun for g in named], rng)
        if rng.random() < 0.2:
            question = rng.choice(("are there any {}?", "do you see any {}?")).format(grammar.many(noun))
            return QA(question, "yes" if yes else "no", "presence")
        thing = grammar.one(noun)
    questions = (
        "is there {}?",
        "is there {} in the picture?",
        "is there {} in the image?",
        "do you see {}?",
    )
    return QA(rng.choice(questions).format(thing), "yes" if yes else "no", "presence")


def _position(grammar: Grammar, scene: Scene, rng: random.Random) -> QA | None:
    named = groups(scene)
    alone = [g.members[0] for g in named if len(g.members) == 1]
    choices: list[list[tuple[str, str]]] = []
    pairs = [(a, b, relation(scene.side, a, b)) for a in alone for b in alone if a is not b]
    clear = [(a, b, r) for a, b, r in pairs if r is not None]
    if clear:
        a, b, side = rng.choice(clear)
        yes = rng.random() < 0.5
        phrase = PHRASES[side if yes else OPPOSITE[side]]
        question = f"is {grammar.the(a.noun)} {phrase} {grammar.the(b.noun)}?"
        choices.append([(question, "yes" if yes else "no")])
    places = [(o, place_name(scene, o)) for o in alone]
    locations = [(f"where is {grammar.the(o.noun)}?", p) for o, p in places if p is not None]
    choices += [some for some in (locations, _beside(grammar, scene)) if some]
    if not choices:
        return None
    question, answer = rng.choice(rng.choice(choices))
    return QA(question, answer, "position")


def _beside(grammar: Grammar, scene: Scene) -> list[tuple[str, str]]:
    return [
        (f"what is {PHRASES[side]} {grammar.the(anchor)}?", noun) for side, anchor, noun in neighbours(scene)
    ]


_KINDS = dict(zip(PLAIN_KINDS, (_object, _colour, _count, _presence, _position), strict=True))
