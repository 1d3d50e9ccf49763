"""Files and folders that appear complete or not at all, lasting over a power cut; locks; users' text files and tables.

Text, CSV, TSV and JSON of users are read here alone: UTF-8, with or without a byte order mark, or UTF-16 with one. LF
and CRLF end a line, nothing else does. What is no such text is an error that names file and line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.texts import TextFileError as TextFileError
from blip2.tensorfiles.texts import decode_text, text_encoding
from blip2.tensorfiles.texts import read_text as read_text

NO_PYARROW = "parquet needs pyarrow; pip install 'blip2[bulk]'"
MAX_LINE_BYTES = 64 << 20
UNFINISHED = ".unfinished"  # the suffix of a file that `replace_file` has not renamed yet
_LOCK = ".lock"
Content = dict[str, Any] | str | Path  # of a file: JSON, text, or a file to copy


class OutputError(ValueError):
    """A place where no file can be written; the message names it and says why."""


def lock_file(file: IO[Any], *, inherited: bool = True) -> bool:
    """Lock an open file for this process until it ends, however it ends; False where another process has the lock.

    inherited: whether forked processes have the lock too. On a system without fcntl the lock is always given.
    """
    if os.name != "posix":
        return True
    import fcntl

    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk; of folders only where the system can (Windows cannot)."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_file(path: Path) -> Path:
    """Where the content of an output goes: `path`, or the regular file that it is a link to.

    Raises:
        OutputError: any other link, a folder, a device, a pipe, a socket, or a file that is read-only.
    """
    link = "a link to " * path.is_symlink()
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if link:
            raise OutputError(f"{path} is a link that leads to no file; remove it or name another") from error
        return path  # it is not there, or what is wrong is reported by who writes it
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file (a device, a pipe or a socket)"
        raise OutputError(f"{path} is {link}{what}; name another file")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path} is read-only; allow writing it or name another file")
    return Path(os.path.realpath(path)) if link else path


def unfinished_file(path: Path) -> Path:
    """Where `replace_file` writes what is to take a file's place; there after a kill, until the next write."""
    path = output_file(path)
    # never longer than a name may be
    key = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    return path.with_name(f".{key}{UNFINISHED}")


@contextmanager
def replace_file(path: Path, *, sync_name: bool = True) -> Iterator[Path]:
    """Gives the path of a file to write; when the block ends without an error it takes the place of `path`.

    Of a link to a regular file the target is replaced; a file that was there passes its permissions on, a new one has
    the usual ones, whoever writes it (safetensors' own files are private). Until then it stays as it is. An error
    leaves nothing behind; a killed process leaves a file whose name ends in `UNFINISHED`, which the next write to the
    same place overwrites.

    Args:
        sync_name: flush the folder too. Without, the old file may be back after a power cut.

    Raises:
        OutputError: what is there is no regular file, or read-only.
        OSError: the disk refuses.
    """
    path = output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished_file(path)
    try:
        beside.unlink(missing_ok=True)
        beside.touch()
        usual = beside.stat()
        yield beside
        with contextlib.suppress(OSError):  # the file system has no permissions
            beside.chmod(stat.S_IMODE((path.stat() if path.exists() else usual).st_mode))
        sync(beside)
        os.replace(beside, path)
        if sync_name:
            sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to; when the block ends without an error it is renamed to `folder`.

    What a killed process left behind is removed by the next one that writes to the same place.

    Raises:
        CheckpointError: the place is taken, another process writes there, or the disk refuses.
    """
    if folder.is_symlink():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a link that leads to no folder; remove it or name another")
        folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; save to a new folder, or remove it first")
    beside = folder.absolute().parent / f".{folder.name}.part"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with (beside / _LOCK).open("wb") as lock:
            if not lock_file(lock):
                raise CheckpointError(f"{folder}: another process is writing it")
            try:
                for path in beside.iterdir():  # left by a process that was killed
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != _LOCK:
                        path.unlink()
                yield beside
                sync(beside)
                if folder.is_dir():
                    folder.rmdir()
                beside.rename(folder)
                (folder / _LOCK).unlink()  # only now: until it has its place the folder is this process's
                sync(folder.absolute().parent)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}); nothing was saved"
        ) from error


def write_file(path: Path, content: Content) -> None:
    """Write a file and flush it to the disk."""
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        path.write_bytes(text.encode())
    sync(path)


def encode_text(text: str, encoding: str = "utf-8", mark: str = "", newline: str = "\n") -> bytes:
    """Text with "\\n" line ends as the bytes of a file."""
    return (mark + text.replace("\n", newline)).encode(encoding, "backslashreplace")


def read_text_and_form(path: str | Path) -> tuple[str, tuple[str, str, str]]:
    """As `read_text`, and what `encode_text` takes to write the same. TextFileError: also where line ends are mixed."""
    content = Path(path).read_bytes()
    text = decode_text(content, str(path)).replace("\r\n", "\n")
    for mark, newline in itertools.product(("", "\ufeff"), ("\n", "\r\n")):
        form = (text_encoding(content), mark, newline)
        if encode_text(text, *form) == content:
            return text, form
    raise TextFileError(f"{path}: some lines end with CRLF and some with LF; give the file one kind")


def text_form(path: str | Path) -> tuple[str, str, str]:
    """Encoding, mark and line end of a text file as its first line has them, for `encode_text`. Raises OSError."""
    with open(path, "rb") as file:
        line = file.readline(MAX_LINE_BYTES)
    encoding = text_encoding(line)
    text = line.decode(encoding, "replace")
    return encoding, "\ufeff" * text.startswith("\ufeff"), "\r\n" if "\r" in text[-3:] else "\n"


def read_text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file of any size with their numbers, from 1, without their ends. Raises TextFileError, OSError."""
    with open(path, "rb") as file:
        yield from stream_lines(file, str(path))


