"""What is known about a photograph of one main thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Photo:
    """The facts about a photograph; everything else about it is unknown.

    noun: what it shows, one of the language's nouns. breed: a narrower name ("beagle" for a dog). category: the kind of
    thing ("animal"), known where the noun is not, too. colour: the main colour of the thing.
    """

    noun: str | None = None
    breed: str | None = None
    category: str | None = None
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.breed is not None and self.noun is None:
            raise ValueError(
                f"a photograph of the breed {self.breed!r} needs the noun: Photo('dog', 'beagle')"
            )
