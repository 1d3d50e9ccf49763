"""Photographs whose contents are known by noun: whether a caption names one, and whether a wrong caption is flagged.

A folder holds photos.jsonl, a row a photograph: {"image": "groceries/apple_0.jpg", "names": ["apple", "fruit"]}. A
caption is right if it holds one of the names, singular or plural, as whole words in any case.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from blip2.data.sources import DataError, is_text, read_annotations
from blip2.evaluate.names import TASK_FILES
from blip2.evaluate.tasks import EvalItem, EvalTask, files_needed
from blip2.imagefiles.listing import path_in
from blip2.results import Caption

# Endings of nouns and of their plurals, compounds included: "housewife", "policeman". What they make of another noun,
# "humen" of "human", is no word and does no harm, since the regular plural is tried too.
_IRREGULAR = {
    "calf": "calves", "dwarf": "dwarves", "elf": "elves", "half": "halves", "hoof": "hooves", "knife": "knives",
    "leaf": "leaves", "life": "lives", "loaf": "loaves", "scarf": "scarves", "sheaf": "sheaves", "thief": "thieves",
    "wharf": "wharves", "wife": "wives", "wolf": "wolves", "cactus": "cacti", "octopus": "octopi",
    "fungus": "fungi", "hippopotamus": "hippopotami", "child": "children", "die": "dice", "foot": "feet",
    "goose": "geese", "louse": "lice", "man": "men", "mouse": "mice", "ox": "oxen", "person": "people",
    "tooth": "teeth",
}  # fmt: skip
_TO_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
# Plurals that mean something else without their s: "a short man" names no shorts.
_PLURAL_ONLY = {
    "boxers", "briefs", "glasses", "goods", "greens", "news", "overalls", "shorts", "tights", "trunks", "woods",
}  # fmt: skip


def read_photos(data: Path | None, images: Path | None = None) -> EvalTask:
    """Read DIR/photos.jsonl; the images are relative to `images`, or to DIR. Rows of one image make one item.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    file, _ = TASK_FILES["photos"][0]
    if data is None or not (data / file).is_file():
        raise DataError(files_needed("photos", data))
    names: dict[str, list[str]] = {}
    left_out: list[str] = []
    for place, row in enumerate(read_annotations(data / file), 1):
        try:
            image, nouns = _photo(row)
        except DataError as error:
            left_out.append(f"row {place} {error}")
        else:
            names.setdefault(image, []).extend(nouns)
    items = [
        EvalItem(
            image,
            Path(path_in(str(images or data), image)),
            names=tuple(dict.fromkeys(nouns)),
            kind=_first_folder(image),
        )
        for image, nouns in names.items()
    ]
    return EvalTask("photos", "photos", items, about=str(data), own=True, left_out=tuple(left_out))


def _photo(row: Any) -> tuple[str, list[str]]:
    """A row's image, as a relative path, and its names. DataError: what is wrong, to be read after the row's place."""
    if not isinstance(row, Mapping):
        raise DataError(f"is a {type(row).__name__}, expected an object with `image` and `names`")
    image, names = row.get("image"), row.get("names")
    if not isinstance(image, str) or not image.strip():
        raise DataError(f"names no image; expected `image`, got {sorted(map(str, row))}")
    if not isinstance(names, list):
        raise DataError(f"({image}) has no list `names` of nouns, but {repr(names)[:80]}")
    if odd := [name for name in names if not is_text(name)]:
        raise DataError(f"({image}) holds {repr(odd[0])[:80]}, which is no text")
    nouns = [" ".join(name.split()) for name in names if name.strip()]
    if not nouns:
        raise DataError(f"({image}) has 0 names")
    return str(PurePath(image)), nouns


def _first_folder(image: str) -> str:
    """The first folder of a relative path; "" where there is none."""
    path = PurePath(image)
    return "" if path.is_absolute() or len(path.parts) == 1 else path.parts[0]


def noun_forms(noun: str) -> set[str]:
    """A noun in lower case, its plurals, and its singulars if it may be a plural.

    Plain rules, with both plurals where English has two ("zeros", "zeroes"). Of several words the last one changes, or
    the one before "of": "wine glasses", "glasses of wine".
    """
    head, of, rest = noun.lower().partition(" of ")
    before, space, word = head.rpartition(" ")
    forms = {word, *_plurals(word)}
    if noun.lower() not in _PLURAL_ONLY:
        forms |= {singular for singular in _singulars(word) if word in _plurals(singular)}
    return {before + space + form + of + rest for form in forms}


def _plurals(word: str) -> Iterator[str]:
    for singular, plural in _IRREGULAR.items():
        if word.endswith(singular):
            yield word.removesuffix(singular) + plural
    if re.search(r"[^aeiou]y$", word):
        yield word[:-1] + "ies"
    elif re.search(r"([sxz]|sh)$", word):
        yield word + "es"
    else:
        yield word + "s"
        if word.endswith(("o", "ch")):  # tomatoes but photos, peaches but stomachs
            yield word + "es"


def _singulars(word: str) -> Iterator[str]:
    """What may be the singular of a word, if that is a plural."""
    for plural, singular in _TO_SINGULAR.items():
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1:  # "as" is no plural of "a"
            yield word.removesuffix(ending) + instead


@lru_cache(maxsize=4096)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds each form of the names; a hyphen joins words into one, but in a name it is as good as a space."""
    forms = sorted({form for name in names for form in noun_forms(name)})
    words = (r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", form))) for form in forms)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])")


def names_one(caption: str, names: tuple[str, ...]) -> bool:
    """Whether a caption holds one of the names, singular or plural, as whole words; "a top hat" holds a top."""
    return _pattern(names).search(caption.lower()) is not None


def flagged(caption: Caption) -> bool | None:
    """Whether a caption is probably wrong by the model's calibration; None: the model has none."""
    return None if caption.probability_right is None else bool(caption.warnings)


def photo_metrics(
    items: Sequence[EvalItem], named: Sequence[bool], flags: Sequence[bool | None]
) -> dict[str, float | None]:
    """The shares of captions that name their photograph, by folder and by first name, and of those flagged.

    Args:
        named: for each item whether its caption is right.
        flags: for each item whether its caption was flagged, or None. Without any flag there are no shares of them;
            a share of no captions is None.
    """
    folders, nouns = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for item, right in zip(items, named, strict=True):
        folders[f"  of which {item.kind or '.'}/"].append(right)
        nouns[f"  of which {item.names[0]}"].append(right)
    metrics = {"named rightly": _share(named)}
    for groups in (folders, nouns):
        metrics |= {name: _share(group) for name, group in sorted(groups.items()) if len(groups) > 1}
    if any(flag is not None for flag in flags):
        for what, state in (("wrong", False), ("right", True)):
            of_these = [bool(flag) for flag, right in zip(flags, named, strict=True) if right is state]
            metrics[f"flagged of {what} captions"] = _share(of_these)
    return metrics


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
