"""Questions about composed scenes, as people ask them; all answers follow from the scene's objects."""

from __future__ import annotations

import random
from functools import cached_property

from default_model.asking import ABSENT, CANNOT_TELL, NO, NOTHING, YES, Asker, Focus, Option, Turn
from default_model.captions import scene_caption, some
from default_model.colours import COLOURS
from default_model.facts import (
    EDGES,
    OPPOSITE,
    PHRASES,
    Group,
    by_colour,
    empty_half,
    groups,
    neighbours,
    outermost,
    place_name,
)
from default_model.grammar import Grammar, a_category, category_plural, listed
from default_model.qa import QA
from default_model.scenes import Scene, relation
from default_model.wordings import Split


class SceneQuestions(Asker):
    """Asks about one scene."""

    def __init__(self, grammar: Grammar, scene: Scene, rng: random.Random, split: Split = "train") -> None:
        super().__init__(grammar, rng, split)
        self.scene, self.named = scene, groups(scene)
        self.alone = [g for g in self.named if len(g.members) == 1]

    @cached_property
    def _places(self) -> dict[str, str]:
        """Where each thing is that is the only one of its noun, unless that is ambiguous."""
        places = {g.noun: place_name(self.scene, g.members[0]) for g in self.alone}
        return {noun: place for noun, place in places.items() if place is not None}

    def _relation(self, a: Group, b: Group) -> str | None:
        return relation(self.scene.side, a.members[0], b.members[0])

    def _name(self) -> str:
        return self.rng.choice(self.named).noun

    def _absent(self) -> str:
        return self.grammar.absent([g.noun for g in self.named], self.rng)

    def _noun(self, group: Group) -> str:
        return group.noun if len(group.members) == 1 else self.grammar.many(group.noun)

    def _list(self, found: list[Group]) -> str:
        """ "cat", "cats", "a cat and two dogs"."""
        if len(found) == 1:
            return self._noun(found[0])
        return listed([some(self.grammar, group) for group in found])

    # -- what there is

    def _object(self, opening: bool) -> QA | None:
        return self.pick((3, self._whole), (3, self._this), (3, self._side), (1.5, self._coloured))

    def _whole(self) -> QA:
        return self.ask("object.whole", self._list(self.named))

    def _this(self) -> QA:
        if len(self.named) > 1:
            form = "object.several"
        else:
            form = "object.this" if len(self.scene.objects) == 1 else "object.these"
        return self.ask(form, self._list(self.named))

    def _side(self) -> QA | None:
        answers = {}
        for side, place in EDGES.items():
            if empty_half(self.scene, side):
                answers[place] = NOTHING
            elif (outer := outermost(self.scene, side)) is not None:
                answers[place] = outer.noun
        if not answers:
            return None
        place = self.rng.choice(list(answers))
        return self.ask("object.side", answers[place], side=place)

    def _coloured(self) -> QA | None:
        found = by_colour(self.named)
        if not found:
            return None
        colour, noun, _ = self.rng.choice(found)
        return self.ask("object.color", noun, color=colour)

    # -- colors

    def _color(self, opening: bool) -> QA | None:
        known = [g for g in self.named if g.colour is not None]
        if self.chance(ABSENT):
            noun = self._absent()
            return self.color_of(noun, self.grammar.no(noun))
        if not known:
            return None
        group = self.rng.choice(known)
        assert group.colour is not None
        if group in self.alone and group.colour != group.noun and self.chance(0.2):
            return self.color_check(group.noun, group.colour)
        if opening and len(self.named) == 1 and self.chance(0.4):
            return self.ask("color.it" if group in self.alone else "color.them", group.colour)
        if group in self.alone:
            return self.color_of(group.noun, group.colour)
        return self.ask("color.many", group.colour, those=f"the {self.grammar.many(group.noun)}")

    # -- numbers

    def _count(self, opening: bool) -> QA | None:
        return self.pick(
            (3, self._count_noun),
            (1, self._count_absent),
            (1, self._count_category),
            (1.2 * opening, self._count_all),
        )

    def _count_noun(self) -> QA:
        # Groups of several first: most objects are single, and "1" must not become the answer to everything.
        group = max(self.named, key=lambda g: (len(g.members) * self.rng.random(), g.noun))
        return self.ask("count.some", str(len(group.members)), many=self.grammar.many(group.noun))

    def _count_absent(self) -> QA:
        return self.ask("count.some", "0", many=self.grammar.many(self._absent()))

    def _count_category(self) -> QA | None:
        category = self._draw_category(self.chance(0.7))
        if category is None:
            return None
        number = sum(len(g.members) for g in self.named if self.grammar.is_a(g.noun, category))
        return self.ask("count.some", str(number), many=category_plural(category))

    def _count_all(self) -> QA:
        return self.ask("count.all", str(len(self.scene.objects)))

    def _draw_category(self, present: bool) -> str | None:
        """A category that some object is of, or none; and of every object people agree whether it is."""
        found = []
        for category in self.grammar.categories:
            of = [self.grammar.is_a(g.noun, category) for g in self.named]
            if None not in of and any(of) == present:
                found.append(category)
        return self.rng.choice(found) if found else None

    # -- what is present

    def _presence(self, opening: bool) -> QA | None:
        yes = self.chance(0.5)
        return self.pick(
            (1.5, lambda: self._present_coloured(yes)),
            (1, lambda: self._present_category(yes)),
            (6, lambda: self._present_noun(yes)),
        )

    def _present_coloured(self, yes: bool) -> QA | None:
        group = self.rng.choice(self.named)
        if group.colour in (None, group.noun):
            return None
        colour = (
            group.colour
            if yes
            else self.rng.choice([c for c in COLOURS if c not in (group.colour, group.noun)])
        )
        return self.ask("presence.one", YES if yes else NO, a=self.grammar.one(group.noun, colour))

    def _present_category(self, yes: bool) -> QA | None:
        category = self._draw_category(yes)
        return None if category is None else self.present_category(category, yes)

    def _present_noun(self, yes: bool) -> QA:
        noun = self.rng.choice(self.named).noun if yes else self._absent()
        return self.present(noun, yes)

    # -- places

    def _position(self, opening: bool) -> QA | None:
        return self.pick((3, self._where), (3, self._neighbor), (3, self._position_check))

    def _where(self) -> QA | None:
        if self.chance(ABSENT):
            noun = self._absent()
            return self.ask("position.where", self.grammar.no(noun), the=self.grammar.the(noun))
        if not self._places:
            return None
        noun = self.rng.choice(list(self._places))
        return self.ask("position.where", self._places[noun], the=self.grammar.the(noun))

    def _neighbor(self) -> QA | None:
        if self.chance(ABSENT / 2):
            noun, side = self._absent(), self.rng.choice(list(PHRASES))
            return self._beside(side, noun, self.grammar.no(noun))
        if len(self.scene.objects) == 1:
            return self._beside(self.rng.choice(list(PHRASES)), self.named[0].noun, NOTHING)
        found = neighbours(self.scene)
        return self._beside(*self.rng.choice(found)) if found else None

    def _beside(self, side: str, anchor: str, answer: str) -> QA:
        return self.ask("position.neighbor", answer, relation=PHRASES[side], the=self.grammar.the(anchor))

    def _position_check(self) -> QA | None:
        yes = self.chance(0.5)
        if not yes and self.chance(ABSENT):
            noun, phrase = self._absent(), self.rng.choice(list(EDGES.values()))
            return self.ask("position.check", NO, the=self.grammar.the(noun), phrase=phrase)
        found: list[tuple[str, str]] = []
        for a in self.alone:
            for b in self.alone:
                side = None if a is b else self._relation(a, b)
                if side is not None:
                    found.append(
                        (a.noun, f"{PHRASES[side if yes else OPPOSITE[side]]} {self.grammar.the(b.noun)}")
                    )
        for noun, place in self._places.items():
            sides = [side for side, edge in EDGES.items() if edge.split()[-1] in place]
            found += [(noun, EDGES[side if yes else OPPOSITE[side]]) for side in sides]
        if not found:
            return None
        noun, phrase = self.rng.choice(found)
        return self.ask("position.check", YES if yes else NO, the=self.grammar.the(noun), phrase=phrase)

    # -- description, category, breed

    def _description(self, opening: bool = True) -> QA:
        style = {"colour": self.chance(0.35), "relate": self.chance(0.7), "reverse": self.chance(0.15)}
        return self.ask("description.caption", scene_caption(self.grammar, self.scene, **style))

    def _category(self, opening: bool) -> QA | None:
        single = len(self.scene.objects) == 1
        return self.pick(
            (3, self._which),
            (3.0 * (opening and single), lambda: self._is_it("category.check")),
            (1.5, self._is_the),
        )

    def _which(self) -> QA | None:
        category = self._draw_category(self.chance(0.8))
        if category is None or category in [g.noun for g in self.named]:
            return None
        members = [g for g in self.named if self.grammar.is_a(g.noun, category)]
        answer = self._list(members) if members else f"there is no {category}"
        return self.ask("category.which", answer, category=category, categories=category_plural(category))

    def _is_it(self, form: str, noun: str = "", the: str = "") -> QA | None:
        """Whether the one thing, or a named one, is what it is, of a category, or something else."""
        noun = noun or self.named[0].noun
        yes = self.chance(0.5)
        if form == "category.check" and self.chance(0.4):
            thing = self.grammar.one(noun if yes else self.grammar.absent([noun], self.rng))
        else:
            fitting = [c for c in self.grammar.categories if self.grammar.is_a(noun, c) is yes and c != noun]
            if not fitting:
                return None
            thing = a_category(self.rng.choice(fitting))
        return self.ask(form, YES if yes else NO, a=thing, the=the)

    def _is_the(self) -> QA | None:
        if not self.alone:
            return None
        noun = self.rng.choice(self.alone).noun
        return self._is_it("category.of", noun, self.grammar.the(noun))

    def _breed(self, opening: bool) -> QA | None:
        return self.pick((1, self._unknown_breed), (1, self._absent_breed))

    def _unknown_breed(self) -> QA | None:
        nouns = [g.noun for g in self.named if g.noun in self.grammar.breeds]
        return self.ask_breed(self.rng.choice(nouns), CANNOT_TELL) if nouns else None

    def _absent_breed(self) -> QA | None:
        if not self.grammar.breeds:
            return None
        noun = self.rng.choice(list(self.grammar.breeds))
        if any(self.grammar.related(noun, g.noun) for g in self.named):
            return None
        return self.ask_breed(noun, self.grammar.no(noun))

    # -- conversations

    def _openings(self) -> list[Option[Turn]]:
        only = self.named[0] if len(self.named) == 1 else None
        focus = Focus(only.noun, len(only.members)) if only else None
        return [
            (4, lambda: (self._this(), focus)),
            (3, lambda: (self._whole(), focus)),
            (2, lambda: (self._description(), focus)),
            (3, self._open_with_side),
            (3, self._open_with_presence),
            (2, self._open_with_count),
            (2, self._open_with_color),
            (1, self._small_talk),
        ]

    def _open_with_side(self) -> Turn | None:
        qa = self._side()
        named = [g for g in self.alone if qa is not None and g.noun == qa.answer]
        return (qa, Focus(qa.answer, 1)) if qa is not None and named else None

    def _open_with_presence(self) -> Turn:
        if self.chance(0.4):
            noun = self._absent()
            return self.present(noun, False), Focus(noun, 0)
        group = self.rng.choice(self.named)
        return self.present(group.noun, True), Focus(group.noun, len(group.members))

    def _open_with_count(self) -> Turn:
        group = self.rng.choice(self.named)
        focus = Focus(group.noun, len(group.members))
        return self.ask("count.some", str(focus.number), many=self.grammar.many(group.noun)), focus

    def _open_with_color(self) -> Turn | None:
        known = [g for g in self.alone if g.colour is not None]
        if not known:
            return None
        group = self.rng.choice(known)
        return self.color_of(group.noun, group.colour or ""), Focus(group.noun, 1)

    def _follow_ups(self, last: QA, focus: Focus | None) -> list[Option[Turn]]:
        options: list[Option[Turn]] = [(0.5, lambda: (self._description(), focus)), (0.4, self._small_talk)]
        if focus is None or last.kind == "nonsense":
            options += [
                (2, lambda: (self._whole(), focus)),
                (3, lambda: self._any("color")),
                (3, lambda: self._any("position")),
                (3, lambda: self._any("presence")),
                (2, lambda: self._any("count")),
            ]
            return options
        if focus.number == 0:
            gone = self.grammar.no(focus.noun)
            options += [
                (3, lambda: (self.ask("color.it", gone), focus)),
                (3, lambda: (self.ask("position.it", gone), focus)),
            ]
            options.append((1, lambda: (self._whole(), None)))
            return options
        group = next(g for g in self.named if g.noun == focus.noun)
        named_all = last.kind == "object" and len(self.named) == 1
        if group.colour is not None and last.kind != "color":
            form, colour = "color.it" if focus.number == 1 else "color.them", group.colour
            options.append((5, lambda: (self.ask(form, colour), focus)))
        if last.kind != "count" and (focus.number > 1 or named_all):
            options.append((3, lambda: (self.ask("count.them", str(focus.number)), focus)))
        if last.kind in ("object", "presence"):
            more = YES if len(self.named) > 1 else NO
            options.append((1.5, lambda: (self.ask("presence.else", more), focus)))
        if focus.number == 1:
            options += self._about_one(last, group, focus)
        return options

    def _any(self, kind: str) -> Turn | None:
        qa = self.question(kind, opening=False)
        return None if qa is None else (qa, None)

    def _about_one(self, last: QA, group: Group, focus: Focus) -> list[Option[Turn]]:
        """What may be asked about a thing that was named last, the only one of its noun."""
        options: list[Option[Turn]] = []
        if group.noun in self._places and last.kind != "position":
            place = self._places[group.noun]
            options.append((4, lambda: (self.ask("position.it", place), focus)))
        if last.kind in ("object", "category"):
            options.append((2, lambda: _with(self._is_it("category.check", group.noun), focus)))
            if group.noun in self.grammar.breeds:
                options.append((0.5, lambda: (self.ask_breed(group.noun, CANNOT_TELL, it=True), focus)))
        others = [g for g in self.alone if g is not group]
        if len(self.scene.objects) == 2 and len(others) == 1:
            other = others[0]
            next_focus = Focus(other.noun, 1)
            if last.kind == "object" and last.answer == group.noun:
                options.append((4, lambda: (self.ask("object.other", other.noun), next_focus)))
            if last.kind == "color" and other.colour is not None:
                colour, the = other.colour, self.grammar.the(other.noun)
                options.append((4, lambda: (self.ask("color.other", colour), next_focus)))
                options.append((4, lambda: (self.ask("color.and", colour, the=the), next_focus)))
            side = self._relation(other, group)
            if side is not None:
                phrase = PHRASES[side]
                options.append(
                    (4, lambda: (self.ask("position.beside", other.noun, relation=phrase), next_focus))
                )
        return options


def _with(qa: QA | None, focus: Focus) -> Turn | None:
    return None if qa is None else (qa, focus)
