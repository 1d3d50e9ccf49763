"""Photographs without names, on which cut-outs are pasted and from which the stem's own answers are learnt.

Which they are, with licence and author, is photographs.csv. Nothing of it is among what photographs are measured on.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from default_model.qtresources import read_resource

TABLE = Path(__file__).with_name("photographs.csv")
PHOTOGRAPH_PX = 512  # longest side at most


@dataclass(frozen=True)
class PhotographRow:
    """One line of photographs.csv. `author` is "" where the package names none."""

    id: str
    package: str  # of Debian
    path: str  # in the package; "FILE.rcc:/PATH" is a file in a Qt resource file
    licence: str
    author: str


def read_photographs(path: Path = TABLE) -> list[PhotographRow]:
    """The rows of photographs.csv, in order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [PhotographRow(**row) for row in csv.DictReader(file)]


def build_photographs(folder: Path) -> int:
    """Writes FOLDER/photographs/ID.jpg of every row from the unpacked packages FOLDER/PACKAGE; their number."""
    rows, target = read_photographs(), folder / "photographs"
    target.mkdir(exist_ok=True)
    for row in rows:
        path = target / f"{row.id}.jpg"
        if not path.exists():
            partial = path.with_suffix(".part")
            shrink(_content(folder / row.package, row.path)).save(partial, "JPEG", quality=92)
            partial.rename(path)
    return len(rows)


def shrink(content: bytes, side: int = PHOTOGRAPH_PX) -> Image.Image:
    """An image file's content -> RGB, upright, longest side at most `side` px."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _content(package: Path, path: str) -> bytes:
    file, _, inner = path.partition(":/")
    content = (package / file).read_bytes()
    return read_resource(content, inner) if inner else content
