"""What is to be captioned, listed lazily: folders, lists, tar shards, tables and COCO's JSON, in any mixture.

An `ImageItem` says where an image is; its bytes are read when it is its turn, so a list of any length costs no memory.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blip2.bulk.database import BulkError
from blip2.images import SUFFIXES, ImageError, check_size, is_hidden, is_image_name
from blip2.storage import TextFileError, read_json_text, read_rows, read_text, read_text_lines

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
LISTS, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
PATH_COLUMNS = ("image", "path", "file_name", "image_path", "filepath")
BYTES_COLUMNS = ("bytes", "image_bytes", "jpg", "png")
NO_PYARROW = "parquet needs pyarrow; pip install 'blip2[bulk]'"
IN_TABLE = -2


class ImageItem(NamedTuple):
    """One image to caption.

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
        if self.problem:
            named = self.problem.startswith(self.name)
            raise ImageError(self.problem if named else f"{self.name}: {self.problem}")
        if self.content is not None:
            return self.content
        path = Path(self.path)
        try:
            if not path.is_file():  # a pipe or a device would make reading wait
                device = path.exists() and not path.is_dir()
                what = "no regular file" if device else "no such file" + " (a folder?)" * path.is_dir()
                raise ImageError(f"{self.name}: {what}")
            check_size(path.stat().st_size if self.size < 0 else self.size, self.name)
            with path.open("rb") as file:
                file.seek(self.start)
                return file.read(self.size)
        except OSError as error:
            raise ImageError(
                f"{self.name}: cannot be read ({error.strerror or 'input/output error'})"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The images of a run, listed anew each time it is iterated over, in an order that is the same every time.

    sources: folders (searched through), image files, patterns, .txt lists of paths, .tar shards, .csv, .tsv and
        .parquet tables with a column of paths or bytes, .json as COCO's or a list of rows, .jsonl.
    include, exclude: patterns for the files of folders, such as '*.jpg' or 'train/*'.
    limit: the first so many of the items. shard: "i/n", the i-th of n equal parts, from 1.
    strict: False: a source that cannot be listed is an item with that as its problem, and so is one without images;
        the other sources follow.
    stdin: the image that the source "-" is.

    Raises:
        ValueError: no such part.
        BulkError: when iterated over: no such file or folder, or a list or table that cannot be read.
    """

    sources: Sequence[str]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    limit: int | None = None
    shard: str = "1/1"
    strict: bool = True
    stdin: bytes | None = None

    def __post_init__(self) -> None:
        part = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if part is None or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--shard {self.shard!r}: expected I/N with I from 1 to N, such as 1/8")

    def __iter__(self) -> Iterator[ImageItem]:
        part, parts = map(int, self.shard.split("/"))
        return itertools.islice(self._items(), part - 1, self.limit, parts)

    def check(self) -> None:
        """Raises BulkError where there is not one image."""
        if self.shard == "1/1" and next(iter(self), None) is None:
            suffixes = " ".join(sorted(SUFFIXES))
            raise BulkError(f"{' '.join(self.sources)}: no images found (folders: {suffixes})")

    def _items(self) -> Iterator[ImageItem]:
        # A slip is reported before the first image is read.
        for source in self.sources if self.strict else ():
            _check_exists(source)
        for source in self.sources:
            if source == "-" and self.stdin is not None:
                yield ImageItem("-", "-", content=self.stdin)
                continue
            empty = True
            try:
                for item in _source(source, len(self.sources) == 1, self.include, self.exclude):
                    empty = False
                    yield item
                if empty and not self.strict:
                    folder = f"the folder holds no images ({' '.join(self.include or sorted(SUFFIXES))})"
                    raise BulkError(f"{source}: {folder if os.path.isdir(source) else 'it lists no images'}")
            except BulkError as error:
                if self.strict:
                    raise
                yield ImageItem(source, source, problem=str(error))


def _check_exists(source: str) -> None:
    if source.startswith(("http:", "https:")):
        raise BulkError(f"{source}: no such file; URLs are not fetched here, download it first")
    if source == "-":
        raise BulkError("-: a run that can be continued needs a file; save the image, or leave out --out")
    if not os.path.exists(source) and not glob.has_magic(source):
        raise BulkError(f"{source}: no such file or folder")


def _source(source: str, single: bool, include: Sequence[str], exclude: Sequence[str]) -> Iterator[ImageItem]:
    _check_exists(source)
    paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise BulkError(f"{source}: no file matches this pattern")
    for path in paths:
        if os.path.isdir(path):
            # Of several folders, each keeps its name in a mirror folder.
            root = path if single and len(paths) == 1 else os.path.dirname(path.rstrip(os.sep))
            yield from _folder(path, root, include, exclude)
        else:
            yield from _file(path)


def _file(source: str) -> Iterator[ImageItem]:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        raise BulkError(f"{source}: in a compressed archive no image has a place to be read from; unpack it")
    if suffix in SUFFIXES or suffix not in (*LISTS, *TABLES, ".tar", ".json", ".jsonl"):
        yield ImageItem(source, source, root=os.path.dirname(source))
    else:
        try:
            if suffix == ".tar":
                yield from _tar(source)
            elif suffix == ".parquet":
                yield from parquet_items(source)
            else:
                status = os.stat(source)
                if suffix != ".json":
                    _check_rows(source, suffix, status.st_size, status.st_mtime_ns)
                yield from _rows(source, suffix)
        except (OSError, TextFileError, tarfile.TarError) as error:
            raise BulkError(
                f"{source}: cannot be read to its end ({error}); repair or leave it out"
            ) from error


def _folder(folder: str, root: str, include: Sequence[str], exclude: Sequence[str]) -> Iterator[ImageItem]:
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
            wanted = _fits(inner, include) if include else is_image_name(name)
            if wanted and not is_hidden(name) and not _fits(inner, exclude):
                yield ImageItem(path, path, root=root)


def _fits(path: str, patterns: Sequence[str]) -> bool:
    names = (path, os.path.basename(path))
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)


@functools.lru_cache(maxsize=64)
def _check_rows(source: str, suffix: str, size: int, modified_ns: int) -> None:
    """Read a list or table once to its end, so that what is wrong in it is reported before the first result."""
    for _ in read_text_lines(source) if suffix in LISTS else read_rows(source):
        pass


def _rows(source: str, suffix: str) -> Iterator[ImageItem]:
    root = os.path.dirname(source)
    if suffix in LISTS:
        for _, line in read_text_lines(source):
            if line:
                path = os.path.join(root, line)
                yield ImageItem(path, path, root=root)
    elif suffix != ".json":
        yield from (_row(row, source, i) for i, row in enumerate(read_rows(source), 1))
    else:
        content = read_json_text(read_text(source), source)
        rows = content.get("images") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise BulkError(f"{source}: expected COCO's object with `images`, or a list of rows")
        yield from (_row(row, source, i) for i, row in enumerate(rows, 1))


def _row(row: Any, source: str, place: int) -> ImageItem:
    if isinstance(row, str):
        row = {"image": row}
    value = next((row[key] for key in PATH_COLUMNS if row.get(key)), None) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise BulkError(f"{source}, row {place} names no image; expected one of {', '.join(PATH_COLUMNS)}")
    root = os.path.dirname(source)
    path = os.path.join(root, value)
    number = row.get("id", row.get("image_id"))
    if isinstance(number, str) and number.isdecimal():  # in CSV everything is text; COCO's ids are numbers
        number = int(number)
    return ImageItem(path, path, id=number if isinstance(number, int | str) else None, root=root)


def _column(source: str, names: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise BulkError(f"{source} has the columns {', '.join(names)}; expected one of {', '.join(wanted)}")


def _tar(source: str) -> Iterator[ImageItem]:
    with tarfile.open(source, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            if member.isreg() and is_image_name(member.name):
                name, root = f"{source}/{member.name}", os.path.dirname(source)
                yield ImageItem(name, source, member.offset_data, member.size, root=root)


def parquet_items(source: str, start: int = 1) -> Iterator[ImageItem]:
    """The images of a table, from its row `start` on."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BulkError(f"{source}: {NO_PYARROW}") from None
    root = os.path.dirname(source)
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            column = _column(source, file.schema_arrow.names, PATH_COLUMNS + BYTES_COLUMNS)
            group = place = 0
            while group < file.num_row_groups and place + file.metadata.row_group(group).num_rows < start:
                place += file.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, file.num_row_groups))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[column]):
                for value in batch.column(0).to_pylist():
                    place += 1
                    if place < start:
                        continue
                    # Hugging Face's image columns hold {"bytes": ..., "path": ...}
                    content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
                    if isinstance(content, str):
                        path = os.path.join(root, content)
                        yield ImageItem(path, path, root=root)
                    else:
                        name = f"{source}#{place}"
                        yield ImageItem(name, source, place, IN_TABLE, content=content or b"", root=root)
    except pyarrow.ArrowException as error:
        raise BulkError(f"{source}: no parquet file that can be read ({error})") from error
