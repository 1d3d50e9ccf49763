"""Files and folders that appear complete or not at all, and locks. All of it lasts over a power cut once it is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from blip2.tensorfiles.errors import CheckpointError

UNFINISHED = ".unfinished"  # the suffix of a file that `replace_file` has not renamed yet
_LOCK = ".lock"
Content = dict[str, Any] | str | Path  # of a file: JSON, text, or a file to copy


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


@contextmanager
def replace_file(path: Path, *, sync_name: bool = True) -> Iterator[Path]:
    """Gives the path of a file to write; when the block ends without an error it takes the place of `path`.

    Until then the old file stays as it is. An error leaves nothing behind; a killed process leaves a file whose name
    ends in `UNFINISHED`, which the next write to the same place overwrites.

    Args:
        sync_name: flush the folder too. Without, the old file may be back after a power cut.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # never longer than a name may be
    key = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    beside = path.with_name(f".{key}{UNFINISHED}")
    try:
        yield beside
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
