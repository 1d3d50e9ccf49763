"""The default model's own scenes: composed pictures whose contents are known.

A folder `scenes/` holds images and scenes.json: {"nouns": {singular: plural}, "singles": [...], "multi": [...],
"questions": [...], "natural": [...], "retrieval": [...]}, a row {"image": file, "captions": [...], "things": {noun:
number}, "question", "answer", "kind"}. `python -m default_model.make_scenes` writes it. Older files have no "natural".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from blip2.data.sources import DataError, read_annotations
from blip2.evaluate.tasks import EvalItem, ImageFile, files_needed, sound_items
from blip2.images import ImageSource

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
LetterCase = Literal["lower", "sentence", "title", "upper"]
LETTER_CASES: tuple[LetterCase, ...] = ("lower", "sentence", "title", "upper")
SETS = ("singles", "multi", "questions", "natural", "retrieval")


@dataclass(frozen=True)
class Scenes:
    """Five sets: single things; two to four things; questions in plain wordings; questions as people ask them, in every
    letter case; captions that fit one image each. nouns: plurals."""

    nouns: Mapping[str, str]
    singles: list[EvalItem]
    multi: list[EvalItem]
    questions: list[EvalItem]
    natural: list[EvalItem]
    retrieval: list[EvalItem]

    @property
    def _sets(self) -> tuple[list[EvalItem], ...]:
        return tuple(getattr(self, name) for name in SETS)

    @property
    def items(self) -> list[EvalItem]:
        """Those of all sets."""
        return [item for items in self._sets for item in items]

    def first(self, limit: int | None) -> Scenes:
        """The scenes with the first `limit` items of each set."""
        return Scenes(self.nouns, *(items[:limit] for items in self._sets))

    def without(self, images: Container[ImageFile]) -> Scenes:
        """The scenes without the items of these images."""
        return Scenes(self.nouns, *(sound_items(items, images) for items in self._sets))


def read_scenes(data: Path | None) -> Scenes:
    """Read DIR/scenes. DataError: it is missing or cannot be understood."""
    path = None if data is None else data / "scenes/scenes.json"
    if path is None or not path.is_file():
        raise DataError(files_needed("scenes", data))
    content = read_annotations(path)
    rows = {"natural": []} | content
    sets = {
        name: [scene_item(f"{name}-{i}", path.parent / row["image"], row) for i, row in enumerate(rows[name])]
        for name in SETS
    }
    return Scenes(content["nouns"], **sets)


def scene_item(id: str, image: ImageSource, row: Mapping[str, Any]) -> EvalItem:
    """An item from a row of scenes.json, with the image it is about."""
    answers = (row["answer"],) if "answer" in row else ()
    captions, question = tuple(row.get("captions", ())), row.get("question", "")
    return EvalItem(id, image, captions, question, answers, row.get("kind", ""), row.get("things", {}))


def in_case(text: str, case: LetterCase) -> str:
    """A lower-case text as it is, or as people type it: Sentence case, Title Case, UPPER CASE."""
    if case == "upper":
        return text.upper()
    if case == "title":
        return re.sub(r"(?<!\S)[a-z]", lambda match: match[0].upper(), text)
    if case == "sentence":
        return re.sub(r"\bi\b|^[a-z]|(?<=[.?!] )[a-z]", lambda match: match[0].upper(), text)
    return text


@lru_cache(maxsize=8)
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    number = "|".join(["a", "an", *NUMBERS[1:], *(str(i) for i in range(1, 7))])
    return re.compile(
        rf"(?:\b({number})\s+)?(?:\b\w+ of\s+)?(?:\b(?:{'|'.join(COLOURS)})\s+)?(?<![\w-])({words})(?![\w-])"
    )


def named_things(text: str, nouns: Mapping[str, str]) -> Counter[str]:
    """The things that a text names, with their numbers; the longest name counts ("teddy bear" names no bear).

    A plural without a number counts as two. nouns: each singular with its plural.
    """
    forms = {plural: noun for noun, plural in nouns.items()}
    forms |= {noun: noun for noun in nouns}  # last: a singular that is also another's plural wins
    things: Counter[str] = Counter()
    for number, form in _pattern(tuple(sorted(forms))).findall(text.lower()):
        if number in NUMBERS:
            count = NUMBERS.index(number)
        elif number.isdigit():
            count = int(number)
        else:
            count = 1 if number or form in nouns else 2
        things[forms[form]] += count
    return things


def names_all(text: str, things: Mapping[str, int], nouns: Mapping[str, str]) -> float:
    """1.0 if the text names every thing, in any number, else 0.0."""
    named = named_things(text, nouns)
    return float(all(named[noun] > 0 for noun in things))


def counts_right(text: str, things: Mapping[str, int], nouns: Mapping[str, str]) -> float:
    """1.0 if the text names exactly these things, each in its number, else 0.0."""
    return float(named_things(text, nouns) == Counter(things))
