"""Rows as the files a user asked for: their names, and what is in them."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from blip2.bulk.database import GO_ON, BulkError, Row, Stamp, refuse_old_state
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import IN_TABLE, ImageItem, parquet_items
from blip2.images import SUFFIXES, ImageError
from blip2.storage import NO_PYARROW, TextFileError, encode_text, output_file, read_text

_BY_SUFFIX = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".json": "coco", ".tar": "webdataset"}
_BLANK = 64  # bytes that may be no more than marks and line ends
COLUMNS = ("image", "question", "caption", "answer", "score", "logprob", "match", "hash", "error")
JUDGED = ("probability_right", "abstained")  # further columns where the model is calibrated
NUMBERS = ("score", "logprob", "match", "probability_right")  # of these


def columns_of(settings: RunSettings) -> tuple[str, ...]:
    """The columns of a table."""
    return COLUMNS if settings.threshold is None else (*COLUMNS, *JUDGED)


def table_form(settings: RunSettings) -> list[Any]:
    """Encoding, mark, line end and columns of a table, as we write it until a user saves it in another form."""
    return ["utf-8", "", *(["\n", None] if settings.kind == "jsonl" else ["\r\n", columns_of(settings)])]


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
    """Where the database of an output lies."""
    return out / ".blip2" if kind == "txt" else out.parent / f".{out.name}.blip2"


def check_output(out: Path, kind: str) -> None:
    """See that an output can be written, before any work.

    Raises:
        OutputError: it is a link to no regular file, a device, a pipe, a socket or read-only.
        BulkError: it is a file where a folder is to be, or an earlier version's.
    """
    try:
        refuse_old_state(state_folder(out, kind))
    except OSError as error:  # a name that is too long for it, a folder that is closed
        raise BulkError(
            f"--out {out}: its database cannot be kept beside it ({error.strerror}); name another"
        ) from error
    if kind != "txt":
        output_file(out)
    elif (out.exists() or out.is_symlink()) and not out.is_dir():
        raise BulkError(
            f"--out {out}: text files go into a folder, and this is none; name another, or --format"
        )


def stamp_of(path: Path | str) -> Stamp | None:
    """Size and time of a file; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def file_hash(path: Path, ours: bytes | None = None) -> bytes | None:
    """The SHA-256 of a file; None where it is not there, or holds nothing but space.

    ours: what was written there, which may be a text that is empty.

    Raises:
        OutputError: it is no regular file.
        OSError: it cannot be read.
    """
    stamp = stamp_of(output_file(path))
    if stamp is None:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return None if digest != ours and stamp[0] <= _BLANK and _is_blank(path) else digest


def _is_blank(path: Path) -> bool:
    try:
        return not read_text(path).strip()
    except TextFileError:
        return False


def sidecar(item: ImageItem, out: Path) -> str:
    """The text file of an image, relative to `out`: beside the image where that lies in `out`, else as in its root."""
    inside = os.path.relpath(item.name, out)
    if item.size != -1 or inside.split(os.sep)[0] == os.pardir:
        inside = os.path.relpath(item.name, item.root)
        if item.size >= 0:  # of s.tar, the files are in s/
            inside = inside.replace(os.path.basename(item.path) + os.sep, Path(item.path).stem + os.sep, 1)
    parts = ["__" if part == os.pardir else part for part in inside.split(os.sep)]
    stem, ending = os.path.splitext(os.sep.join(parts))
    return stem + (ending if ending.startswith(".parquet#") else "") + ".txt"


def styled(text: Row, prefix: str, suffix: str) -> Row:
    """A text's row with something around the text."""
    key = "answer" if "answer" in text else "caption"
    return text | {key: f"{prefix}{text[key]}{suffix}"} if key in text else text


def texts_of(rows: Iterable[Row]) -> list[str]:
    """The captions or the answers in rows of texts, without those that were left out."""
    return [
        str(row["answer"] if "answer" in row else row["caption"]) for row in rows if "abstained" not in row
    ]


def is_flagged(row: Row, threshold: float | None) -> bool:
    """Whether an input has captions of a calibrated model, and all of them are less likely to be right than that."""
    judged = [text["probability_right"] for text in row.get("texts", ()) if "probability_right" in text]
    return threshold is not None and bool(judged) and max(judged) < threshold


def flat(rows: Iterable[Row], prefix: str = "", suffix: str = "") -> Iterator[Row]:
    """One row a text, as `--json` prints them, and the hash of the image's bytes."""
    for row in rows:
        if "error" in row:
            yield {"image": row["image"], "error": row["error"]}
        for text in row.get("texts", ()):
            digest = {"hash": row["hash"]} if "hash" in row else {}
            yield {"image": row["image"], **styled(text, prefix, suffix), **digest}


def json_line(value: Any) -> str:
    """A value as a line of JSON."""
    # A file name that is no UTF-8 holds surrogates: as escapes the line stays JSON and the name exact.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()


def valid(text: str) -> str:
    """A text as UTF-8 can hold it: of a file name that is no Unicode, the bytes are written out."""
    return text.encode(errors="backslashreplace").decode()


def table_line(row: Row, kind: str) -> str:
    """A flat row as a line of JSONL; of CSV, its cells as a JSON object."""
    if kind == "jsonl":
        return json_line(row)
    row = row | ({"abstained": "true"} if "abstained" in row else {})
    return json.dumps({name: valid(str(row[name])) if name in row else "" for name in (*COLUMNS, *JUDGED)})


