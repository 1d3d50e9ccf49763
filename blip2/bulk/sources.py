"""What is to be captioned, listed lazily: folders, lists, tar shards, tables and COCO's JSON, in any mixture.

An `ImageItem` says where an image is; its bytes are read when it is its turn, so a list of any length costs no memory.
A row or file that is no image is an item with that as its `problem`, and the others follow.
"""

from __future__ import annotations

import codecs
import functools
import glob
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip2.bulk.database import BulkError
from blip2.imagefiles.advice import FAILED_ROWS, left_out_text, missing_hint
from blip2.imagefiles.listing import PATH_COLUMNS, is_failed_row, path_in, tar_images, walk_images
from blip2.imagefiles.listing import ImageItem as ImageItem
from blip2.imagefiles.names import SUFFIXES, is_url
from blip2.storage import (
    TextFileError,
    parquet_columns,
    read_json_text,
    read_parquet,
    read_rows,
    read_text,
    read_text_lines,
)

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
LISTS, TABLES = (".txt", ".lst"), (".csv", ".tsv", ".parquet")
BYTES_COLUMNS = ("bytes", "image_bytes", "jpg", "png")
IN_TABLE = -2


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
    left_out: what has been passed over in what was listed so far; `advice.left_out_text` says it.

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
    left_out: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        part = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if part is None or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--shard {self.shard!r}: expected I/N with I from 1 to N, such as 1/8")

    def __iter__(self) -> Iterator[ImageItem]:
        part, parts = map(int, self.shard.split("/"))
        left_out: Counter[str] = Counter()
        try:
            yield from itertools.islice(self._items(left_out), part - 1, self.limit, parts)
        finally:  # listed again, it is the same
            for what, count in left_out.items():
                self.left_out[what] = max(count, self.left_out[what])

    def check(self) -> None:
        """Raises BulkError where there is not one image."""
        if self.shard == "1/1" and next(iter(self), None) is None:
            found = left_out_text(self.left_out) or f"in folders these are: {' '.join(sorted(SUFFIXES))}"
            raise BulkError(f"{' '.join(self.sources)}: no images found; {found}")

    def _items(self, left_out: Counter[str]) -> Iterator[ImageItem]:
        # A slip is reported before the first image is read.
        for source in self.sources if self.strict else ():
            _check_exists(source)
        for source in self.sources:
            if source == "-" and self.stdin is not None:
                yield ImageItem("-", "-", content=self.stdin)
                continue
            empty = True
            try:
                for item in self._source(source, left_out):
                    empty = False
                    yield item
                if empty and not self.strict:
                    folder = f"the folder holds no images ({' '.join(self.include or sorted(SUFFIXES))})"
                    raise BulkError(f"{source}: {folder if os.path.isdir(source) else 'it lists no images'}")
            except BulkError as error:
                if self.strict:
                    raise
                yield ImageItem(source, source, problem=str(error))

    def _source(self, source: str, left_out: Counter[str]) -> Iterator[ImageItem]:
        _check_exists(source)
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            raise BulkError(f"{source}: no file matches this pattern")
        for path in paths:
            if os.path.isdir(path):
                # Of several folders, each keeps its name in a mirror folder.
                single = len(self.sources) == len(paths) == 1
                root = path if single else os.path.dirname(path.rstrip(os.sep))
                for image in walk_images(path, left_out, include=self.include, exclude=self.exclude):
                    yield ImageItem(image, image, root=root)
            else:
                yield from _file(path, left_out)


def _check_exists(source: str) -> None:
    if is_url(source):
        raise BulkError(f"{source}: no such file{missing_hint(source)}")
    if source == "-":
        raise BulkError("-: a run that can be continued needs a file; save the image, or leave out --out")
    if not os.path.exists(source) and not glob.has_magic(source):
        raise BulkError(f"{source}: no such file or folder{missing_hint(source)}")


def _file(source: str, left_out: Counter[str]) -> Iterator[ImageItem]:
    suffix = os.path.splitext(source)[1].lower()
    if suffix in PACKED:
        raise BulkError(f"{source}: in a compressed archive no image has a place to be read from; unpack it")
    if suffix in SUFFIXES or suffix not in (*LISTS, *TABLES, ".tar", ".json", ".jsonl"):
        yield ImageItem(source, source, root=os.path.dirname(source))
        return
    try:
        if suffix == ".tar":
            yield from tar_images(source, left_out)
        elif suffix == ".parquet":
            yield from parquet_items(source, left_out=left_out)
        elif suffix in LISTS:
            _check_list(source, *_version(source))
            yield from _list(source)
        else:
            rows = _json_rows(source) if suffix == ".json" else read_rows(source)
            if suffix != ".json":
                _check_table(source, *_version(source))
            for place, row in enumerate(rows, 1):
                if is_failed_row(row):
                    left_out[FAILED_ROWS] += 1
                else:
                    yield _row(row, source, place)
    except (OSError, TextFileError, tarfile.TarError) as error:
        raise BulkError(f"{source}: cannot be read to its end ({error}); repair or leave it out") from error


