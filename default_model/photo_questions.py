"""Questions about photographs of one main thing; nothing is asked that its facts do not answer."""

from __future__ import annotations

import random

from default_model.asking import ABSENT, CANNOT_TELL, NO, YES, Asker, Focus, Option, Turn
from default_model.captions import hedge, photo_caption
from default_model.grammar import Grammar, a_category, category_plural, with_article
from default_model.photo import Photo
from default_model.qa import QA
from default_model.wordings import Split


class PhotoQuestions(Asker):
    """Asks about one photograph."""

    def __init__(self, grammar: Grammar, photo: Photo, rng: random.Random, split: Split = "train") -> None:
        super().__init__(grammar, rng, split)
        self.photo = photo
        self.name = photo.noun or hedge(photo)

    def _name(self) -> str | None:
        return self.photo.noun

    def _absent(self) -> str | None:
        """A noun of something that is not on the photograph, as far as its facts tell."""
        pool = self.grammar.not_shown(self.photo.noun, self.photo.category)
        return self.rng.choice(pool) if pool else None

    def _is_a(self, category: str) -> bool | None:
        """Whether the thing is of a category, None where that is not known."""
        if self.photo.noun is not None:
            return self.grammar.is_a(self.photo.noun, category)
        if self.photo.category is None:
            return None
        members = self.grammar.by_category.get(self.photo.category, ())
        return self.grammar.is_a(members[0], category) if members else None

    # -- the kinds

    def _object(self, opening: bool = True) -> QA:
        return self.ask("object.this" if self.chance(0.6) else "object.whole", self.name)

    def _description(self, opening: bool = True) -> QA:
        return self.ask("description.caption", photo_caption(self.grammar, self.photo, self.rng))

    def _color(self, opening: bool) -> QA | None:
        colour, noun = self.photo.colour, self.photo.noun
        if self.chance(ABSENT) and (absent := self._absent()) is not None:
            return self.color_of(absent, self.grammar.no(absent))
        if colour is None or (noun is None and not opening):
            return None
        if noun is None or (opening and self.chance(0.4)):
            return self.ask("color.it", colour)
        if colour != noun and self.chance(0.2):
            return self.color_check(noun, colour)
        return self.color_of(noun, colour)

    def _count(self, opening: bool) -> QA | None:
        noun = self._absent()
        return None if noun is None else self.ask("count.some", "0", many=self.grammar.many(noun))

    def _position(self, opening: bool) -> QA | None:
        noun = self._absent()
        return (
            None
            if noun is None
            else self.ask("position.where", self.grammar.no(noun), the=self.grammar.the(noun))
        )

    def _presence(self, opening: bool) -> QA | None:
        if self.chance(0.5):
            absent = self._absent()
            return None if absent is None else self.present(absent, False)
        fitting = [c for c in self.grammar.categories if self._is_a(c)]
        if fitting and (self.photo.noun is None or self.chance(0.15)):
            return self.present_category(self.rng.choice(fitting), True)
        return None if self.photo.noun is None else self.present(self.photo.noun, True)

    def _category(self, opening: bool) -> QA | None:
        return self.pick((3, self._which), (3.0 * opening, self._check))

    def _which(self) -> QA | None:
        """ "what animal is this?": its noun. Of a noun that is a category, "bird", the breed is asked instead."""
        fitting = [c for c in self.grammar.categories if self._is_a(c) and c != self.photo.noun]
        if not fitting:
            return None
        category = self.rng.choice(fitting)
        answer = self.photo.noun or CANNOT_TELL
        return self.ask("category.which", answer, category=category, categories=category_plural(category))

    def _check(self) -> QA | None:
        noun, yes = self.photo.noun, self.chance(0.5)
        if noun is not None and self.chance(0.4):
            other = noun if yes else self.grammar.absent([noun], self.rng)
            return self.ask("category.check", YES if yes else NO, a=self.grammar.one(other))
        if self.photo.breed is not None and self.chance(0.4):
            return self._check_breed(self.photo.breed, yes)
        if noun is None and self.photo.category is not None and self.chance(0.3):
            members = self.grammar.by_category.get(self.photo.category)
            if members:
                return self.ask("category.check", CANNOT_TELL, a=self.grammar.one(self.rng.choice(members)))
        fitting = [c for c in self.grammar.categories if self._is_a(c) is yes and c != noun]
        if not fitting:
            return None
        return self.ask("category.check", YES if yes else NO, a=a_category(self.rng.choice(fitting)))

    def _check_breed(self, breed: str, yes: bool) -> QA | None:
        others = [b for b in self.grammar.breeds.get(self.photo.noun or "", ()) if b != breed]
        if not yes and not others:
            return None
        return self.ask(
            "category.check", YES if yes else NO, a=with_article(breed if yes else self.rng.choice(others))
        )

    def _breed(self, opening: bool) -> QA | None:
        if self.chance(ABSENT) and (absent := self._absent()) in self.grammar.breeds:
            return self.ask_breed(absent, self.grammar.no(absent))
        noun = self.photo.noun
        if noun is None or noun not in self.grammar.breeds:
            return None
        return self.ask_breed(noun, self.photo.breed or CANNOT_TELL)

    # -- conversations

    def _openings(self) -> list[Option[Turn]]:
        focus = Focus(self.photo.noun or "", 1)
        return [
            (4, lambda: (self._object(), focus)),
            (2, lambda: (self._description(), focus)),
            (1, self._small_talk),
            (1.5, self._open_with_absent),
        ]

    def _open_with_absent(self) -> Turn | None:
        noun = self._absent()
        return (
            None if noun is None else (self.ask("presence.one", NO, a=self.grammar.one(noun)), Focus(noun, 0))
        )

    def _follow_ups(self, last: QA, focus: Focus | None) -> list[Option[Turn]]:
        options: list[Option[Turn]] = [(0.5, lambda: (self._description(), focus)), (0.4, self._small_talk)]
        if focus is None or last.kind == "nonsense":
            return [*options, (3, lambda: (self._object(), Focus(self.photo.noun or "", 1)))]
        if focus.number == 0:
            gone = self.grammar.no(focus.noun)
            options += [
                (3, lambda: (self.ask("color.it", gone), focus)),
                (3, lambda: (self.ask("position.it", gone), focus)),
            ]
            return options
        if self.photo.colour is not None and last.kind != "color":
            colour = self.photo.colour
            options.append((4, lambda: (self.ask("color.it", colour), focus)))
        if last.kind != "category":
            options.append((3, lambda: self._about(self._check())))
        if focus.noun in self.grammar.breeds and last.kind != "breed":
            breed = self.photo.breed or CANNOT_TELL
            it = self.chance(0.5)
            options.append((4, lambda: (self.ask_breed(focus.noun, breed, it=it), focus)))
        options.append((2, lambda: self._about(self._presence(False))))
        return options

    def _about(self, qa: QA | None) -> Turn | None:
        return None if qa is None else (qa, Focus(self.photo.noun or "", 1))
