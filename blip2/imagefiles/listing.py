"""Where users keep images: in folders and what is linked there, in tar shards, named by lists and tables."""

from __future__ import annotations

import fnmatch
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blip2.imagefiles.advice import UNREADABLE, missing_hint
from blip2.imagefiles.errors import ImageError
from blip2.imagefiles.names import is_hidden, is_image_name

PATH_COLUMNS = ("image", "path", "file_name", "image_path", "filepath")
_TEXT_COLUMNS = ("caption", "captions", "text", "answer", "answers")
_ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")


class ImageItem(NamedTuple):
    """One image, where it is; its bytes are read when it is its turn.

    name: what its rows are called; two items of one name are the same input.
    path: the file that holds it, and of that file `size` bytes from `start`; size -1: all of it.
    content: the bytes themselves, where a table brought them; then `start` is its row, from 1, and size IN_TABLE.
    id: the number that COCO's files give it.
    root: the folder its name is kept relative to in a mirror folder.
    problem: why it is not to be read at all.
    """

    name: str
    path: str
    start: int = 0
    size: int = -1
    content: bytes | None = None
    id: int | str | None = None
    root: str = ""
    problem: str = ""

    def read(self) -> bytes:
        """The bytes of the image file. Raises ImageError where they cannot be read."""
        from blip2.imagefiles.decode import check_size  # here, as it imports Pillow

        if self.problem:
            named = self.problem.startswith(self.name)
            raise ImageError(self.problem if named else f"{self.name}: {self.problem}")
        if self.content is not None:
            return self.content
        path = Path(self.path)
        try:
            if not path.is_file():  # a pipe or a device would make reading wait
                device = path.exists() and not path.is_dir()
                missing = "no such file" + (
                    " (a folder?)" if path.is_dir() else missing_hint(self.path, self.root)
                )
                raise ImageError(f"{self.name}: {'no regular file' if device else missing}")
            check_size(path.stat().st_size if self.size < 0 else self.size, self.name)
            with path.open("rb") as file:
                file.seek(self.start)
                return file.read(self.size)
        except OSError as error:
            raise ImageError(
                f"{self.name}: cannot be read ({error.strerror or 'input/output error'})"
            ) from error


def walk_images(
    folder: str, left_out: Counter[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Iterator[str]:
    """The paths of the images in a folder and the folders in it, in an order that is the same every time.

    Links to folders are followed, each folder once; what is hidden or the system's is none of the user's.

    Args:
        left_out: counts images of kinds that are not read, by their suffixes, while the folder is listed.
        include, exclude: patterns such as '*.jpg' or 'train/*'; with `include` a file of any suffix is an image.
    """
    top = os.path.realpath(folder)
    visited: set[str] = set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        own = os.path.normpath(os.path.join(top, os.path.relpath(place, folder)))
        inside = real.startswith(os.path.join(top, "")) and not is_hidden(os.path.relpath(real, top))
        # A folder within this one is listed under its own name, whatever links lead to it.
        if real in visited or (inside and real != own):
            names.clear()
            continue
        visited.add(real)
        names[:] = sorted(name for name in names if not is_hidden(name))
        for name in sorted(files):
            path = os.path.join(place, name)
            inner = os.path.relpath(path, folder)
            if is_hidden(name) or _fits(inner, exclude):
                continue
            if _fits(inner, include) if include else is_image_name(name):
                yield path
            elif not include:
                _count_unreadable(name, left_out)


def _count_unreadable(name: str, left_out: Counter[str]) -> None:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREADABLE:
        left_out[suffix] += 1


def _fits(path: str, patterns: Sequence[str]) -> bool:
    names = (path, os.path.basename(path))
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)


def tar_images(source: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    """The images of an uncompressed tar file; `left_out` as in `walk_images`. Raises OSError, tarfile.TarError."""
    root = os.path.dirname(source)
    with tarfile.open(source, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            if not member.isreg() or is_hidden(member.name):
                continue
            if is_image_name(member.name):
                name = f"{source}/{member.name}"
                yield ImageItem(name, source, member.offset_data, member.size, root=root)
            else:
                _count_unreadable(member.name, left_out)


def path_in(root: str, name: str) -> str:
    """The path of a file that a list or table names, relative to the folder `root`.

    In tables a byte of a name that is no UTF-8 is written as \\udcXX; the file is found again.
    """
    path = os.path.join(root, name)
    if "\\udc" in name and not os.path.lexists(path):
        unescaped = os.path.join(root, _ESCAPED_BYTE.sub(lambda byte: chr(int(byte[1], 16)), name))
        return unescaped if os.path.lexists(unescaped) else path
    return path


def is_failed_row(row: Any) -> bool:
    """Whether a row is of a run's output and holds an error in place of a text."""
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("error"), str)
        and row["error"] != ""
        and not any(row.get(name) for name in _TEXT_COLUMNS)
    )
