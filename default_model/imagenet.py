"""The table imagenet.csv beside this file: ImageNet's 1,000 classes as the plain nouns that people use."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_name("imagenet.csv")


@dataclass(frozen=True)
class ImageNetClass:
    """One line of imagenet.csv: class `index` in the usual order, called `noun`.

    `article` goes before the noun ("a", "an", "a pair of"), `plural` has no counting word, `breed` is a narrower name
    ("beagle" for a dog) or "".
    """

    index: int
    wnid: str
    name: str
    noun: str
    plural: str
    article: str
    category: str
    breed: str


def read_imagenet(path: Path = TABLE) -> tuple[ImageNetClass, ...]:
    """The classes in their order.

    Raises:
        ValueError: a line that is not as described above; the message names it.
    """
    names = [field.name for field in fields(ImageNetClass)]
    classes = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; they must be {', '.join(names)}")
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: it must have {len(names)} values")
            if row["index"] != str(number):
                raise ValueError(
                    f"{path}, line {reader.line_num}: index {row['index']!r}, but {number} comes next"
                )
            if not re.fullmatch(r"n\d{8}", row["wnid"]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {row['wnid']!r} is no WordNet id such as n02084071"
                )
            for name in ("noun", "plural", "article", "category", "breed"):
                text = row[name]
                if text != text.lower().strip() or not (text or name in ("article", "breed")):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {name} {text!r} must be a lower-case word"
                    )
            classes.append(ImageNetClass(number, *(row[name] for name in names[1:])))
    return tuple(classes)
