"""Which inputs a journal has, in 33 bytes a row beside it, so that a journal of ten million rows opens in seconds.

The journal is the only truth. Each part of the file names the bytes of the journal it covers and their checksum;
the first part that does not match, and all after it, are discarded and built again from the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

# A row: the keys of its name, content and text file (0: it has none), where its record begins, whether it failed.
ENTRY = np.dtype([("name", "<u8"), ("content", "<u8"), ("file", "<u8"), ("start", "<i8"), ("failed", "?")])
_HEAD = struct.Struct("<QQII")  # of a part: where it ends in the journal, its rows, both checksums
PART = 1 << 16  # rows: as many are read from the journal at most after a kill
RECENT = 1 << 20  # entries that an index holds unsorted
Entry = tuple[int, int, int, int, bool]


class IndexFile:
    """The file, opened for adding to it. A write that the disk refuses costs time at the next opening, no more."""

    def __init__(self, path: Path, journal: BinaryIO) -> None:
        """Reads `entries`, the rows of the journal's first `covered` bytes."""
        self._file = path.open("ab+", buffering=0)
        size, intact, self.covered = os.fstat(self._file.fileno()).st_size, 0, 0
        parts = [np.empty(0, ENTRY)]
        self._file.seek(0)
        journal.seek(0)
        while len(head := self._file.read(_HEAD.size)) == _HEAD.size:
            end, rows, of_journal, of_part = _HEAD.unpack(head)
            if rows * ENTRY.itemsize > size or end <= self.covered:
                break
            content = self._file.read(rows * ENTRY.itemsize)
            if zlib.crc32(head[:-4] + content) != of_part or len(content) != rows * ENTRY.itemsize:
                break
            lines = journal.read(end - self.covered)
            if zlib.crc32(lines) != of_journal or len(lines) != end - self.covered:
                break
            parts.append(np.frombuffer(content, ENTRY))
            self.covered, intact = end, intact + len(head) + len(content)
        self.entries = np.concatenate(parts)
        with contextlib.suppress(OSError):
            self._file.truncate(intact)
        self._seen, self._checksum = self.covered, 0
        self._new: list[Entry] = []

    def add(self, line: bytes, entries: Sequence[Entry]) -> None:
        """Take note of the journal's next line, and of the rows in it."""
        self._checksum = zlib.crc32(line, self._checksum)
        self._new += entries
        self._seen += len(line)
        if len(self._new) >= PART:
            self._write()

    def _write(self) -> None:
        content = np.array(self._new, ENTRY).tobytes()
        head = _HEAD.pack(self._seen, len(self._new), self._checksum, 0)[:-4]
        with contextlib.suppress(OSError):
            self._file.write(head + zlib.crc32(head + content).to_bytes(4, "little") + content)
        self.covered, self._checksum = self._seen, 0
        self._new.clear()

    def close(self) -> None:
        """Put what was added on the disk, and let go of the file."""
        if self._seen != self.covered:
            self._write()
        self._file.close()


def key_of(name: str) -> int:
    """64 bits of a hash: among ten million names two are taken for one with a chance of 3 in a million."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def content_key(digest: str) -> int:
    """The first 64 bits of a content's SHA-256."""
    return int(digest[:16], 16)


class Index:
    """A map from 64-bit keys to numbers in 16 bytes an entry: a sorted array, and a dict of what came last.

    0 is no key.
    """

    def __init__(self, keys: npt.ArrayLike = (), values: npt.ArrayLike = ()) -> None:
        """`keys` and `values` to begin with; of a key that comes twice the first value counts."""
        unique, first = np.unique(np.asarray(keys, np.uint64), return_index=True)
        start = int(np.searchsorted(unique, 1))
        self._keys, self._values = unique[start:], np.asarray(values, np.int64)[first[start:]]
        self._recent: dict[int, int] = {}

    def get(self, key: int) -> int | None:
        """The number of a key, None where it has none."""
        if key in self._recent:
            return self._recent[key]
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        return int(self._values[place]) if place < len(self._keys) and int(self._keys[place]) == key else None

    def set(self, key: int, value: int) -> None:
        """Give a key its number, unless it has one."""
        if not key or self.get(key) is not None:
            return
        self._recent[key] = value
        if len(self._recent) >= RECENT:
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
