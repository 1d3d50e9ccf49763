"""What a run has done, in an SQLite database beside its output: inputs, texts, errors, and what was published.

A batch is one transaction, so work goes on at the batch where it stopped, with the same images in every later batch:
the result is that of a run never disturbed. Texts are kept bare, once for each content; prefix and suffix are put
around them when they are published.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from blip2.storage import lock_file

NAME, LOCK = "state.sqlite", "lock"
GO_ON = "run the same command again to go on"
VERSION = 1
CHUNK = 256  # rows that are read at a time: no cursor stays open while others write
# Of an input: image (its name), then hash and texts, or error, or kept (why its text file is left alone); stamp (of
# the file that holds it); id and at, as COCO's results and shards need them; of its text file sidecar (the name), form
# (what of the user's is in it) and base (the hash of that alone); known (nothing has changed), again (only to publish).
Row = dict[str, Any]
Stamp = tuple[int, int]  # of a file: its size, and the time of its last change in ns

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE contents (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, texts TEXT NOT NULL);
CREATE TABLE inputs (
    id INTEGER PRIMARY KEY,     -- in the order of first sight
    name BLOB NOT NULL UNIQUE,  -- names need not be Unicode
    size INTEGER,               -- of the file that holds it, as it was read
    mtime_ns INTEGER,
    content INTEGER,            -- its texts. Without, and without an error, a text file of the user's was left alone
    error BLOB,
    place INTEGER,              -- in webdataset shards, in the order of completion
    file BLOB,                  -- its text file, relative to the output
    more TEXT                   -- JSON of what one output needs: COCO's id, where a shard finds the image
);
CREATE UNIQUE INDEX places ON inputs (place) WHERE place IS NOT NULL;
CREATE UNIQUE INDEX files ON inputs (file) WHERE file IS NOT NULL;
CREATE INDEX failures ON inputs (id) WHERE error IS NOT NULL;
-- Of inputs in a published table or shard, what they had there, where that has changed since.
CREATE TABLE changed (input INTEGER PRIMARY KEY, content INTEGER, error BLOB);
-- Files that were written, and (pending) those that are to be, which may be there or not.
CREATE TABLE published (
    path BLOB NOT NULL,         -- relative to the output's folder
    pending INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    size INTEGER,               -- of shards, which are not read again while size and time are these
    mtime_ns INTEGER,
    style TEXT,                 -- prefix and suffix in it. NULL: it is not ours but a text file to be added to
    upto INTEGER,               -- the last input of a table, how many rows of a shard
    form TEXT,                  -- JSON of what is the user's: text around ours, columns, encoding, line ends
    PRIMARY KEY (path, pending)
) WITHOUT ROWID;
CREATE INDEX pendings ON published (path) WHERE pending = 1;
-- Rows of a published table that a user has edited or added (input 0: of no known image), or removed (row NULL).
CREATE TABLE edits (input INTEGER, place INTEGER, row TEXT, PRIMARY KEY (input, place)) WITHOUT ROWID;
"""


class BulkError(ValueError):
    """A run that cannot begin or go on."""


class Known(NamedTuple):
    """What the database has of an input; sha256 and style are those of its text file as it was published."""

    name: bytes
    id: int
    size: int | None
    mtime_ns: int | None
    content: int | None
    failed: bool
    file: bytes | None
    sha256: bytes | None
    style: str | None

    @property
    def stamp(self) -> tuple[int | None, int | None]:
        """Size and time of the file that holds it, as it was read."""
        return self.size, self.mtime_ns


class Published(NamedTuple):
    """A file that was written, or is to be; fields as in the table."""

    sha256: bytes
    stamp: Stamp | None = None
    style: tuple[str, str] | None = None
    upto: int = 0
    form: Any = None


def to_blob(text: str) -> bytes:
    """A name or a message as the database holds it; file names that are no Unicode survive."""
    return text.encode("utf-8", "surrogatepass")


def from_blob(content: bytes) -> str:
    """The text that `to_blob` made bytes of."""
    return content.decode("utf-8", "surrogatepass")


def refuse_old_state(folder: Path) -> None:
    """Raises BulkError where a folder holds the state of a run that an earlier version began."""
    if (folder / "journal").exists():
        raise BulkError(
            f"{folder} holds the journal of a run that an earlier version of blip2 began. Nothing was touched: finish "
            "it with that version, or name another --out"
        )


