"""What the stem says of a photograph, as probabilities of names: read from stored ones, and imagined for any noun.

Training has no photographs of most nouns. What the rest of the model sees of one is mainly the stem's probabilities,
and those can be imagined: how sharp they are is taken from unlabelled photographs, which names they confuse from the
classifier's weights and from how it errs about cut-outs (`namer.alike`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from default_model.namer import Names
from default_model.photo import Photo

EVIDENCE_FILE = "evidence.json"  # what `Evidence` is made of, in the folder of the run
UNSURE = 0.06  # below this probability of the likeliest noun, a caption names none
SURE_OF_CATEGORY = 0.5  # the probability of a category that is named in place of a noun
SURE_OF_BREED = 0.5  # as above, of the breed, as a share of its noun's probability
WRONG = 0.15  # of what is imagined has another name first
SHOWN = 6  # nouns that a slot holds, at most
DRAWN = 0.5  # of what is said names a noun drawn from the probabilities, and not the likeliest

NameProbabilities = dict[int, float]  # by the index of the name; names left out have none


@dataclass(frozen=True)
class Sight:
    """What a photograph shows as far as the stem can tell. photo: what is said of it; nouns, breeds: probabilities."""

    photo: Photo
    nouns: dict[str, float]
    breeds: dict[str, float]


class Evidence:
    """Imagines the probabilities of names for photographs that do not exist, and says what a photograph shows."""

    def __init__(
        self,
        names: Names,
        categories: dict[str, str],
        alike: Sequence[Sequence[int]],
        patterns: Sequence[tuple[Sequence[float], Sequence[float]]],
    ) -> None:
        """categories: of every noun. alike: for each name the classes and the learned nouns it is most easily taken
        for, as `namer.alike` gives them. patterns: of unlabelled photographs, as `namer.patterns` gives them.
        """
        self.names, self.categories, self.patterns = names, categories, patterns
        first = names.classes
        self.near_classes = [[n for n in row if n < first] for row in alike]
        self.near_learned = [[n for n in row if n >= first] for row in alike]
        self.by_noun: dict[str, list[int]] = {}
        for index, noun in enumerate(names.nouns):
            self.by_noun.setdefault(noun, []).append(index)
        self.nouns = sorted(self.by_noun)

    def imagine(self, rng: random.Random) -> NameProbabilities:
        """The largest probabilities of names that a photograph of some noun might have; they sum to at most one."""
        noun = rng.choice(self.nouns)
        sharp, soft = rng.choice(self.patterns)
        own = self.by_noun[noun]
        first = self.names.classes
        classes, learned = [n for n in own if n < first], [n for n in own if n >= first]
        start = rng.choice(own)
        out: NameProbabilities = {}
        for pattern, ours, near in (
            (sharp, classes, self.near_classes[start]),
            (soft, learned, self.near_learned[start]),
        ):
            order = [rng.choice(ours)] if ours else []
            # Names alike first, but not always in the same order.
            order += sorted(
                (n for n in near if n not in order), key=lambda n: near.index(n) + rng.expovariate(1 / 6)
            )
            if ours and rng.random() < WRONG:
                order[0], order[1] = order[1], order[0]
            out |= zip(order, pattern, strict=False)  # the pattern is shorter
        return out

    def sight(self, probabilities: NameProbabilities, rng: random.Random, colour: str | None = None) -> Sight:
        """What is said of a photograph whose names have these probabilities.

        The noun is drawn from the probabilities half of the time (from all nouns where they leave a rest), so that the
        model's own follow them, and is the likeliest otherwise.
        """
        nouns = sums((self.names.nouns[name], p) for name, p in probabilities.items())
        best = sorted(nouns, key=nouns.__getitem__, reverse=True)[:SHOWN]
        nouns = {noun: nouns[noun] for noun in best}
        breeds = {
            self.names.breeds[name]: p
            for name, p in probabilities.items()
            if self.names.breeds[name] and p > SURE_OF_BREED * nouns.get(self.names.nouns[name], 1.0)
        }
        if nouns[best[0]] < UNSURE:
            category = self._sure_category(nouns)
            return Sight(Photo(None, None, category, colour), nouns, breeds)
        noun = best[0]
        if rng.random() < DRAWN:
            rest = max(0.0, 1 - sum(nouns.values()))
            noun = rng.choices([*best, rng.choice(self.nouns)], [*nouns.values(), rest])[0]
        breed = next((b for b in breeds if noun == self._noun_of_breed(b)), None)
        return Sight(Photo(noun, breed, self.categories[noun], colour), nouns, breeds)

    def _sure_category(self, nouns: dict[str, float]) -> str | None:
        """The category that has most of the nouns' probability."""
        totals = sums((self.categories[noun], p) for noun, p in nouns.items())
        category = max(totals, key=totals.__getitem__)
        return category if totals[category] > SURE_OF_CATEGORY * sum(totals.values()) else None

    def _noun_of_breed(self, breed: str) -> str:
        return self.names.nouns[self.names.breeds.index(breed)]

    def vector(self, probabilities: NameProbabilities) -> Tensor:
        """The probabilities of all names, [K + P]."""
        out = torch.zeros(len(self.names.nouns))
        for name, p in probabilities.items():
            out[name] = p
        return out


def sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The sum of each key's numbers."""
    out: dict[str, float] = {}
    for key, number in pairs:
        out[key] = out.get(key, 0.0) + number
    return out
