"""Nouns with their grammar, and what may be said of them: noun phrases, categories, names that may both be true."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from default_model.overlaps import same_thing
from default_model.scenes import Noun
from default_model.together import may_show
from default_model.words import ANIMALS, ASKABLE, CATEGORY_PLURALS, UNCLEAR, UNIT_PLURALS

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


class Grammar:
    """Speaks of known nouns. Immutable but for what it has computed before; randomness comes from `rng` arguments."""

    def __init__(self, nouns: Mapping[str, Noun], breeds: Mapping[str, Iterable[str]] | None = None) -> None:
        """breeds: for a noun, the narrower names its pictures may have: "beagle" for a dog."""
        self.nouns = dict(nouns)
        self.breeds = {noun: tuple(names) for noun, names in (breeds or {}).items()}
        self.all = sorted(self.nouns)
        self.by_category: dict[str, list[str]] = {}
        for name in self.all:
            self.by_category.setdefault(self.nouns[name].category, []).append(name)
        self.categories = tuple(c for c in ASKABLE if any(self.is_a(noun, c) for noun in self.all))
        self._related = self._names_alike()
        self._not_shown: dict[tuple[str | None, str | None], list[str]] = {}

    # -- noun phrases

    def one(self, noun: str, colour: str | None = None) -> str:
        """ "a dog", "an orange hat", "a pair of black scissors"."""
        article = self.nouns[noun].article
        if colour is None or colour == noun:  # never "an orange orange"
            return f"{article} {noun}"
        return f"{with_article(colour)} {noun}" if article in ("a", "an") else f"{article} {colour} {noun}"

    def many(self, noun: str, colour: str | None = None) -> str:
        """ "dogs", "orange hats", "pairs of black scissors"."""
        entry = self.nouns[noun]
        unit = ""
        if " " in entry.article:
            word = entry.article.split()[1]
            unit = UNIT_PLURALS.get(word, word + "s") + " of "
        return f"{unit}{colour + ' ' if colour and colour != noun else ''}{entry.plural}"

    def the(self, noun: str) -> str:
        """ "the dog", "the pair of scissors"."""
        unit = self.nouns[noun].article.split()[1:]
        return " ".join(["the", *unit, noun])

    def no(self, noun: str) -> str:
        """ "there is no dog", "there is no pair of scissors"."""
        return f"there is no {self.the(noun).removeprefix('the ')}"

    # -- categories

    def category(self, noun: str) -> str:
        """The word for the kind of object; "animal" for birds and fish too."""
        category = self.nouns[noun].category
        return "animal" if category in ANIMALS else category

    def is_a(self, noun: str, category: str) -> bool | None:
        """Whether an object of that name is of a category of `ASKABLE`; None where people would disagree."""
        own = self.nouns[noun].category
        if category in (own, self.category(noun), noun):
            return True
        return None if own in UNCLEAR.get(category, ()) or category == "shape" else False

    # -- names that may both be true

    def related(self, a: str, b: str) -> bool:
        """Whether an object called `a` might also be called `b`."""
        return a in self._related[b]

    def _names_alike(self) -> dict[str, frozenset[str]]:
        """For each noun those that may be true of the same object: they share a word, are its category, or overlap."""
        sharing: dict[str, set[str]] = {}
        for noun in self.all:
            for word in _stems(noun):
                sharing.setdefault(word, set()).add(noun)
        alike = {}
        for noun in self.all:
            related = set().union(*(sharing[word] for word in _stems(noun)))
            related |= {other for other in self.all if same_thing(noun, other)}
            related |= {self.nouns[noun].category, *self.by_category.get(noun, ())}
            alike[noun] = frozenset(related)
        return alike

    def absent(self, present: Iterable[str], rng: random.Random) -> str:
        """A noun that fits nothing of what is present; half of the time of the category of one of them."""
        present = list(present)
        for _ in range(60):
            pool = self.all
            if rng.random() < 0.5:
                pool = self.by_category[self.nouns[rng.choice(present)].category]
            noun = rng.choice(pool)
            if not any(self.related(noun, other) for other in present):
                return noun
        return next(noun for noun in self.all if noun not in present)

    def not_shown(self, noun: str | None, category: str | None) -> list[str]:
        """Nouns of what a photograph of a noun, or of anything of a category, does not show."""
        key = (noun, category if noun is None else None)
        if key not in self._not_shown:
            possible = self.by_category.get(category or "", []) if noun is None else [noun]
            self._not_shown[key] = [
                other
                for other in (self.all if possible else ())
                if not any(may_show(one, other) or self.related(one, other) for one in possible)
            ]
        return self._not_shown[key]


def with_article(word: str) -> str:
    """ "a dog", "an animal"."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def a_category(category: str) -> str:
    """A category after "is it": "an animal", but "food"."""
    return category if category == "food" else with_article(category)


def category_plural(category: str) -> str:
    """ "animals", "pieces of clothing"."""
    return CATEGORY_PLURALS.get(category, category + "s")


def listed(phrases: list[str]) -> str:
    """ "a cat", "a cat and a ball", "a cat, a ball and two dogs"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _stems(noun: str) -> set[str]:
    """The words of a noun without a plural's ending: two nouns that share one may name the same thing."""
    words = noun.replace("-", " ").split()
    return {word.removesuffix("s") for word in words} - {"of", "and", "t"}
