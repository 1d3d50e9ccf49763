"""A journal's rows as the file or folder a user asked for: written beside its place, handed to the disk, renamed."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from blip2.bulk.journal import GO_ON, BulkError, Journal, Row, disk_error
from blip2.bulk.sources import IN_TABLE, ImageItem, parquet_items
from blip2.images import SUFFIXES, ImageError
from blip2.storage import NO_PYARROW, encode_text, replace_file

_BY_SUFFIX = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".json": "coco", ".tar": "webdataset"}
ERRORS = "errors.jsonl"  # beside the journal


def format_of(out: Path, requested: str | None) -> str:
    """The format of a name: that of its suffix, text files beside the images for a folder.

    Raises:
        BulkError: a suffix that names none, a folder where a file is to be, or what writes it is not installed.
    """
    kind = requested or _BY_SUFFIX.get(out.suffix.lower(), "txt")
    if kind == "txt" and requested is None and out.suffix and not out.is_dir():
        raise BulkError(f"--out {out}: what format is {out.suffix}? Name it with --format")
    if kind != "txt" and out.is_dir():
        raise BulkError(f"--out {out}: there is a folder of this name; name a file")
    # Better now than when all is captioned.
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise BulkError(f"--out {out}: {NO_PYARROW}")
    return kind


def state_folder(out: Path, kind: str) -> Path:
    """Where the journal of an output lies."""
    return out / ".blip2" if kind == "txt" else out.parent / f".{out.name}.blip2"


def sidecar(item: ImageItem, out: Path) -> str:
    """The text file of an image, relative to `out`: beside the image where that lies in `out`, else as in its root."""
    inside = os.path.relpath(item.name, out)
    if item.path != item.name or inside.split(os.sep)[0] == os.pardir:
        inside = os.path.relpath(item.name, item.root)
        if item.size >= 0:  # of s.tar, the files are in s/
            inside = inside.replace(os.path.basename(item.path) + os.sep, Path(item.path).stem + os.sep, 1)
    parts = ["__" if part == os.pardir else part for part in inside.split(os.sep)]
    stem, ending = os.path.splitext(os.sep.join(parts))
    return stem + (ending if ending.startswith(".parquet#") else "") + ".txt"


def flat(rows: Iterable[Row]) -> Iterator[Row]:
    """One row a text, as `--json` prints them, and the hash of the image's bytes."""
    for row in rows:
        if "error" in row:
            yield {"image": row["image"], "error": row["error"]}
        for text in row.get("texts", ()):
            yield {"image": row["image"], **text} | ({"hash": row["hash"]} if "hash" in row else {})


@contextmanager
def _writing(path: Path, *, sync_name: bool = True) -> Iterator[Path]:
    """`replace_file`; what the disk refuses is a BulkError."""
    try:
        with replace_file(path, sync_name=sync_name) as beside:
            yield beside
    except OSError as error:
        raise disk_error(path, error) from error


def _text_file(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="")


def _lines_of(row: Row) -> str:
    """A row's texts, a line each."""
    return "\n".join(text.get("caption", text.get("answer")) for text in row["texts"])


def _valid(row: Row) -> Row:
    """A row whose strings are UTF-8: of a file name that is not, the bytes are written out."""
    return {
        k: v.encode(errors="backslashreplace").decode() if isinstance(v, str) else v for k, v in row.items()
    }


def _line(value: Any) -> str:
    # A file name that is no UTF-8 holds surrogates: as escapes the line stays JSON and the name exact.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()


def _jsonl(rows: Iterable[Row], path: Path) -> None:
    with _text_file(path) as file:
        file.writelines(_line(row) + "\n" for row in flat(rows))


_COLUMNS = ("image", "question", "caption", "answer", "score", "logprob", "match", "hash", "error")


def _csv(rows: Iterable[Row], path: Path) -> None:
    with _text_file(path) as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        table.writerows(map(_valid, flat(rows)))


def _coco_id(name: str) -> int | str:
    """The number that COCO's own file names hold; of other images the name."""
    number = re.fullmatch(r"(?:COCO_.+_)?(\d{12})", Path(name).stem)
    return int(number[1]) if number else name


def _coco(rows: Iterable[Row], path: Path) -> None:
    """COCO's results file: [{"image_id", "caption"}, ...]; failed images are not in it."""
    comma = ""
    with _text_file(path) as file:
        file.write("[")
        for row in rows:
            for text in row.get("texts", ())[:1]:
                number = row.get("id", _coco_id(row["image"]))
                result = {"image_id": number, "caption": text.get("caption", text.get("answer"))}
                file.write(comma + _line(result))
                comma = ",\n"
        file.write("]\n")