def write_table(lines: Iterable[str], path: Path, form: Sequence[Any]) -> None:
    """Write JSONL, or CSV where the form has columns, of what `table_line` gives."""
    encoding, mark, newline, columns = form
    with path.open("w", encoding=encoding, errors="backslashreplace", newline="") as file:
        file.write(mark)
        if columns is None:
            file.writelines(line + newline for line in lines)
            return
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator=newline)
        table.writeheader()
        table.writerows(map(json.loads, lines))


def _coco_id(name: str) -> int | str:
    """The number that COCO's own file names hold; of other images the name."""
    number = re.fullmatch(r"(?:COCO_.+_)?(\d{12})", Path(name).stem)
    return int(number[1]) if number else name


def write_coco(rows: Iterable[Row], path: Path, style: tuple[str, str]) -> None:
    """COCO's results file: [{"image_id", "caption"}, ...]; failed images and those without a caption are not in it."""
    comma = ""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("[")
        for row in rows:
            for text in texts_of(styled(text, *style) for text in row.get("texts", ())[:1]):
                number = row.get("id", _coco_id(row["image"]))
                result = {"image_id": number, "caption": text}
                file.write(comma + json_line(result))
                comma = ",\n"
        file.write("]\n")


def write_parquet(rows: Iterable[Row], path: Path, style: tuple[str, str], columns: Sequence[str]) -> None:
    """The rows of `flat` as a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = dict.fromkeys(NUMBERS, pa.float64()) | {"abstained": pa.bool_()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    with pq.ParquetWriter(path, schema) as writer:
        block: list[Row] = []
        for row in flat(rows, *style):
            block.append({k: valid(v) if isinstance(v, str) else v for k, v in row.items()})
            if len(block) == 10_000:
                writer.write_table(pa.Table.from_pylist(block, schema))
                block = []
        writer.write_table(pa.Table.from_pylist(block, schema))


def text_content(row: Row, style: tuple[str, str], form: Sequence[Any] | None) -> bytes:
    """What an image's text file holds, a line a text; with a form, beside the user's text and written as that is."""
    before, after, written = form or ("", "", ())
    texts = texts_of(flat([row], *style))
    content = before + "\n".join(texts) + after if texts else f"{before}{after}".strip()
    return encode_text(content + "\n", *written)


def write_errors(rows: Iterable[Row], file: TextIO) -> None:
    """Rows that failed, as JSONL."""
    file.writelines(json_line(row) + "\n" for row in flat(rows))


def shard_name(out: Path, number: int) -> str:
    """The name of a webdataset shard: OUT-000000.tar, ..."""
    return f"{out.stem}-{number:06d}.tar"


def write_shard(rows: Iterable[tuple[int, Row]], path: Path, old: Path, style: tuple[str, str]) -> None:
    """A webdataset shard of rows that succeeded: images as they were, captions as .txt, rows as .json.

    rows: each with the number of its sample. old: the shard that it replaces: images that are gone are taken from it.

    Raises:
        BulkError: an image is no longer what was captioned.
    """
    with tarfile.open(path, mode="w") as archive:
        for i, row, image in _with_images(rows, old):
            texts = [styled(text, *style) for text in row["texts"]]
            record = json_line({"image": row["image"], "hash": row["hash"], "texts": texts})
            for ending, content in (
                (_ending(row["image"], image), image),
                (".txt", "\n".join(texts_of(texts)).encode(errors="backslashreplace")),
                (".json", record.encode()),
            ):
                member = tarfile.TarInfo(f"{i:09d}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _with_images(rows: Iterable[tuple[int, Row]], old: Path) -> Iterator[tuple[int, Row, bytes]]:
    """Rows in their order, each with the bytes of the image that was captioned."""
    table: Iterator[ImageItem] = iter(())
    opened, last = "", 0
    for number, row in rows:
        path, start, size = row["at"]
        problem = f"{row['image']} has changed since it was captioned"
        try:
            if size != IN_TABLE:
                content = ImageItem(row["image"], path, start, size).read()
            else:  # a table is read once, for all of its rows that follow one another
                if path != opened or start <= last:
                    table, opened = parquet_items(path, start), path
                content = next((item.content for item in table if item.start == start), None) or b""
                last = start
        except (ImageError, OSError, BulkError) as error:
            content, problem = b"", str(error)
        for image in (content, *_in_shard(old, number)):
            if hashlib.sha256(image).hexdigest() == row["hash"]:
                yield number, row, image
                break
        else:
            raise BulkError(f"{problem}, and its shard is still to be written; put it back and {GO_ON}")


def _in_shard(path: Path, number: int) -> Iterator[bytes]:
    """The files of a sample in a shard, where there is one that can be read."""
    with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.name.startswith(f"{number:09d}.") and (file := archive.extractfile(member)):
                yield file.read()


def _ending(name: str, content: bytes) -> str:
    """Of the file in a shard: that of the image's name, else what its content is."""
    ending = os.path.splitext(name)[1].lower()
    if ending in SUFFIXES:
        return ending
    if content.startswith(b"\x89PNG"):  # Pillow alone may refuse it for what is beside the pixels
        return ".png"
    with Image.open(io.BytesIO(content)) as image:  # it was decoded before
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(image.format or "", f".{image.format}".lower())