class Database:
    """The database in a folder, opened for this process alone.

    before: how many inputs it had when it was opened.
    begun: the folder where the first run began, from which relative names are; it may have been moved with the output.

    Raises:
        BulkError: another run has it, it was begun with other settings, it is damaged or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        run_config: dict[str, Any] | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """folder: None: in memory. read_only: beside the process that has it; no settings are compared."""
        self.folder, self._lock = folder, None
        if folder is not None and not read_only:
            refuse_old_state(folder)
            self._lock = _locked(folder)
        mode = "ro" if read_only else "rwc"
        name = ":memory:" if folder is None else f"{(folder / NAME).absolute().as_uri()}?mode={mode}"
        self._at = 0  # where `find` expects the next input
        try:
            self._connection = sqlite3.connect(
                name, timeout=600, isolation_level=None, uri=folder is not None
            )
        except sqlite3.Error as error:
            self._unlock()
            raise self._refusal(error) from error
        try:
            if not read_only:
                self._prepare(run_config or {})
            self.before = self.count
            self.begun = self._begun()
        except BaseException:
            self.close()
            raise

    def _prepare(self, run_config: dict[str, Any]) -> None:
        # A rollback journal, for network file systems; emptied, for to delete it costs ten times as much.
        for pragma in ("journal_mode = TRUNCATE", "synchronous = FULL", "cache_size = -65536"):
            self.query(f"PRAGMA {pragma}")
        ((version,),) = self.query("PRAGMA user_version")
        new = version == 0 and not self.query("SELECT 1 FROM sqlite_master LIMIT 1")
        if new:
            with self.transaction():
                for statement in _SCHEMA.split(";"):
                    self.execute(statement)
                self.execute(f"PRAGMA user_version = {VERSION}")
                self.set("run", run_config)
                if self.folder is not None:
                    self.set("begun", [os.getcwd(), _from(os.getcwd(), self.folder)])
        elif version != VERSION:
            raise BulkError(f"{self.path} is of another version of blip2; use that, or name another --out")
        elif self.query("SELECT 1 FROM inputs LIMIT 1"):
            self._compare(self.get("run"), run_config)
        else:  # the run that began it ended before its first result, over a wrong option for one
            with self.transaction():
                self.set("run", run_config)

    def _begun(self) -> str:
        here, places = os.getcwd(), self.get("begun") or []
        places = [
            os.path.normpath(os.path.join(os.path.abspath(self.folder or ""), place)) for place in places
        ]
        return here if here in places else next(filter(os.path.isdir, places), here)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        differ = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        if differ:
            changes = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
            raise BulkError(
                f"this output was begun with other settings: {changes}. Use those, or another --out, "
                f"or remove {self.folder}"
            )

    @property
    def path(self) -> str:
        """The database's file, for messages."""
        return str(self.folder / NAME) if self.folder else "the database in memory"

    def close(self) -> None:
        """Let another run have it."""
        self._connection.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _refusal(self, error: sqlite3.Error) -> BulkError:
        """What an error of SQLite means to the user."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
            sqlite3.SQLITE_ERROR,
        ):  # the last: a table is gone
            return self._damaged(error)
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        what = f"the disk is full or fails ({error})" if full else f"cannot be used ({error})"
        remedy = "Make room and " if full else ""
        return BulkError(f"{self.path}: {what}; what was done is kept. {remedy}{GO_ON}")

    def _damaged(self, error: Exception) -> BulkError:
        return BulkError(
            f"{self.path} is damaged ({error}); bring back a copy, or name another --out. The output is as it was"
        )

    def query(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    def execute(self, sql: str, *values: Any) -> None:
        """Change something, within a transaction."""
        self.query(sql, *values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block, or none of them, are on the disk when it ends."""
        self.query("BEGIN IMMEDIATE")
        try:
            yield
            self.query("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.rollback()
            raise

    # --- settings ---

    def get(self, name: str) -> Any:
        """A value that was set; None where it was not."""
        rows = self.query("SELECT value FROM settings WHERE name = ?", name)
        try:
            return json.loads(rows[0][0]) if rows else None
        except ValueError as error:
            raise self._damaged(error) from error

    def set(self, name: str, value: Any) -> None:
        """Set a value, within a transaction."""
        self.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, json.dumps(value))

    # --- inputs ---

    @property
    def count(self) -> int:
        """How many inputs there are; the id of the last."""
        rows = self.query("SELECT max(id) FROM inputs")
        return rows[0][0] or 0

    @property
    def completed(self) -> int:
        """How many inputs have a place in webdataset shards."""
        rows = self.query("SELECT max(place) FROM inputs WHERE place IS NOT NULL")
        return 0 if rows[0][0] is None else rows[0][0] + 1

    def find(self, names: Sequence[str]) -> list[Known | None]:
        """What is known of each; quickest where the names come in the order of first sight."""
        keys = [to_blob(name) for name in names]
        window = self._known("i.id > ? ORDER BY i.id LIMIT ?", self._at, len(keys))
        found = {known.name: known for known in window}
        if list(found) != keys:
            wanted = set(keys)
            others = [key for key in wanted if key not in found]
            inside = [known.id for known in window if known.name in wanted]
            if others:
                rows = self._known(f"i.name IN ({', '.join('?' * len(others))})", *others)
                found |= {known.name: known for known in rows}
                inside = inside or [known.id for known in rows]
            self._at = max(inside, default=self._at)
        elif window:
            self._at = window[-1].id
        return [found.get(key) for key in keys]

    def spelled(self, name: str) -> list[str]:
        """How a run may have named this file, which one in this folder names so; first of all the name that is used."""
        if (here := os.getcwd()) != self.begun:
            name = os.path.join(here, name)
        path = os.path.abspath(name)
        relative = _from(path, self.begun)
        return [name, relative, os.path.join(os.curdir, relative), path]

    def _known(self, where: str, *values: Any) -> list[Known]:
        rows = self.query(
            "SELECT i.name, i.id, i.size, i.mtime_ns, i.content, i.error IS NOT NULL, i.file, p.sha256, p.style "
            f"FROM inputs i LEFT JOIN published p ON p.path = i.file AND p.pending = 0 WHERE {where}",
            *values,
        )
        return list(map(Known._make, rows))

    def having(self, names: Sequence[str]) -> list[str]:
        """Those of the names that it has."""
        sql = f"SELECT name FROM inputs WHERE name IN ({', '.join('?' * len(names))})"
        return [from_blob(name) for (name,) in self.query(sql, *map(to_blob, names))]

    def owner(self, file: str) -> str | None:
        """The name of the input whose text file this is."""
        rows = self.query("SELECT name FROM inputs WHERE file = ?", to_blob(file))
        return from_blob(rows[0][0]) if rows else None

    def texts(self, digest: str) -> list[Row] | None:
        """The texts of a content, by its SHA-256; None where it has none yet."""
        rows = self.query("SELECT texts FROM contents WHERE hash = ?", bytes.fromhex(digest))
        return json.loads(rows[0][0]) if rows else None

    def digest(self, content: int) -> str:
        """The SHA-256 of a content."""
        ((digest,),) = self.query("SELECT hash FROM contents WHERE id = ?", content)
        return str(digest.hex())

    def record(self, row: Row, *, upto: int = 0, numbered: bool = False) -> bool:
        """Take note of an input's row, within a transaction; whether it is new or its texts or its error are others.

        upto: the last input that was published in a table or shard; numbered: success gives it a place in a shard.
        """
        content = self._content(row) if "texts" in row else None
        error = to_blob(row["error"]) if "error" in row else None
        stamp = row.get("stamp") or (None, None)
        more = {name: row[name] for name in ("id", "at") if name in row}
        name, more_json = to_blob(row["image"]), json.dumps(more) if more else None
        file = to_blob(row["sidecar"]) if "sidecar" in row else None
        values = (*stamp, content, error, file, more_json)
        if file is not None:  # the image whose text file it was is gone
            self.execute("UPDATE inputs SET file = NULL WHERE file = ? AND name != ?", file, name)
        old = self.query("SELECT id, content, error, place FROM inputs WHERE name = ?", name)
        changed = not old or list(old[0][1:3]) != [content, error]
        if old:
            key, *before, place = old[0]
            if key <= upto and changed:
                self.execute("INSERT OR IGNORE INTO changed VALUES (?, ?, ?)", key, *before)
            columns = "size = ?, mtime_ns = ?, content = ?, error = ?, file = ?, more = ?"
            self.execute(f"UPDATE inputs SET {columns} WHERE id = ?", *values, key)
        else:
            place = None
            columns = "size, mtime_ns, content, error, file, more, name"
            self.execute(f"INSERT INTO inputs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", *values, name)
        if numbered and content is not None and place is None:
            self.execute("UPDATE inputs SET place = ? WHERE name = ?", self.completed, name)
        return changed

    def _content(self, row: Row) -> int:
        key = bytes.fromhex(row["hash"])
        if not (known := self.query("SELECT id FROM contents WHERE hash = ?", key)):
            texts = json.dumps(row["texts"], separators=(",", ":"))
            self.execute("INSERT INTO contents (hash, texts) VALUES (?, ?)", key, texts)
            known = self.query("SELECT last_insert_rowid()")
        return int(known[0][0])

    def rows(self, *, upto: int | None = None, as_published: bool = False) -> Iterator[tuple[int, Row]]:
        """All inputs that have texts or an error, in the order of first sight.

        as_published: as a table had them when its last input was `upto`.
        """
        content, error = ("i.content", "i.error")
        if as_published:
            choice = "CASE WHEN h.input IS NULL THEN i.{0} ELSE h.{0} END"
            content, error = choice.format("content"), choice.format("error")
        sql = (
            f"SELECT i.id, i.name, c.hash, c.texts, {error}, i.more FROM inputs i "
            "LEFT JOIN changed h ON h.input = i.id "
            f"LEFT JOIN contents c ON c.id = {content} WHERE i.id > ? AND i.id <= ? ORDER BY i.id LIMIT {16 * CHUNK}"
        )
        at, end = 0, self.count if upto is None else upto
        while some := self.query(sql, at, end):
            for key, *values in some:
                if values[1] or values[3]:
                    yield key, _row(*values)
            at = some[-1][0]

    def placed(self, start: int, end: int) -> list[tuple[int, Row]]:
        """The places from `start` to before `end` whose inputs have texts, and these."""
        rows = self.query(
            "SELECT i.place, i.name, c.hash, c.texts, i.error, i.more "
            "FROM inputs i JOIN contents c ON c.id = i.content WHERE i.place >= ? AND i.place < ? ORDER BY i.place",
            *(start, end),
        )
        return [(place, _row(*values)) for place, *values in rows]

    def failures(self) -> Iterator[Row]:
        """The rows of all inputs that failed."""
        at = 0
        while some := self.query(
            f"SELECT id, name, error FROM inputs WHERE error IS NOT NULL AND id > ? ORDER BY id LIMIT {CHUNK}",
            at,
        ):
            yield from (_row(name, None, None, error, None) for _, name, error in some)
            at = some[-1][0]

    def start_over(self) -> None:
        """Forget all inputs and edits, within a transaction; what was published stays known."""
        for table in ("inputs", "contents", "changed", "edits"):
            self.execute(f"DELETE FROM {table}")
        self.execute("UPDATE published SET upto = 0")
        self.before = self._at = 0

    # --- what was published ---

    def published(self, path: str, *, pending: bool = False) -> Published | None:
        """A file that was written, or is to be; None where it was not."""
        rows = self.query(
            "SELECT sha256, size, mtime_ns, style, upto, form FROM published WHERE path = ? AND pending = ?",
            *(to_blob(path), pending),
        )
        for sha256, size, mtime, style, upto, form in rows:
            stamp = None if size is None else (size, mtime)
            pair = None if style is None else tuple(json.loads(style))
            return Published(sha256, stamp, pair, upto, None if form is None else json.loads(form))
        return None

    def publish(self, path: str, file: Published, *, pending: bool = False) -> None:
        """Take note, within a transaction, that a file was written, or (pending) that it is to be."""
        if not pending:
            self.execute("DELETE FROM published WHERE path = ?", to_blob(path))
        form = None if file.form is None else json.dumps(file.form)
        style = None if file.style is None else json.dumps(file.style)
        values = (file.sha256, *(file.stamp or (None, None)), style, file.upto, form)
        self.execute(
            "INSERT OR REPLACE INTO published VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            to_blob(path),
            pending,
            *values,
        )

    def pending(self) -> list[str]:
        """Files that may have been written or not."""
        return [from_blob(path) for (path,) in self.query("SELECT path FROM published WHERE pending = 1")]


def _row(name: bytes, digest: bytes | None, texts: str | None, error: bytes | None, more: str | None) -> Row:
    row: Row = {"image": from_blob(name)} | (json.loads(more) if more else {})
    if texts is not None and digest is not None:
        return row | {"hash": digest.hex(), "texts": json.loads(texts)}
    return row if error is None else row | {"error": from_blob(error)}


def _from(path: str, start: str | Path) -> str:
    """A path relative to a folder; as it is where that is on another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return path


def _locked(folder: Path) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("wb")
    except OSError as error:
        raise BulkError(f"{folder}: cannot be written ({error.strerror}); name another --out") from error
    if not lock_file(lock):
        lock.close()
        raise BulkError(f"{folder}: another run is writing this output; wait for it, or name another --out")
    return lock


def disk_error(path: Path, error: OSError) -> BulkError:
    """What a failed write means to the user."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot be written ({error.strerror or error})"
    return BulkError(f"{path}: {what}; what was done is kept. Make room and {GO_ON}")
