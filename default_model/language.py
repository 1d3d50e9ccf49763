"""Text about scenes: captions, questions with answers, conversations, and plain text.

Everything is derived from the scene's objects, so every sentence is true. Text is lower case; "color" is American.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from default_model.colours import COLOURS
from default_model.materials import ObjectRow, read_table
from default_model.scenes import (
    GRID,
    IMAGE_PX,
    RELATION_DISTANCE,
    SCALES,
    Noun,
    Placed,
    Scene,
    nouns_of,
    relation,
)
from default_model.words import ANIMALS, ASKABLE, OVERLAPS

KINDS = ("object", "color", "count", "presence", "position")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
EDGES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class QA:
    """A question about an image; the answer has one to four words, numbers as digits. kind is one of KINDS."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Group:
    """All objects of one noun in a scene. colour is None where it is unknown, or not the same for all."""

    noun: str
    colour: str | None
    members: tuple[Placed, ...]

    @property
    def is_shape(self) -> bool:
        return self.members[0].is_shape


def groups(scene: Scene) -> list[Group]:
    """The scene's objects by noun, in the order of the leftmost of each."""
    by_noun: dict[str, list[Placed]] = {}
    for placed in scene.objects:
        by_noun.setdefault(placed.noun, []).append(placed)
    out = []
    for noun, members in by_noun.items():
        colours = {m.colour for m in members}
        out.append(Group(noun, colours.pop() if len(colours) == 1 else None, tuple(members)))
    return out


def place_name(scene: Scene, placed: Placed) -> str | None:
    """ "on the left", "in the center", "at the top right"...; None where it is ambiguous."""
    dx = (placed.box[0] + placed.box[2]) / 2 / scene.side - 0.5
    dy = (placed.box[1] + placed.box[3]) / 2 / scene.side - 0.5
    across = "left" if dx < 0 else "right"
    along = "top" if dy < 0 else "bottom"
    if max(abs(dx), abs(dy)) < 0.09:
        return "in the center"
    if min(abs(dx), abs(dy)) > 0.14:
        return f"at the {along} {across}"
    if max(abs(dx), abs(dy)) > 0.14 and min(abs(dx), abs(dy)) < 0.1:
        return f"on the {across}" if abs(dx) > abs(dy) else f"at the {along}"
    return None


