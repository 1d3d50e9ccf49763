"""JSON objects of checkpoints, read strictly: of a limited size, valid, unambiguous, an object."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsupportedFileError
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.texts import decode_text

MAX_JSON_BYTES = 1 << 20  # published settings have 10,000
_MAX_JSON_VALUES = 1 << 20  # OPT's tokenizer.json has 250,000; millions of empty lists take seconds


def parse_json(text: bytes, where: str, *, utf8: bool = True) -> dict[str, Any]:
    """The JSON object in `text`. What readers could take in two ways is refused: a name that occurs twice in an object,
    and numbers that are none.

    Args:
        where: whose text it is, for the message of an error.
        utf8: UTF-8 without a byte order mark only; else any text file.

    Raises:
        BrokenFileError: no JSON, no object, a repeated name, or too many values.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise BrokenFileError(f"{where} holds more than {_MAX_JSON_VALUES:,} values; restore the file")
    try:
        content = text.decode("utf-8") if utf8 else decode_text(text, where)
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"{where} is no valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise BrokenFileError(f"{where} holds a {type(value).__name__}, expected an object; restore the file")
    return value


def read_json(path: Path, *, optional: bool = False, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        optional: without the file, give an empty object.
        limit: its size in bytes at most.

    Raises:
        CheckpointError: no such file, or one that cannot be read, is too large or broken.
    """
    if not path.exists():
        if optional:
            return {}
        raise CheckpointError(f"{path.parent} holds no {path.name}; give the folder a model was saved to")
    return parse_json(read_small_file(path, limit, "JSON"), str(path), utf8=False)


def read_small_file(path: Path, limit: int, what: str) -> bytes:
    """All of a file of up to `limit` bytes. Raises CheckpointError where it is larger, or cannot be read."""
    with ExitStack() as stack:
        file = FileBytes(path, stack)
        if file.size > limit:
            raise UnsupportedFileError(
                f"{path}: {what} of {file.size:,} bytes, over {limit:,}; restore the file"
            )
        return file.read(0, file.size, what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number
