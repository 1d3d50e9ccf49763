"""The sets the default model is judged on, and how: scenes of the test split under fixed numbers.

Backgrounds and combinations are unseen in training; the things themselves are known. Every function is deterministic.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache

from default_model.colours import COLOURS
from default_model.language import KINDS, NUMBERS, QA, Language
from default_model.scenes import Composer, Noun, Scene

# Ranges of scene numbers, so that no two sets share a scene.
SINGLES, MULTI, QUESTIONS, RETRIEVAL = 1_000_000, 2_000_000, 3_000_000, 4_000_000


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


def unseen_questions(composer: Composer, language: Language, n: int = 1000) -> Iterator[tuple[Scene, QA]]:
    """One question a scene, the kinds in turn."""
    number = QUESTIONS
    for i in range(n):
        while True:
            number += 1
            scene = composer.compose(number, "test")
            qa = language.question(scene, random.Random(number), KINDS[i % len(KINDS)])
            if qa is not None:
                yield scene, qa
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


@lru_cache(maxsize=8)
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    number = "|".join(["a", "an", *NUMBERS[1:], *(str(i) for i in range(1, 7))])
    return re.compile(
        rf"(?:\b({number})\s+)?(?:\b\w+ of\s+)?(?:\b(?:{'|'.join(COLOURS)})\s+)?(?<![\w-])({words})(?![\w-])"
    )


def named_objects(text: str, nouns: Mapping[str, Noun]) -> Counter[str]:
    """The things a text names, with their numbers; the longest name counts ("teddy bear" names no bear).

    A plural without a number counts as two.
    """
    forms: dict[str, str] = {}
    for noun, entry in nouns.items():
        forms[entry.plural] = noun
    for noun in nouns:  # after the plurals: a singular that is also another's plural wins
        forms[noun] = noun
    found: Counter[str] = Counter()
    for number, form in _pattern(tuple(sorted(forms))).findall(text.lower()):
        if number in NUMBERS:
            count = NUMBERS.index(number)
        elif number.isdigit():
            count = int(number)
        else:
            count = 1 if number or form in nouns else 2
        found[forms[form]] += count
    return found


def names_object(text: str, noun: str, nouns: Mapping[str, Noun]) -> bool:
    """True when the text names the thing, in the singular or the plural."""
    return named_objects(text, nouns)[noun] > 0


def counts_right(text: str, scene: Scene, nouns: Mapping[str, Noun]) -> bool:
    """True when the text names exactly the scene's things, each in its number."""
    return named_objects(text, nouns) == Counter(o.noun for o in scene.objects)
