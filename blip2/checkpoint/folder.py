"""A folder that appears complete or not at all: written beside its place, handed to the disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2.storage import lock
from blip2.tensorfiles.tensors import CheckpointError
from blip2.tensorfiles.writers import sync

_LOCK = ".lock"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to; where all went well it takes its place when the block ends.

    What a killed process left behind is removed by the next one that writes to the same place.

    Raises:
        CheckpointError: the place is taken, another process writes there, or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; save to a new folder, or remove it first")
    beside = folder.absolute().parent / f".{folder.name}.part"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with (beside / _LOCK).open("wb") as held:
            if not lock(held.fileno()):
                raise CheckpointError(f"{folder}: another process is writing it")
            try:
                _clear(beside)
                yield beside
                sync_folder(beside)
                if folder.is_dir():
                    folder.rmdir()
                beside.rename(folder)
                (folder / _LOCK).unlink()  # only now: until it has its place the folder is this process's
                sync_folder(folder.absolute().parent)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror or error}); nothing was saved"
        ) from error


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file; on return it is on the disk."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; on return it is on the disk."""
    with path.open("wb") as file:
        file.write(text.encode())
        sync(file)


def copy_file(source: Path, folder: Path) -> None:
    """Copy a file into a folder; on return it is on the disk."""
    with source.open("rb") as old, (folder / source.name).open("wb") as new:
        shutil.copyfileobj(old, new)
        sync(new)


def sync_folder(folder: Path) -> None:
    """Hand a folder's list of names to the disk, where the system can (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
