"""The default model's own scenes: composed pictures of which it is known what they show.

A folder `scenes/` holds images and scenes.json: {"nouns": {singular: plural}, "singles": [...], "multi": [...],
"questions": [...], "retrieval": [...]}, a row {"image": file, "captions": [...], "things": {noun: number}, "question",
"answer", "kind"}. `python -m default_model.make_scenes` writes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blip2.data import DataError
from blip2.evaluate.tasks import Item, load_json, needed

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Scenes:
    """Four sets: one thing alone; two to four things; questions; captions that each fit one image. nouns: plurals."""

    nouns: Mapping[str, str]
    singles: list[Item]
    multi: list[Item]
    questions: list[Item]
    retrieval: list[Item]

    @property
    def sets(self) -> tuple[list[Item], ...]:
        """All four."""
        return self.singles, self.multi, self.questions, self.retrieval

    def first(self, limit: int | None) -> Scenes:
        """The first so many of each set."""
        return Scenes(self.nouns, *(items[:limit] for items in self.sets))


def read_scenes(data: Path | None) -> Scenes:
    """Read DIR/scenes. DataError: it is missing or cannot be understood."""
    path = (Path("DIR") if data is None else data) / "scenes/scenes.json"
    if data is None or not path.is_file():
        raise DataError(needed("scenes", Path("DIR") if data is None else data))
    content = load_json(path)
    sets = {
        name: [
            Item(
                f"{name}-{i}",
                path.parent / row["image"],
                tuple(row.get("captions", ())),
                row.get("question", ""),
                (row["answer"],) if "answer" in row else (),
                row.get("kind", ""),
                row.get("things", {}),
            )
            for i, row in enumerate(content[name])
        ]
        for name in ("singles", "multi", "questions", "retrieval")
    }
    return Scenes(content["nouns"], **sets)


@lru_cache(maxsize=8)
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    number = "|".join(["a", "an", *NUMBERS[1:], *(str(i) for i in range(1, 7))])
    return re.compile(
        rf"(?:\b({number})\s+)?(?:\b\w+ of\s+)?(?:\b(?:{'|'.join(COLOURS)})\s+)?(?<![\w-])({words})(?![\w-])"
    )


def named_things(text: str, nouns: Mapping[str, str]) -> Counter[str]:
    """The things a text names, with their numbers; the longest name counts ("teddy bear" names no bear).

    A plural without a number counts as two. nouns: each singular with its plural.
    """
    forms = {plural: noun for noun, plural in nouns.items()}
    forms |= {
        noun: noun for noun in nouns
    }  # after the plurals: a singular that is also another's plural wins
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


def names_all(text: str, things: Mapping[str, int], nouns: Mapping[str, str]) -> float:
    """1 where the text names every thing, in whatever number, else 0."""
    named = named_things(text, nouns)
    return float(all(named[noun] > 0 for noun in things))


def counts_right(text: str, things: Mapping[str, int], nouns: Mapping[str, str]) -> float:
    """1 where the text names exactly these things, each in its number, else 0."""
    return float(named_things(text, nouns) == Counter(things))
