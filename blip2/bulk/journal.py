"""What has been done, on the disk: an append-only file, each line a batch's rows under a checksum, and a lock.

The first line holds the settings. A line is written whole or cut off when the journal is next opened, so work goes on
at the same batch it stopped at, with the same images in every batch: the result is that of a run never disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blip2.bulk.index import Entry, Index, IndexFile, content_key, key_of
from blip2.storage import lock_file

NAME, INDEX, LOCK = "journal", "index", "lock"
GO_ON = "run the same command again to go on"
Row = dict[str, Any]


class BulkError(ValueError):
    """A run that cannot begin or go on."""


class Journal:
    """The journal in a folder, opened for this process alone.

    names: of its inputs. files: the text files these have. contents: where the record of a content begins.
    before, failed: how many inputs it has, and how many of these failed.
    finished: all inputs were done and the output was published.

    Raises:
        BulkError: another run has it, it was begun with other settings, or the folder cannot be written.
    """

    SHARD_SIZE = 10_000  # rows that are read together: the images of a webdataset shard

    def __init__(self, folder: Path, settings: dict[str, Any], *, anew: bool = False) -> None:
        """`anew`: begin again where the last run came to its end, instead of adding to it."""
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("wb")
        except OSError as error:
            raise BulkError(f"{folder}: cannot be written ({error.strerror}); name another --out") from error
        if not lock_file(self._lock):
            self._lock.close()
            raise BulkError(
                f"{folder}: another run is writing this output; wait for it, or name another --out"
            )
        self._file = self.path.open("ab+")
        self._read()
        if anew and self.finished:
            self._index.close()
            os.truncate(folder / INDEX, 0)
            self._file.truncate(0)
            self._read()
        self._file.truncate(self._end)  # a line that a kill has torn
        if self._end:
            _, first = next(self._records(0))
            self._compare(first["settings"], settings)
        else:
            self.add({"settings": settings})

    def _read(self) -> None:
        """Learn the rows from the index, then from the lines that it lacks."""
        self._index = IndexFile(self.path.with_name(INDEX), self._file)
        entries, self._end = self._index.entries, self._index.covered
        self._file.seek(max(0, self._end - len(_END)))
        self.finished = self._file.read(len(_END)) == _END
        keys = (entries["name"], entries["content"], entries["file"])
        self.names, self.contents, self.files = (Index(key, entries["start"]) for key in keys)
        self.before, self.failed = len(entries), int(entries["failed"].sum())
        # Of each shard's first row: where its record begins, and how many that succeeded precede it there.
        starts = entries["start"][~entries["failed"]]
        firsts = starts[:: self.SHARD_SIZE]
        skipped = np.arange(len(firsts)) * self.SHARD_SIZE - np.searchsorted(starts, firsts)
        self._firsts = list(zip(firsts.tolist(), skipped.tolist(), strict=True))
        self._last = int(entries["start"][-1]) if len(entries) else None
        self._index.entries = entries[:0].copy()  # a view would keep all of it
        for line, record in self._records(self._end):
            self._note(record, line)

    @property
    def succeeded(self) -> int:
        """How many inputs did not fail."""
        return self.before - self.failed

    def _note(self, record: Any, line: bytes) -> None:
        """Take note of the line that ends the file."""
        entries: list[Entry] = []
        start, earlier = self._end, self.succeeded
        for row in record if isinstance(record, list) else ():
            name, content = key_of(row["image"]), content_key(row.get("hash", "0"))
            file = key_of(row["sidecar"]) if "sidecar" in row else 0
            for index, key in ((self.names, name), (self.contents, content), (self.files, file)):
                index.set(key, start)
            failed = "error" in row
            entries.append((name, content, file, start, failed))
            if not failed and self.succeeded % self.SHARD_SIZE == 0:
                self._firsts.append((start, self.succeeded - earlier))
            self.before, self.failed, self._last = self.before + 1, self.failed + failed, start
        self._index.add(line, entries)
        self._end += len(line)
        self.finished = line == _END

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            self.close()
            changes = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
            raise BulkError(
                f"this output was begun with other settings: {changes}. Use those, or another --out, "
                f"or remove {self.path.parent}"
            )

    def _records(self, start: int) -> Iterator[tuple[bytes, Any]]:
        """Every whole line from `start` on and its record; what follows a damaged one does not count."""
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if line[-1:] != b"\n" or line[8:9] != b" " or line[:8] != _checksum(line[9:-1]):
                    return
                yield line, json.loads(line[9:-1])

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows, in the order of the inputs; those from the record that begins at `start`."""
        for _, record in self._records(start):
            if isinstance(record, list):
                yield from record

    def succeeded_rows(self, number: int) -> list[Row]:
        """The rows that did not fail, the SHARD_SIZE from SHARD_SIZE * number on; fewer where there are no more."""
        if number >= len(self._firsts):
            return []
        start, skip = self._firsts[number]
        succeeded = (row for row in self.rows(start) if "error" not in row)
        return list(itertools.islice(succeeded, skip, skip + self.SHARD_SIZE))

    def add(self, record: list[Row] | dict[str, Any] | str) -> None:
        """Append a batch's rows, the settings, or that all is done; it counts from here on.

        Raises:
            BulkError: the disk is full or refuses.
        """
        line = _line(record)
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._note(record, line)

    def last(self) -> list[Row]:
        """The rows of the last batch."""
        return [] if self._last is None else self.read(self._last)

    def texts(self, digest: str) -> list[Row] | None:
        """The texts of a content, by its SHA-256; None where it has none yet."""
        place = self.contents.get(content_key(digest))
        rows = [] if place is None else self.read(place)
        return next((row["texts"] for row in rows if row.get("hash") == digest), None)

    def read(self, start: int) -> list[Row]:
        """The rows of the record that begins at `start`."""
        rows: list[Row] = next(self._records(start))[1]
        return rows

    def finish(self) -> None:
        """Write that all inputs are done and the output is published."""
        self.add("end")

    def close(self) -> None:
        """Let another run have it."""
        for file in (self._index, self._file, self._lock):
            with contextlib.suppress(OSError):  # what a full disk did not take; it was reported
                file.close()


def disk_error(path: Path, error: OSError) -> BulkError:
    """What a failed write means to the user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
    return BulkError(f"{path}: {what}; what was done is kept. Make room and {GO_ON}")


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()  # ASCII: surrogates of odd names survive
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


_END = _line("end")
