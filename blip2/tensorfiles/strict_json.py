"""JSON objects of checkpoints, read strictly: of a limited size, valid, an object."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsupportedFileError
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.texts import decode_text

MAX_JSON_BYTES = 64 << 20  # T5's tokenizer.json has 2.4 million


def parse_json(text: bytes, where: str, *, unique_names: bool = False, utf8: bool = True) -> dict[str, Any]:
    """The JSON object in `text`.

    Args:
        where: whose text it is, for the message of an error.
        unique_names: refuse an object in which a name occurs twice, which readers could take in two ways.
        utf8: UTF-8 without a byte order mark only; else any text file.

    Raises:
        BrokenFileError: no JSON, no object, or a repeated name.
    """
    try:
        content = text.decode("utf-8") if utf8 else decode_text(text, where)
        value = json.loads(content, object_pairs_hook=_unique if unique_names else None)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"{where} is no valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise BrokenFileError(f"{where} holds a {type(value).__name__}, expected an object; restore the file")
    return value


def read_json(
    path: Path, *, optional: bool = False, limit: int = MAX_JSON_BYTES, unique_names: bool = False
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        optional: without the file, give an empty object.
        limit: its size in bytes at most.
        unique_names: see `parse_json`.

    Raises:
        CheckpointError: no such file, or one that cannot be read, is too large or broken.
    """
    if not path.exists():
        if optional:
            return {}
        raise CheckpointError(f"{path.parent} holds no {path.name}; give the folder a model was saved to")
    with ExitStack() as stack:
        file = FileBytes(path, stack)
        if file.size > limit:
            raise UnsupportedFileError(
                f"{path}: JSON of {file.size:,} bytes, over {limit:,}; restore the file"
            )
        content = file.read(0, file.size, "its JSON")
        return parse_json(content, str(path), unique_names=unique_names, utf8=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries
