"""What the stem may say of a photograph: probabilities of names, imagined for any noun.

Training has no photographs of most nouns. What the rest of the model sees of one is mainly the stem's probabilities,
and those can be imagined: how sharp they are is taken from unlabelled photographs, which names they confuse from how
alike their codes' classes are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from default_model.namer import Names
from default_model.photo import Photo

UNSURE = 0.06  # below this probability of the likeliest noun, a caption names none
SURE_OF_CATEGORY = 0.5  # the probability of a category that is named in place of a noun
BREED_SHARE = 0.5  # of a noun's probability that one of its names must have to be called the breed
WRONG = 0.15  # of what is imagined has another name first
SHOWN = 6  # nouns that a slot holds

Weighted = Sequence[tuple[int, float]]  # names, by index, with probabilities


@dataclass(frozen=True)
class Sight:
    """What a photograph shows as far as the stem can tell. photo: what is said of it; nouns, breeds: probabilities."""

    photo: Photo
    nouns: dict[str, float]
    breeds: dict[str, float]


class Evidence:
    """Draws probabilities of names for photographs that do not exist, and reads those of photographs that do."""

    def __init__(
        self,
        names: Names,
        categories: dict[str, str],
        alike: Sequence[Sequence[int]],
        patterns: Sequence[tuple[Sequence[float], Sequence[float]]],
    ) -> None:
        """alike: for each name, those it may be confused with, the likeliest first, of classes and of cut-outs' nouns
        alike.

        patterns: of unlabelled photographs: the sorted probabilities of the classes, and of the cut-outs' nouns.
        """
        self.names, self.categories, self.patterns = names, categories, patterns
        first = names.classes
        self.near_classes = [[n for n in row if n < first] for row in alike]
        self.near_learned = [[n for n in row if n >= first] for row in alike]
        self.by_noun: dict[str, list[int]] = {}
        for index, noun in enumerate(names.nouns):
            self.by_noun.setdefault(noun, []).append(index)
        self.nouns = sorted(self.by_noun)

    def imagine(self, rng: random.Random) -> dict[int, float]:
        """The probabilities of names that a photograph of some noun might have."""
        noun = rng.choice(self.nouns)
        sharp, soft = rng.choice(self.patterns)
        own = self.by_noun[noun]
        first = self.names.classes
        classes, learned = [n for n in own if n < first], [n for n in own if n >= first]
        start = rng.choice(own)
        out: dict[int, float] = {}
        for pattern, own_here, near in (
            (sharp, classes, self.near_classes[start]),
            (soft, learned, self.near_learned[start]),
        ):
            order = [rng.choice(own_here)] if own_here else []
            # Names alike first, but not always in the same order.
            order += sorted(
                (n for n in near if n not in order), key=lambda n: near.index(n) + rng.expovariate(1 / 6)
            )
            if own_here and rng.random() < WRONG:
                order[0], order[1] = order[1], order[0]
            for name, p in zip(order, pattern, strict=False):
                out[name] = out.get(name, 0.0) + p
        return out

    def sight(self, probabilities: dict[int, float], rng: random.Random, colour: str | None = None) -> Sight:
        """What is said of a photograph whose names have these probabilities.

        The noun is drawn from the probabilities half of the time (from all nouns where they leave a rest), so that the
        model's own follow them, and is the likeliest otherwise.
        """
        nouns: dict[str, float] = {}
        for name, p in probabilities.items():
            nouns[self.names.nouns[name]] = nouns.get(self.names.nouns[name], 0.0) + p
        best = sorted(nouns, key=nouns.__getitem__, reverse=True)[:SHOWN]
        nouns = {noun: nouns[noun] for noun in best}
        breeds = {
            self.names.breeds[name]: p
            for name, p in probabilities.items()
            if self.names.breeds[name] and p > BREED_SHARE * nouns.get(self.names.nouns[name], 1.0)
        }
        if nouns[best[0]] < UNSURE:
            totals: dict[str, float] = {}
            for noun, p in nouns.items():
                category = self.categories[noun]
                totals[category] = totals.get(category, 0.0) + p
            category = max(totals, key=totals.__getitem__)
            sure = totals[category] > SURE_OF_CATEGORY * sum(totals.values())
            return Sight(Photo(None, None, category if sure else None, colour), nouns, breeds)
        noun = best[0]
        if rng.random() < 0.5:
            rest = max(0.0, 1 - sum(nouns.values()))
            noun = rng.choices([*best, rng.choice(self.nouns)], [*nouns.values(), rest])[0]
        breed = next((b for b in breeds if noun == self._noun_of_breed(b)), None)
        return Sight(Photo(noun, breed, self.categories[noun], colour), nouns, breeds)

    def _noun_of_breed(self, breed: str) -> str:
        return self.names.nouns[self.names.breeds.index(breed)]

    def vector(self, probabilities: dict[int, float]) -> Tensor:
        """[K + P]."""
        out = torch.zeros(len(self.names.nouns))
        for name, p in probabilities.items():
            out[name] = p
        return out


def stored(facts: dict[str, Any]) -> dict[int, float]:
    """The probabilities that the bank keeps of a photograph."""
    return {int(name): float(p) for name, p in facts["names"]}