def _parquet(rows: Iterable[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = ("score", "logprob", "match")
    schema = pa.schema([(name, pa.float64() if name in numbers else pa.string()) for name in _COLUMNS])
    with pq.ParquetWriter(path, schema) as writer:
        block: list[Row] = []
        for row in flat(rows):
            block.append(_valid(row))
            if len(block) == 10_000:
                writer.write_table(pa.Table.from_pylist(block, schema))
                block = []
        writer.write_table(pa.Table.from_pylist(block, schema))


def _shard(out: Path, number: int) -> Path:
    """The name of a webdataset shard: OUT-000000.tar, ..."""
    return out.with_name(f"{out.stem}-{number:06d}.tar")


def _write_shard(journal: Journal, out: Path, number: int) -> None:
    """A webdataset shard of rows that succeeded: images as they were, captions as .txt, rows as .json."""
    with _writing(_shard(out, number)) as beside, tarfile.open(beside, mode="w") as archive:
        rows = journal.succeeded_rows(number)
        for i, (row, image) in enumerate(_with_images(rows), number * journal.SHARD_SIZE):
            record = _line({"image": row["image"], "hash": row["hash"], "texts": row["texts"]})
            for ending, content in (
                (_ending(row["image"], image), image),
                (".txt", _lines_of(row).encode()),
                (".json", record.encode()),
            ):
                member = tarfile.TarInfo(f"{i:09d}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _with_images(rows: Iterable[Row]) -> Iterator[tuple[Row, bytes]]:
    """Rows in the order of the inputs, each with the bytes of the image that was captioned."""
    table: Iterator[ImageItem] = iter(())
    opened = ""
    for row in rows:
        path, start, size = row["at"]
        try:
            if size != IN_TABLE:
                content = ImageItem(row["image"], path, start, size).read()
            else:  # a table is read once, for all of its rows
                if path != opened:
                    table, opened = parquet_items(path, start), path
                content = next((item.content for item in table if item.start == start), None) or b""
        except (ImageError, OSError) as error:
            raise BulkError(
                f"{error}, and its shard is still to be written; put it back and {GO_ON}"
            ) from error
        if hashlib.sha256(content).hexdigest() != row["hash"]:
            raise BulkError(
                f"{row['image']} has changed since it was captioned, and its shard is still to be written; "
                f"put it back and {GO_ON}"
            )
        yield row, content


def _ending(name: str, content: bytes) -> str:
    """Of the file in a shard: that of the image's name, else what its content is."""
    ending = os.path.splitext(name)[1].lower()
    if ending in SUFFIXES:
        return ending
    if content.startswith(b"\x89PNG"):  # Pillow alone may refuse it for what is beside the pixels
        return ".png"
    with Image.open(io.BytesIO(content)) as image:  # it was decoded before
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format or "", f".{image.format}".lower())


def write_done(journal: Journal, rows: Sequence[Row], out: Path, kind: str) -> None:
    """Write what the journal's last rows have completed: their text files, or the shards that they have made full.

    Raises:
        BulkError: the disk refuses, or an image of a shard is no longer what was captioned.
    """
    if kind == "txt":
        for row in rows:
            if "sidecar" in row and "texts" in row:
                content = row.get("before", "") + _lines_of(row) + row.get("after", "") + "\n"
                path = out / row["sidecar"]
                with _writing(path, sync_name=False) as beside:  # there may be millions of them
                    beside.write_bytes(encode_text(content, *row.get("form", ())))
    elif kind == "webdataset":
        earlier = journal.succeeded - sum("error" not in row for row in rows)
        for number in range(earlier // journal.SHARD_SIZE, journal.succeeded // journal.SHARD_SIZE):
            _write_shard(journal, out, number)


def write_rest(journal: Journal, out: Path, kind: str) -> None:
    """Write what takes all rows: the file, or the shards that are missing or not full; and the rows that failed.

    Until all of a file is on the disk the old one stays. Raises as `write_done`.
    """
    if kind == "webdataset":
        full, others = divmod(journal.succeeded, journal.SHARD_SIZE)
        for number in range(max(1, full + bool(others))):
            if number == full or not _shard(out, number).exists():
                _write_shard(journal, out, number)
    elif kind != "txt":
        with _writing(out) as beside:
            {"jsonl": _jsonl, "csv": _csv, "coco": _coco, "parquet": _parquet}[kind](journal.rows(), beside)
    if journal.failed:
        with _writing(journal.path.with_name(ERRORS)) as beside:
            _jsonl((row for row in journal.rows() if "error" in row), beside)
