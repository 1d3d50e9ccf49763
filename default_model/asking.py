"""What questions about scenes and about photographs have in common: drawing them, nonsense, conversations."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from default_model.colours import COLOURS
from default_model.grammar import Grammar, a_category, category_plural
from default_model.qa import KINDS, QA
from default_model.wordings import Split, ask

T = TypeVar("T")
YES, NO, NOTHING = "yes", "no", "nothing"
CANNOT_TELL = "i cannot tell"
REPLIES = {  # to what is no question about the picture
    "gibberish": "i did not understand the question",
    "greeting": "hello, i can describe the picture",
    "thanks": "you are welcome",
    "about": "i can describe the picture and answer questions about it",
    "other": "i can only talk about the picture",
}
ABSENT = 0.15  # of questions about a color, a place, a breed: of something that is not there
GARBLED = 0.3  # of gibberish: letters at random
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Focus:
    """What "it" or "they" stands for in a conversation. number: how many there are, 0 if the picture has none."""

    noun: str
    number: int


Turn = tuple[QA, Focus | None]
Option = tuple[
    float, Callable[[], T | None]
]  # a weight, and what makes a question or finds that there is none


class Asker(ABC):
    """Asks about one picture. All randomness comes from `rng`; split: whose wordings are used."""

    def __init__(self, grammar: Grammar, rng: random.Random, split: Split) -> None:
        self.grammar, self.rng, self.split = grammar, rng, split

    def question(self, kind: str, *, opening: bool = True) -> QA | None:
        """A question of a kind, or None if the picture allows none.

        opening: nothing was asked before, so "it" means what the picture shows.

        Raises:
            ValueError: no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"no kind of question {kind!r}: it must be one of {', '.join(KINDS)}")
        found: QA | None = getattr(self, f"_{kind}")(opening)
        return found

    def conversation(self) -> list[QA]:
        """Two or three turns; later ones say "it" or "they" for what an earlier one named."""
        turn = self.pick(*self._openings())
        assert turn is not None, "a description can always be given"
        turns = [turn[0]]
        for _ in range(self.rng.choice((1, 1, 2))):
            turn = self.pick(*self._follow_ups(*turn))
            if turn is None or turn[0].question in [qa.question for qa in turns]:
                break
            turns.append(turn[0])
        return turns

    # -- tools

    def ask(self, form: str, answer: str, **slots: str) -> QA:
        """A question of a form, "color.one", with its answer."""
        return QA(ask(form, self.rng, self.split, **slots), answer, form.split(".")[0])

    def pick(self, *options: Option[T]) -> T | None:
        """The first of the options, in a random order that follows their weights, that there is a question for."""
        left = [option for option in options if option[0] > 0]
        while left:
            (option,) = self.rng.choices(left, [weight for weight, _ in left])
            found = option[1]()
            if found is not None:
                return found
            left.remove(option)
        return None

    def ask_breed(self, noun: str, answer: str, *, it: bool = False) -> QA:
        """What kind it is; of an animal also what breed. it: the noun was named just before."""
        forms = ("it", "its_breed") if it else ("what", "breed")
        animal = self.grammar.category(noun) == "animal"
        return self.ask(f"breed.{forms[animal and self.chance(0.5)]}", answer, one=noun)

    def color_of(self, noun: str, answer: str) -> QA:
        return self.ask("color.one", answer, the=self.grammar.the(noun))

    def color_check(self, noun: str, colour: str) -> QA:
        """Whether something has its color, or whether it has another one."""
        yes = self.chance(0.5)
        asked = colour if yes else self.rng.choice([c for c in COLOURS if c not in (colour, noun)])
        return self.ask("color.check", YES if yes else NO, the=self.grammar.the(noun), color=asked)

    def present(self, noun: str, yes: bool) -> QA:
        """Whether there is something of that name."""
        answer, draw = YES if yes else NO, self.rng.random()
        if draw < 0.25:
            return self.ask("presence.any", answer, many=self.grammar.many(noun))
        if draw < 0.4 and " " not in self.grammar.nouns[noun].article:
            return self.ask("presence.bare", answer, one=noun)
        return self.ask("presence.one", answer, a=self.grammar.one(noun))

    def present_category(self, category: str, yes: bool) -> QA:
        """Whether there is something of a category."""
        answer = YES if yes else NO
        if self.chance(0.5):
            return self.ask("presence.any", answer, many=category_plural(category))
        return self.ask("presence.one", answer, a=a_category(category))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # -- what every picture allows

    @abstractmethod
    def _name(self) -> str | None:
        """A noun of the picture."""

    @abstractmethod
    def _description(self, opening: bool) -> QA: ...

    @abstractmethod
    def _openings(self) -> list[Option[Turn]]: ...

    @abstractmethod
    def _follow_ups(self, last: QA, focus: Focus | None) -> list[Option[Turn]]: ...

    def _nonsense(self, opening: bool) -> QA:
        forms, weights = (*REPLIES, "unknown"), (5, 4, 2, 3, 3, 5)
        (form,) = self.rng.choices(forms, weights)
        if form == "unknown":
            noun = self._name()
            thing = "the thing" if noun is None else self.grammar.the(noun)
            return self.ask("nonsense.unknown", CANNOT_TELL, the=thing)
        if form == "gibberish" and self.split == "train" and self.chance(GARBLED):
            words = (
                "".join(self.rng.choices(LETTERS, k=self.rng.randint(2, 8)))
                for _ in range(self.rng.randint(1, 3))
            )
            return QA(" ".join(words), REPLIES[form], "nonsense")
        return self.ask(f"nonsense.{form}", REPLIES[form])

    def _small_talk(self) -> Turn:
        return self._nonsense(True), None