def stream_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """As `read_text_lines`, of an open file, which may be a pipe: a line is given as soon as it has come."""
    number, part = 1, file.readline(MAX_LINE_BYTES)
    encoding = text_encoding(part)
    while encoding == "utf-8" and part.endswith(b"\n"):  # what follows can do it too, in twice the time
        yield number, decode_text(part, name, encoding, number)[:-1].removesuffix("\r")
        number, part = number + 1, file.readline(MAX_LINE_BYTES)
    line, end = bytearray(part), "\n".encode(encoding)
    while part:
        line += file.read(-len(line) % len(end))  # "\n" is the first byte of a wider character
        if line.endswith(end):
            yield number, decode_text(bytes(line), name, encoding, number)[:-1].removesuffix("\r")
            number, line = number + 1, bytearray()
        elif len(line) >= MAX_LINE_BYTES:
            raise TextFileError(f"{name}, line {number}: over {MAX_LINE_BYTES >> 20} MiB; is it a text file?")
        line += (part := file.readline(MAX_LINE_BYTES))
    if line:
        yield number, decode_text(bytes(line), name, encoding, number).removesuffix("\r")


def read_json_text(text: str, where: str) -> Any:
    """The value in a JSON text. Raises TextFileError, which names `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextFileError(f"{where}: no valid JSON ({error})") from error


def read_rows(path: str | Path, suffix: str = "") -> Iterator[Any]:
    """The rows of a CSV or TSV file with a header as dictionaries, or the values in JSONL; empty lines are none.

    Strict: a row has as many fields as the header, and a quote that is opened is closed. TSV whose header has no quote
    character is read without quotes, as Conceptual Captions is written. suffix: of the format, where not the path's.

    Raises TextFileError, which names row or line, from 1, and OSError.
    """
    lines, suffix, row = read_text_lines(path), suffix or Path(path).suffix.lower(), 1
    if suffix == ".jsonl":
        yield from (read_json_text(line, f"{path}, line {i}") for i, line in lines if line.strip())
        return
    first = next(lines, (1, ""))[1]
    quoting: Literal[0, 3] = csv.QUOTE_NONE if suffix == ".tsv" and '"' not in first else csv.QUOTE_MINIMAL
    ends = itertools.chain([f"{first}\n"], (f"{line}\n" for _, line in lines))
    reader = csv.reader(ends, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting, strict=True)
    try:
        header = next(reader)
        if len(set(header)) < max(1, len(header)):
            raise TextFileError(f"{path}: expected a header that names each column once, not {header}")
        for fields in filter(None, reader):
            if len(fields) != len(header):
                raise csv.Error(f"{len(fields)} fields where the header has {len(header)}")
            yield dict(zip(header, fields, strict=True))
            row += 1
    except csv.Error as error:
        where = f"{path}, row {row} (to line {reader.line_num})"
        if str(error).startswith("new-line"):  # of Python's, with advice for who opens the file in Python
            raise TextFileError(f"{where}: a carriage return alone; end lines with LF or CRLF") from None
        raise TextFileError(f"{where}: {error}; are double quotes missing?") from None


def parquet_columns(path: str | Path) -> list[str]:
    """The names of a parquet table's columns. Raises TextFileError, OSError."""
    with _parquet(path) as file:
        names: list[str] = file.schema_arrow.names
        return names


def read_parquet(path: str | Path, columns: Sequence[str], start: int = 1) -> Iterator[dict[str, Any]]:
    """The rows of a parquet table from row `start`, counted from 1, on; of the columns those that it has.

    In place of what Python cannot hold, such as text that is no UTF-8, a value is the error. Raises TextFileError,
    OSError.
    """
    with _parquet(path) as file:
        group = place = 0
        while group < file.num_row_groups and place + file.metadata.row_group(group).num_rows < start:
            place += file.metadata.row_group(group).num_rows
            group += 1
        names = [name for name in file.schema_arrow.names if name in columns]
        for number in range(
            group, file.num_row_groups
        ):  # one by one: all rows before a damaged one are given
            for batch in file.iter_batches(batch_size=64, row_groups=[number], columns=names):
                rows = _parquet_values(batch)
                yield from rows[max(0, start - 1 - place) :]
                place += len(rows)


@contextmanager
def _parquet(path: str | Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TextFileError(f"{path}: {NO_PYARROW}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise TextFileError(f"{path}: no parquet file that can be read ({error})") from error


def _parquet_values(batch: Any) -> list[dict[str, Any]]:
    unreadable = (ValueError, OverflowError, NotImplementedError)
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except unreadable:
        rows = [{} for _ in range(batch.num_rows)]
        for name in batch.schema.names:
            for row, scalar in zip(rows, batch.column(name), strict=True):
                try:
                    row[name] = scalar.as_py()
                except unreadable as error:
                    row[name] = error
    return rows
