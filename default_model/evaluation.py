"""The sets the default model is evaluated on: scenes of the test split with fixed numbers.

Backgrounds and combinations do not occur in training; the objects themselves do. Every function is deterministic.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from blip2.evaluate.scenes import LETTER_CASES, in_case, named_things
from default_model.grammar import Grammar
from default_model.language import Language
from default_model.plain_questions import PLAIN_KINDS, plain_question
from default_model.qa import KINDS, QA
from default_model.scenes import Composer, Noun, Scene

# Ranges of scene numbers, so that no two sets share a scene.
SINGLES, MULTI, QUESTIONS, RETRIEVAL, NATURAL = 1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000


def stamp_singles(composer: Composer, n: int = 1000) -> Iterator[Scene]:
    """One stamp alone on an unseen background; every stamp about equally often."""
    ids = [row.id for row in composer.cutouts.rows if row.source == "stamps"]
    random.Random(SINGLES).shuffle(ids)
    for i in range(n):
        yield composer.compose(SINGLES + i, "test", objects=1, cutout=ids[i % len(ids)])


def multi_scenes(composer: Composer, n: int = 500) -> Iterator[Scene]:
    """Scenes of two to four objects."""
    for i in range(n):
        yield composer.compose(MULTI + i, "test", objects=2 + i % 3)


def unseen_questions(composer: Composer, n: int = 1000) -> Iterator[tuple[Scene, QA]]:
    """One question a scene in a plain wording, the kinds in turn."""
    grammar, number = Grammar(composer.nouns), QUESTIONS
    for i in range(n):
        while True:
            number += 1
            scene = composer.compose(number, "test")
            qa = plain_question(grammar, scene, random.Random(number), PLAIN_KINDS[i % len(PLAIN_KINDS)])
            if qa is not None:
                yield scene, qa
                break


def natural_questions(composer: Composer, language: Language, n: int = 1080) -> Iterator[tuple[Scene, QA]]:
    """One question a scene in a wording that training never has; kinds and letter cases in turn."""
    kinds = [kind for kind in KINDS if kind != "breed" or language.breeds]
    number = NATURAL
    for i in range(n):
        kind, case = kinds[i % len(kinds)], LETTER_CASES[i // len(kinds) % len(LETTER_CASES)]
        while True:
            number += 1
            scene = composer.compose(number, "test")
            qa = language.question(scene, random.Random(number), kind, "test")
            if qa is not None:
                yield scene, replace(qa, question=in_case(qa.question, case))
                break


def retrieval_pairs(composer: Composer, language: Language, n: int = 1000) -> Iterator[tuple[Scene, str]]:
    """Scenes with captions such that no other scene of the set has the same things in the same numbers."""
    seen: set[tuple[tuple[str, int], ...]] = set()
    number = RETRIEVAL
    while len(seen) < n:
        number += 1
        scene = composer.compose(number, "test", objects=(1, 2, 2, 2, 3, 3, 3, 4, 4, 4)[number % 10])
        content = tuple(sorted(Counter(o.noun for o in scene.objects).items()))
        if content not in seen:
            seen.add(content)
            yield scene, language.canonical_caption(scene)


def named_objects(text: str, nouns: Mapping[str, Noun]) -> Counter[str]:
    """The objects a text names, with their numbers; see `blip2.evaluate.scenes.named_things`."""
    return named_things(text, {noun: entry.plural for noun, entry in nouns.items()})


def names_object(text: str, noun: str, nouns: Mapping[str, Noun]) -> bool:
    """Whether the text names the object, in the singular or the plural."""
    return named_objects(text, nouns)[noun] > 0


def counts_right(text: str, scene: Scene, nouns: Mapping[str, Noun]) -> bool:
    """Whether the text names exactly the scene's objects, each in its number."""
    return named_objects(text, nouns) == Counter(o.noun for o in scene.objects)