class Language:
    """Writes about scenes of known nouns. Immutable; all randomness comes from the `rng` arguments."""

    def __init__(
        self, nouns: Mapping[str, Noun], colours: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """colours: for a noun, the colours its pictures have (used in plain text only)."""
        self.nouns = dict(nouns)
        self.colours = dict(colours or {})
        self._all = sorted(self.nouns)
        self._by_category: dict[str, list[str]] = {}
        for name in self._all:
            self._by_category.setdefault(self.nouns[name].category, []).append(name)

    # -- noun phrases

    def one(self, noun: str, colour: str | None = None) -> str:
        """ "a dog", "an orange hat", "a pair of black scissors"."""
        article = self.nouns[noun].article
        if colour is None or colour == noun:  # never "an orange orange"
            return f"{article} {noun}"
        if article in ("a", "an"):
            article = "an" if colour[0] in "aeiou" else "a"
        return f"{article} {colour} {noun}"

    def many(self, noun: str, colour: str | None = None) -> str:
        """ "dogs", "orange hats", "pairs of black scissors"."""
        entry = self.nouns[noun]
        unit = ""
        if " " in entry.article:
            word = entry.article.split()[1]
            unit = {"loaf": "loaves", "bunch": "bunches", "box": "boxes"}.get(word, word + "s") + " of "
        return f"{unit}{colour + ' ' if colour and colour != noun else ''}{entry.plural}"

    def the(self, noun: str) -> str:
        """ "the dog", "the pair of scissors"."""
        unit = self.nouns[noun].article.split()[1:]
        return " ".join(["the", *unit, noun])

    def some(self, group: Group, colour: bool) -> str:
        """ "a dog", "three red apples"."""
        tint = group.colour if colour or group.is_shape else None
        if len(group.members) == 1:
            return self.one(group.noun, tint)
        return f"{NUMBERS[len(group.members)]} {self.many(group.noun, tint)}"

    def category(self, noun: str) -> str:
        """The word for the kind of object; "animal" for birds and fish too."""
        category = self.nouns[noun].category
        return "animal" if category in ANIMALS else category

    def related(self, a: str, b: str) -> bool:
        """Whether an object called `a` might also be called `b`."""
        one, two = self.nouns[a], self.nouns[b]
        if (
            a == b
            or a.split()[-1] == b.split()[-1]
            or a in (two.category, b.split()[0])
            or b in (one.category, a.split()[0])
        ):
            return True
        return any(a in group and b in group for group in OVERLAPS)

    # -- captions

    def caption(self, scene: Scene, rng: random.Random) -> str:
        """A caption for training: names every noun with its number; varies in colour words and in relations."""
        return self._caption(scene, rng.random() < 0.35, rng.random() < 0.7, rng.random() < 0.15)

    def canonical_caption(self, scene: Scene) -> str:
        """The plainest caption: relation where there is one, colours for plain shapes only."""
        return self._caption(scene, False, True, False)

    def reference_captions(self, scene: Scene, n: int = 5) -> list[str]:
        """The canonical caption and other true ones, n in all (repeated if a scene has fewer)."""
        styles = [
            (False, True, False),
            (False, False, False),
            (True, True, False),
            (False, True, True),
            (True, False, False),
        ]
        captions = list(dict.fromkeys(self._caption(scene, *style) for style in styles))
        return [captions[i % len(captions)] for i in range(n)]

    def _caption(self, scene: Scene, colour: bool, relate: bool, reverse: bool) -> str:
        named = groups(scene)
        if len(scene.objects) == 2 and len(named) == 2 and relate:
            first, second = named
            side = relation(scene.side, first.members[0], second.members[0])
            if side in ("right", "below"):
                first, second, side = second, first, OPPOSITE[side]
            if side is not None:
                if reverse:
                    first, second, side = second, first, OPPOSITE[side]
                return f"{self.some(first, colour)} {PHRASES[side]} {self.some(second, colour)}"
        phrases = [self.some(group, colour) for group in named]
        if len(phrases) == 1:
            return phrases[0]
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    # -- questions

    def questions(self, scene: Scene, rng: random.Random) -> list[QA]:
        """One question of every kind that the scene allows, in random order."""
        drawn = [self.question(scene, rng, kind) for kind in KINDS]
        questions = [qa for qa in drawn if qa is not None]
        rng.shuffle(questions)
        return questions

    def question(self, scene: Scene, rng: random.Random, kind: str) -> QA | None:
        """A question of a kind, or None if the scene allows none."""
        if kind == "object":
            return self._object(scene, rng)
        if kind == "color":
            return self._colour(scene, rng)
        if kind == "count":
            return self._count(scene, rng)
        if kind == "presence":
            return self._presence(scene, rng)
        if kind == "position":
            return self._position(scene, rng)
        raise ValueError(f"no kind of question {kind!r}: it must be one of {', '.join(KINDS)}")

    def _object(self, scene: Scene, rng: random.Random) -> QA | None:
        named = groups(scene)
        pairs: list[tuple[str, str]] = []
        if len(named) == 1:
            noun, single = named[0].noun, len(scene.objects) == 1
            first = "what is this?" if single else "what are these?"
            questions = (first, "what is in the picture?", "what is in the image?", "what do you see?")
            pairs += [(question, noun if single else self.many(noun)) for question in questions]
        else:
            pairs += self._neighbours(scene)
            for side, place in EDGES.items():
                outer = _outermost(scene, side)
                if outer is not None:
                    pairs += [(f"what is {place}?", outer.noun)] * 2
            pairs += [(f"what is the {c} {thing}?", noun) for c, noun, thing in self._by_colour(named)]
        for category in ASKABLE:
            members = [g for g in named if category in (self.nouns[g.noun].category, self.category(g.noun))]
            if len(members) == 1:
                group = members[0]
                answer = group.noun if len(group.members) == 1 else self.many(group.noun)
                end = "this" if len(scene.objects) == 1 else "in the picture"
                pairs.append((f"what {category} is {end}?", answer))
        if not pairs:
            return None
        question, answer = rng.choice(pairs)
        return QA(question, answer, "object")

    def _by_colour(self, named: list[Group]) -> list[tuple[str, str, str]]:
        """(colour, noun, "object" or "shape") where the colour identifies a single object of the scene."""
        if any(g.colour is None or len(g.members) > 1 for g in named):
            return []
        colours = [g.colour for g in named]
        word = "shape" if all(g.is_shape for g in named) else "object"
        return [
            (g.colour, g.noun, word) for g in named if g.colour is not None and colours.count(g.colour) == 1
        ]

    def _neighbours(self, scene: Scene) -> list[tuple[str, str]]:
        """("what is above the cat?", noun) for every such question with exactly one answer."""
        named = groups(scene)
        alone = [g.members[0] for g in named if len(g.members) == 1]
        pairs = []
        for anchor in alone:
            others = [o for o in scene.objects if o is not anchor]
            sides = [relation(scene.side, o, anchor) for o in others]
            if None in sides and len(others) > 1:
                continue
            for side in PHRASES:
                neighbours = [o for o, s in zip(others, sides, strict=True) if s == side]
                if len(neighbours) == 1:
                    pairs.append((f"what is {PHRASES[side]} {self.the(anchor.noun)}?", neighbours[0].noun))
        return pairs

    def _colour(self, scene: Scene, rng: random.Random) -> QA | None:
        known = [g for g in groups(scene) if g.colour is not None]
        if not known:
            return None
        group = rng.choice(known)
        assert group.colour is not None
        if len(group.members) > 1:
            return QA(f"what color are the {self.many(group.noun)}?", group.colour, "color")
        questions = [
            f"what color is {self.the(group.noun)}?",
            f"what is the color of {self.the(group.noun)}?",
        ]
        if len(scene.objects) == 1:
            questions.append("what color is the shape?" if group.is_shape else "what color is it?")
        return QA(rng.choice(questions), group.colour, "color")

    def _count(self, scene: Scene, rng: random.Random) -> QA | None:
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
            word, number = self.many(self._absent(scene, rng)), 0
        else:
            # Groups of several first: most objects are single, and "1" must not become the answer to everything.
            group = max(named, key=lambda g: (len(g.members) * rng.random(), g.noun))
            word, number = self.many(group.noun), len(group.members)
        questions = (
            f"how many {word} are there?",
            f"how many {word} are in the picture?",
            f"how many {word} do you see?",
        )
        return QA(rng.choice(questions), str(number), "count")

    def _absent(self, scene: Scene, rng: random.Random) -> str:
        """A noun that fits no object of the scene; half of the time of the category of one of them."""
        present = [g.noun for g in groups(scene)]
        for _ in range(60):
            pool = self._all
            if rng.random() < 0.5:
                pool = self._by_category[self.nouns[rng.choice(present)].category]
            noun = rng.choice(pool)
            if not any(self.related(noun, p) for p in present):
                return noun
        return next(n for n in self._all if n not in present)

    def _presence(self, scene: Scene, rng: random.Random) -> QA | None:
        named = groups(scene)
        yes = rng.random() < 0.5
        group = rng.choice(named)
        if group.colour not in (None, group.noun) and rng.random() < 0.3:
            colour = (
                group.colour
                if yes
                else rng.choice([c for c in COLOURS if c not in (group.colour, group.noun)])
            )
            thing = self.one(group.noun, colour)
        else:
            noun = group.noun if yes else self._absent(scene, rng)
            if rng.random() < 0.2:
                question = rng.choice(("are there any {}?", "do you see any {}?")).format(self.many(noun))
                return QA(question, "yes" if yes else "no", "presence")
            thing = self.one(noun)
        questions = (
            "is there {}?",
            "is there {} in the picture?",
            "is there {} in the image?",
            "do you see {}?",
        )
        return QA(rng.choice(questions).format(thing), "yes" if yes else "no", "presence")

    def _position(self, scene: Scene, rng: random.Random) -> QA | None:
        named = groups(scene)
        alone = [g.members[0] for g in named if len(g.members) == 1]
        choices: list[list[tuple[str, str]]] = []
        pairs = [(a, b, relation(scene.side, a, b)) for a in alone for b in alone if a is not b]
        clear = [(a, b, r) for a, b, r in pairs if r is not None]
        if clear:
            a, b, side = rng.choice(clear)
            yes = rng.random() < 0.5
            phrase = PHRASES[side if yes else OPPOSITE[side]]
            question = f"is {self.the(a.noun)} {phrase} {self.the(b.noun)}?"
            choices.append([(question, "yes" if yes else "no")])
        places = [(o, place_name(scene, o)) for o in alone]
        locations = [(f"where is {self.the(o.noun)}?", p) for o, p in places if p is not None]
        choices += [some for some in (locations, self._neighbours(scene)) if some]
        if not choices:
            return None
        question, answer = rng.choice(rng.choice(choices))
        return QA(question, answer, "position")

    # -- conversations

    def conversation(self, scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
        """Two or three turns; later questions say "it" or "they" for what the first answer named."""
        named = groups(scene)
        group = rng.choice(named)
        alone = len(group.members) == 1
        if len(named) == 1:
            first = rng.choice(
                ("what is this?", "what is in the picture?")
                if alone
                else ("what are these?", "what do you see?")
            )
        else:
            side = next(
                (EDGES[key] for key in ("left", "right", "above")
                 if _outermost(scene, key) in group.members and alone), None,
            )  # fmt: skip
            first = f"what is {side}?" if side else "what is in the picture?"
            if side is None:
                listed = [self.some(g, False) for g in named]
                turns = [(first, f"{', '.join(listed[:-1])} and {listed[-1]}")]
                more = [qa for qa in self.questions(scene, rng) if qa.kind != "object"]
                return turns + [(qa.question, qa.answer) for qa in more[: rng.randint(1, 2)]]
        turns = [(first, group.noun if alone else self.many(group.noun))]
        it, verb = ("it", "is") if alone else ("they", "are")
        later: list[tuple[str, str]] = []
        if group.colour is not None:
            later += [(f"what color {verb} {it}?", group.colour)] * 2
        if len(named) == 1:
            later.append((f"how many {self.many(group.noun)} are there?", str(len(group.members))))
        category = self.category(group.noun)
        if category in ASKABLE and alone:
            later.append((f"is it {_a(category)}?", "yes"))
            wrong = rng.choice(
                [c for c in ("animal", "fruit", "vegetable", "vehicle", "tool", "building") if c != category]
            )
            later.append((f"is it {_a(wrong)}?", "no"))
        if alone:
            place = place_name(scene, group.members[0])
            if place is not None:
                later.append(("where is it?", place))
            anchors = [g.members[0] for g in named if len(g.members) == 1 and g is not group]
            for other in anchors:
                side = relation(scene.side, other, group.members[0])
                if side is not None and len(scene.objects) == 2:
                    later += [(f"what is {PHRASES[side]} it?", other.noun)] * 2
        rng.shuffle(later)
        for question, answer in dict(later).items():
            if len(turns) == 3 or (len(turns) == 2 and rng.random() < 0.4):
                break
            turns.append((question, answer))
        return turns

    # -- plain text

    def imagined(self, rng: random.Random) -> Scene:
        """A scene of names and boxes without a picture (its image is black), for text alone."""
        count = rng.choices((1, 2, 3, 4), (30, 36, 20, 14))[0]
        kinds = 1 if count == 1 else rng.choices(range(1, count + 1), [1.1] + [1.0] * (count - 2) + [2.5])[0]
        names = rng.sample(self._all, kinds)
        names += [rng.choice(names) for _ in range(count - kinds)]
        colours: dict[str, str | None] = {}
        for name in names:
            options = self.colours.get(name, ())
            is_shape = self.nouns[name].category == "shape"
            colours.setdefault(name, rng.choice(COLOURS) if is_shape else rng.choice((*options, None)))
        objects = []
        for name in names:
            width, height = (int(rng.uniform(*SCALES[count]) * IMAGE_PX) for _ in range(2))
            x, y = rng.randint(0, IMAGE_PX - width), rng.randint(0, IMAGE_PX - height)
            is_shape = self.nouns[name].category == "shape"
            objects.append(Placed("", name, colours[name], (x, y, x + width, y + height), is_shape))
        objects.sort(key=lambda o: o.box[0] + o.box[2])
        return Scene(-1, "train", _BLACK, tuple(objects), "", _EMPTY)

    def text_corpus(self, rng: random.Random) -> Iterator[str]:
        """Endless lines for the language model, each ending in a newline, in the formats it will read later."""
        while True:
            scene = self.imagined(rng)
            kind = rng.random()
            if kind < 0.2:
                yield self.caption(scene, rng) + "\n"
            elif kind < 0.4:
                yield f"a photo of {self.caption(scene, rng)}\n"
            elif kind < 0.7:
                qa = self.questions(scene, rng)[0]
                yield f"Question: {qa.question} Answer: {qa.answer}\n"
            elif kind < 0.82:
                turns = self.conversation(scene, rng)
                yield ". ".join(f"Question: {q} Answer: {a}" for q, a in turns) + "\n"
            elif kind < 0.86:
                shape, colour = (
                    rng.choice(("circle", "triangle", "rectangle")),
                    rng.choice((*COLOURS, "teal")),
                )
                yield rng.choice(_EASY).format(shape=shape, colour=colour) + "\n"
            else:
                yield self._sentence(rng) + "\n"

    def _sentence(self, rng: random.Random) -> str:
        """A general sentence about a noun: what kind of thing it is, and what colour it can be."""
        noun = rng.choice(self._all)
        kind = self.category(noun) if rng.random() < 0.8 else self.nouns[noun].category
        other = rng.choice(self._all)
        draws = [
            f"{self.one(noun)} is {_a(kind)}",
            f"what is {self.one(noun)}? {self.one(noun)} is {_a(kind)}",
            f"Question: what is {self.one(noun)}? Answer: {_a(kind)}",
            f"Question: is {self.one(noun)} {_a(kind)}? Answer: yes",
            f"there is {self.one(noun)} in the picture",
            f"there are two {self.many(noun)} in the picture",
            f"this is {self.one(noun)} and that is {self.one(other)}",
            f"one {noun}, two {self.nouns[noun].plural}, three {self.nouns[noun].plural}",
            f"i can see {self.one(noun)} and {self.one(other)}",
        ]
        if self.category(other) != self.category(noun):
            draws.append(f"Question: is {self.one(noun)} {_a(self.category(other))}? Answer: no")
        if self.colours.get(noun):
            colour = rng.choice(self.colours[noun])
            draws += [f"{self.one(noun)} can be {colour}", f"this is {self.one(noun, colour)}"]
        return rng.choice(draws)


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


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _outermost(scene: Scene, side: str) -> Placed | None:
    """The one object furthest to a side, clearly on that half of the image."""
    axis = 0 if side in ("left", "right") else 1
    sign = 1 if side in ("left", "above") else -1
    centres = sorted(
        (
            (sign * ((o.box[axis] + o.box[axis + 2]) / 2 / scene.side - 0.5), i)
            for i, o in enumerate(scene.objects)
        )
    )
    if centres[0][0] > -0.1 or (len(centres) > 1 and centres[1][0] - centres[0][0] < RELATION_DISTANCE * 0.8):
        return None
    return scene.objects[centres[0][1]]


def language_of(rows: Iterable[ObjectRow]) -> Language:
    """The language of a table's nouns and of the colours its pictures have."""
    rows = list(rows)
    colours: dict[str, set[str]] = {}
    for row in rows:
        if row.colour:
            colours.setdefault(row.noun, set()).add(row.colour)
    return Language(nouns_of(rows), {noun: tuple(sorted(names)) for noun, names in colours.items()})


@lru_cache(maxsize=1)
def standard() -> Language:
    """The language of objects.csv, which the functions below use."""
    return language_of(read_table())


def caption(scene: Scene, rng: random.Random) -> str:
    """`Language.caption` of the standard language."""
    return standard().caption(scene, rng)


def conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """`Language.conversation` of the standard language."""
    return standard().conversation(scene, rng)
