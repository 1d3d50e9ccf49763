"""What can be read off a scene: which objects are of one kind, where they are, what is beside what."""

from __future__ import annotations

from dataclasses import dataclass

from default_model.scenes import RELATION_DISTANCE, Placed, Scene, relation

PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
EDGES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


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


def outermost(scene: Scene, side: str) -> Placed | None:
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


def empty_half(scene: Scene, side: str) -> bool:
    """Whether no object reaches into that half of the image."""
    middle = scene.side / 2
    if side in ("left", "above"):
        return all(o.box[0 if side == "left" else 1] >= middle for o in scene.objects)
    return all(o.box[2 if side == "right" else 3] <= middle for o in scene.objects)


def neighbours(scene: Scene) -> list[tuple[str, str, str]]:
    """(relation, anchor, noun) wherever one object alone, of that noun, is on that side of the anchor.

    The anchor is the only one of its noun, so that it can be named.
    """
    alone = [g.members[0] for g in groups(scene) if len(g.members) == 1]
    found = []
    for anchor in alone:
        others = [o for o in scene.objects if o is not anchor]
        sides = [relation(scene.side, o, anchor) for o in others]
        if None in sides and len(others) > 1:
            continue
        for side in PHRASES:
            beside = [o for o, s in zip(others, sides, strict=True) if s == side]
            if len(beside) == 1:
                found.append((side, anchor.noun, beside[0].noun))
    return found


def by_colour(named: list[Group]) -> list[tuple[str, str, str]]:
    """(colour, noun, "object" or "shape") where the colour identifies a single object of the scene."""
    if any(g.colour is None or len(g.members) > 1 for g in named):
        return []
    colours = [g.colour for g in named]
    word = "shape" if all(g.is_shape for g in named) else "object"
    return [(g.colour, g.noun, word) for g in named if g.colour is not None and colours.count(g.colour) == 1]