def _version(source: str) -> tuple[int, int]:
    status = os.stat(source)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _check_list(source: str, size: int, modified_ns: int) -> None:
    """Read a list once to its end, so that what is wrong in it is reported before the first result."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(source, "rb") as file:
            while block := file.read(1 << 20):
                if b"\0" in block or (b"\n" not in block and len(block) == 1 << 20):
                    break  # no text, or too long a line, perhaps
                decoder.decode(block)
            else:
                decoder.decode(b"", final=True)
                return
    except UnicodeDecodeError:
        pass
    for _ in read_text_lines(source):  # line by line it takes many times as long, and tells which
        pass


@functools.lru_cache(maxsize=64)
def _check_table(source: str, size: int, modified_ns: int) -> None:
    """As `_check_list`, of a table."""
    _check_rows(read_rows(source), source)


def _check_rows(rows: Iterable[Any], source: str) -> None:
    """Raises BulkError where there are rows and not one names an image."""
    count, usable, first = 0, 0, None
    for row in rows:
        first = row if count == 0 else first
        count += 1
        usable += isinstance(_path_of(row), str) or is_failed_row(row)
    if count and not usable:
        got = ", ".join(map(repr, first)) if isinstance(first, dict) else _kind(first)
        expected = f"expected one of {', '.join(PATH_COLUMNS)}, got {got[:200]}"
        raise BulkError(f"{source}, row 1 names no image; {expected}; neither does any other row")


def _list(source: str) -> Iterator[ImageItem]:
    root = os.path.dirname(source)
    for _, line in read_text_lines(source):
        if line and not line.isspace():
            yield _at_path(root, line)


def _at_path(root: str, name: str, number: int | str | None = None) -> ImageItem:
    """The image that a list or table names by a path."""
    path = path_in(root, name)
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    return ImageItem(path, path, id=number, root=root, problem="" if possible else "no such file")


def _json_rows(source: str) -> list[Any]:
    """A list of rows, or COCO's `images`."""
    content = read_json_text(read_text(source), source)
    rows = content.get("images") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise BulkError(f"{source}: expected COCO's object with `images`, or a list of rows")
    _check_rows(rows, source)
    return rows


def _path_of(row: Any) -> Any:
    """What a row names as its image; None where it names none."""
    return next((row[key] for key in PATH_COLUMNS if row.get(key)), None) if isinstance(row, dict) else row


def _row(row: Any, source: str, place: int) -> ImageItem:
    value, root = _path_of(row), os.path.dirname(source)
    if not isinstance(value, str) or not value:
        problem = f"expected a path as one of {', '.join(PATH_COLUMNS)}, got {_kind(value)}"
        return ImageItem(f"{source}#{place}", source, root=root, problem=problem)
    number = row.get("id", row.get("image_id")) if isinstance(row, dict) else None
    if isinstance(number, str) and number.isdecimal():  # in CSV everything is text; COCO's ids are numbers
        number = int(number)
    return _at_path(root, value, number if isinstance(number, int | str) else None)


_WORDS = {
    type(None): "nothing", bool: "a truth value", int: "a number", float: "a number", list: "a list",
    dict: "an object without such a value", str: "an empty text", bytes: "no bytes",
}  # fmt: skip


def _kind(value: Any) -> str:
    """What a value is, in words."""
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def _column(source: str, names: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise BulkError(f"{source} has the columns {', '.join(names)}; expected one of {', '.join(wanted)}")


def parquet_items(source: str, start: int = 1, left_out: Counter[str] | None = None) -> Iterator[ImageItem]:
    """The images of a table, from its row `start` on. left_out: as in `Inputs`, of these rows."""
    try:
        column = _column(source, parquet_columns(source), PATH_COLUMNS + BYTES_COLUMNS)
        for place, row in enumerate(
            read_parquet(source, (column, "error", "caption", "answer"), start), start
        ):
            if not is_failed_row(row):
                yield _table_item(row[column], source, place)
            elif left_out is not None:
                left_out[FAILED_ROWS] += 1
    except TextFileError as error:
        raise BulkError(str(error)) from error


def _table_item(value: Any, source: str, place: int) -> ImageItem:
    """value: a path, the bytes of a file, or as Hugging Face's image columns hold them {"bytes": ..., "path": ...}."""
    root, content = os.path.dirname(source), value
    if isinstance(value, dict):
        content = value.get("bytes") or value.get("path") or value
    if isinstance(content, str) and content:
        return _at_path(root, content)
    item = ImageItem(f"{source}#{place}", source, place, IN_TABLE, root=root)
    if isinstance(content, bytes) and content:
        return item._replace(content=content)
    return item._replace(problem=f"expected the path or the bytes of an image, got {_kind(content)}")
