"""What has been done, on the disk: an append-only file, each line a batch's rows under a checksum, and a lock.

The first line holds the settings. A line is written whole or cut off when the journal is next opened, so work goes on
at the same batch it stopped at, with the same images in every batch: the result is that of a run never disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAME, LOCK = "journal", "lock"
GO_ON = "run the same command again to go on"
Row = dict[str, Any]


class BulkError(ValueError):
    """A run that cannot begin or go on."""


class Journal:
    """The journal in a folder, opened for this process alone.

    Raises:
        BulkError: another run has it, or it was begun with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, anew: bool = False) -> None:
        """`anew`: begin again where the last run came to its end, instead of adding to it."""
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / LOCK).open("wb")
        if not _lock(self._lock.fileno()):
            self._lock.close()
            raise BulkError(
                f"{folder}: another run is writing this output; wait for it, or name another --out"
            )
        self._file = self.path.open("ab+")
        self.finished = False
        begun: Any = None
        for end, record in self._records():
            begun = record if begun is None else begun
            self.finished = record == "end"
            self._end = end
        if begun is None or (anew and self.finished):
            self._file.truncate(0)
            self._end = 0
            self.finished = False
            self._append({"settings": settings})
        else:
            self._file.truncate(self._end)  # a line that a kill has torn
            self._compare(begun["settings"], settings)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            self.close()
            told = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
            raise BulkError(
                f"this output was begun with other settings: {told}. Use those, or another --out, "
                f"or remove {self.path.parent}"
            )

    def _records(self) -> Iterator[tuple[int, Any]]:
        """Every whole record, and where it ends; what follows a damaged one does not count."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                if line[-1:] != b"\n" or line[8:9] != b" " or line[:8] != _checksum(line[9:-1]):
                    return
                end += len(line)
                yield end, json.loads(line[9:-1])

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the inputs."""
        for _, record in self._records():
            if isinstance(record, list):
                yield from record

    def add(self, rows: Sequence[Row]) -> int:
        """Append a batch's rows; they count from here on. Gives where their record begins, for `read`.

        Raises:
            BulkError: the disk is full or refuses.
        """
        start = self._end
        self._append(list(rows))
        return start

    def read(self, start: int) -> list[Row]:
        """The rows of the record that begins at `start`."""
        with self.path.open("rb") as file:
            file.seek(start)
            rows: list[Row] = json.loads(file.readline()[9:])
            return rows

    def starts(self) -> Iterator[tuple[int, list[Row]]]:
        """Every batch: where it begins and its rows."""
        start = 0
        for end, record in self._records():
            if isinstance(record, list):
                yield start, record
            start = end

    def finish(self) -> None:
        """Write that all inputs are done and the output is published."""
        if not self.finished:
            self._append("end")
            self.finished = True

    def _append(self, record: Any) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()  # ASCII: surrogates of odd names survive
        line = _checksum(text) + b" " + text + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._end += len(line)

    def close(self) -> None:
        """Let another run have it."""
        for file in (self._file, self._lock):
            with contextlib.suppress(OSError):  # what a full disk did not take; it was reported
                file.close()


def disk_error(path: Path, error: OSError) -> BulkError:
    """What a failed write means to the user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
    return BulkError(f"{path}: {what}; what was done is kept. Make room and {GO_ON}")


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _lock(descriptor: int) -> bool:
    """Take the lock for this process; the system gives it back when the process ends, however it ends."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def key_of(name: str) -> int:
    """64 bits of a hash: among ten million names two are taken for one with a chance of 3 in a million."""
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


class Index:
    """A map from 64-bit keys to numbers in 16 bytes an entry: a sorted array, and a dict of what came last."""

    def __init__(self, *, recent: int = 1 << 20) -> None:
        self._keys, self._values = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._recent: dict[int, int] = {}
        self._most = recent

    def get(self, key: int) -> int | None:
        """The number of a key, None where it has none."""
        if key in self._recent:
            return self._recent[key]
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        return int(self._values[place]) if place < len(self._keys) and int(self._keys[place]) == key else None

    def set(self, key: int, value: int) -> None:
        """Give a new key its number."""
        self._recent[key] = value
        if len(self._recent) >= self._most:
            keys = np.fromiter(self._recent, np.uint64, len(self._recent))
            values = np.fromiter(self._recent.values(), np.int64, len(self._recent))
            keys, values = np.concatenate([self._keys, keys]), np.concatenate([self._values, values])
            order = np.argsort(keys)
            self._keys, self._values = keys[order], values[order]
            self._recent.clear()

    def known(self, keys: Sequence[int]) -> list[bool]:
        """Which of the keys it holds."""
        array = np.array(keys, np.uint64)
        if not len(self._keys):
            return [key in self._recent for key in keys]
        places = np.minimum(np.searchsorted(self._keys, array), len(self._keys) - 1)
        old = (self._keys[places] == array).tolist()
        return [known or key in self._recent for key, known in zip(keys, old, strict=True)]
