"""Publishing: rows take their places as files, and what users did to those files is never lost.

A file that was published is known by its hash. Before one takes its place, the database says what it will be; a kill in
between is resolved by what is there. A file with another hash is the user's: a table's changes are taken over, a text
file is left alone, everything else stops the run, and only if it would have to be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blip2.bulk import outputs
from blip2.bulk.database import GO_ON, BulkError, Database, Published, Row, disk_error, from_blob, to_blob
from blip2.bulk.edits import FORMS_THAT_PARSE, count_edits, table_rows, take_over
from blip2.bulk.outputs import file_hash, stamp_of
from blip2.bulk.settings import RunSettings
from blip2.storage import OutputError, TextFileError, output_file, replace_file, unfinished_file

ERRORS = "errors.jsonl"  # beside the database
BACKUP = ".bak"
SHARD_SIZE = 10_000  # images of a webdataset shard
_TRIES = 5  # to write a file that a user changes meanwhile


class _ChangedMeanwhileError(Exception):
    """A file is no longer what it was when it was looked at."""


class Output:
    """The files of a run.

    counts: inputs that were captioned or failed, and of the former those whose captions may well be wrong (flagged);
        captions that were left out (abstained); files made again; what was left alone: texts that are edited, added,
        removed, or were there before (existing); edits that were replaced; and, as 1, a file of the user's that was.
    note: what else the user should know.
    """

    def __init__(self, database: Database, settings: RunSettings) -> None:
        self.database, self.settings = database, settings
        self.counts: Counter[str] = Counter()
        self.note = ""
        self.overwrite = settings.existing == "overwrite"

    def begin(self) -> None:
        """Finish what a kill interrupted, and look at what users did.

        Raises:
            BulkError: the output cannot go on.
        """
        if self.overwrite and self.database.get("finished"):
            self.start_over()

    def start_over(self) -> None:
        """Begin again where the last run came to its end."""
        with self.database.transaction():
            self.database.start_over()
            self.database.set("finished", False)

    def add(self, rows: Sequence[Row]) -> None:
        """Record a batch's rows, and write what they complete.

        Raises:
            BulkError: the disk refuses, or what would have to be written has been edited.
        """
        with self.database.transaction():
            for row in rows:
                if "kept" in row:
                    self.counts[row["kept"]] += 1
                if row.get("known"):  # nothing about it has changed
                    continue
                changed = self.record(row)
                self.counts["captioned"] += changed and "texts" in row
                self.counts["flagged"] += changed and outputs.is_flagged(row, self.settings.threshold)
                self.counts["abstained"] += changed * sum(
                    "abstained" in text for text in row.get("texts", ())
                )
                self.counts["again"] += "again" in row
                self.counts["failed"] += "error" in row
            if self.database.get("finished"):
                self.database.set("finished", False)

    def record(self, row: Row) -> bool:
        """Record a row; whether there is news in it."""
        return self.database.record(row)

    def finish(self) -> None:
        """Write what takes all rows, and list those that failed. Raises as `add`."""
        folder = self.database.folder
        assert folder is not None
        errors = folder / ERRORS
        if next(self.database.failures(), None) is not None:
            with _writing(errors) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                outputs.write_errors(self.database.failures(), file)
        else:
            errors.unlink(missing_ok=True)
        if not self.database.get("finished"):
            with self.database.transaction():
                self.database.set("finished", True)

    def settle(self, name: str, path: Path) -> Published | None:
        """What was published at a path, after a kill between writing and recording is resolved."""
        old, pending = (self.database.published(name, pending=pending) for pending in (False, True))
        if pending is None:
            return old
        there = file_hash(path)
        # What was written beside its place and is still there has not taken it; else a user changed it since.
        taken = there not in (None, old and old.sha256) and not unfinished_file(path).exists()
        now = pending if there == pending.sha256 or taken else old
        with self.database.transaction():
            self.database.execute("DELETE FROM published WHERE path = ?", to_blob(name))
            if now is not None:
                self.database.publish(
                    name, now._replace(stamp=stamp_of(path) if there == now.sha256 else None)
                )
        return now

    def keep_backup(self, path: Path) -> None:
        """Copy a file of the user's to `NAME.bak` beside it, in place of the last such copy and of nothing else."""
        real = output_file(path)
        backup = real.with_name(real.name + BACKUP)
        name, there = str(backup), file_hash(backup)
        known = [self.database.published(name, pending=pending) for pending in (False, True)]
        content = file_hash(real)
        if there not in (None, content, *(copy.sha256 for copy in known if copy)):
            raise BulkError(
                f"{backup} is in the way: {path} is to be kept under this name; move it and {GO_ON}"
            )
        if content is not None:
            with self.database.transaction():
                self.database.publish(name, Published(content), pending=True)
            with _writing(backup) as beside:
                shutil.copyfile(real, beside)
            with self.database.transaction():
                self.database.publish(name, Published(content))

    def put(
        self,
        path: Path,
        write: Callable[[Path], None],
        make_way: Callable[[bytes | None], bool],
        *,
        many: bool = False,
    ) -> None:
        """Write a file beside its place and let it take it, unless what is there has changed since it was looked at.

        make_way: told the hash of what is there; False: that stays. many: one of many, whose names are not synced.
        """
        for _ in range(_TRIES):
            stamp = stamp_of(path)
            if not make_way(file_hash(path)):
                return
            try:
                with _writing(path, sync_name=not many) as beside:
                    write(beside)
                    if stamp_of(path) != stamp:
                        raise _ChangedMeanwhileError
                return
            except _ChangedMeanwhileError:
                continue
        raise BulkError(f"{path} is being written by something else; stop that, and {GO_ON}")


class Table(Output):
    """One file of all rows: JSONL, CSV, parquet or COCO's results."""

    def begin(self) -> None:
        self.name, self.problem = self.settings.out.name, ""
        self.old = self.settle(self.name, self.settings.out)
        super().begin()
        there = file_hash(self.settings.out)
        self.missing = there is None
        if self.old is None and there is not None:
            self.keep_backup(self.settings.out)  # what is in the way of that is reported before the work
        if self.overwrite or there is None or self.old is None:
            return
        if there != self.old.sha256:
            try:
                self.take_over(there)
            except BulkError as error:
                self.problem = str(error)
        if self.problem and self.stale():
            raise BulkError(self.problem)

    def start_over(self) -> None:
        there = file_hash(self.settings.out)
        if there is not None and self.old is not None:
            self.replace_edits(there)
        super().start_over()
        self.old = self.database.published(self.name)

    def record(self, row: Row) -> bool:
        changed = self.database.record(row, upto=self.old.upto if self.old else 0)
        if changed and self.problem:
            raise BulkError(self.problem)
        return changed

    def stale(self) -> bool:
        """Whether the file is not what it should be."""
        old, database = self.old, self.database
        return (
            old is None
            or self.missing
            or old.style != self.settings.style
            or database.count > old.upto
            or bool(database.query("SELECT 1 FROM changed LIMIT 1"))
        )

    def take_over(self, there: bytes) -> None:
        """Note what the user changed in the file, which has this hash. Raises BulkError where that cannot be known."""
        assert self.old is not None
        out, kind = self.settings.out, self.settings.kind
        remedy = f"Move it, or replace it with --existing overwrite, which keeps it as {out.name}{BACKUP}"
        if kind not in FORMS_THAT_PARSE:
            raise BulkError(
                f"{out} was changed since it was written and would have to be written anew. {remedy}"
            )
        try:
            with self.database.transaction():
                form = take_over(self.database, out, kind, self.old)
                self.old = self.old._replace(sha256=there, form=form)
                self.database.publish(self.name, self.old)
        except (TextFileError, OSError) as error:
            raise BulkError(
                f"{out} was changed since it was written and cannot be read any more ({error}). Repair it. {remedy}"
            ) from error

    def replace_edits(self, there: bytes) -> None:
        """Count the edits in the file, which has this hash, keep a copy of it and forget them."""
        assert self.old is not None
        changed = unreadable = there != self.old.sha256
        if changed:
            with contextlib.suppress(BulkError):
                self.take_over(there)
                unreadable = False
        edits = sum(count_edits(self.database).values()) + unreadable
        self.counts["replaced"] += edits
        if edits or changed:
            self.keep_backup(self.settings.out)
        self.old = self.old._replace(sha256=there, form=None)
        with self.database.transaction():
            self.database.execute("DELETE FROM edits")
            self.database.publish(self.name, self.old)

    def finish(self) -> None:
        if self.stale():
            self.counts["again"] += self.missing and self.old is not None
            self.put(self.settings.out, self.write, self.make_way)
            self.old = self.new
            with self.database.transaction():
                self.database.publish(self.name, self.old)
                self.database.execute("DELETE FROM changed")
        elif self.problem:
            self.note = f"{self.settings.out} was changed since it was written, and left alone"
        self.counts.update(count_edits(self.database))
        super().finish()

    def make_way(self, there: bytes | None) -> bool:
        """Take over or copy what the user has there."""
        if there is None or (self.old is not None and there == self.old.sha256):
            return True
        if self.old is None:  # it was there before the first run
            self.keep_backup(self.settings.out)
            self.counts["foreign"] = 1
        elif not self.overwrite:
            self.take_over(there)
        else:
            self.replace_edits(there)
        return True

    def write(self, beside: Path) -> None:
        """Write all rows, and say in the database what takes its place."""
        database, kind, style = self.database, self.settings.kind, self.settings.style
        form = self.old.form if self.old else None
        if kind in FORMS_THAT_PARSE:
            lines = (line for *_, some in table_rows(database, kind, style) for _, line in some)
            outputs.write_table(lines, beside, form or outputs.table_form(self.settings))
        elif kind == "coco":
            outputs.write_coco((row for _, row in database.rows()), beside, style)
        else:
            columns = outputs.columns_of(self.settings)
            outputs.write_parquet((row for _, row in database.rows()), beside, style, columns)
        digest = file_hash(beside)
        self.new = Published(digest or b"", None, style, database.count, form)
        with database.transaction():
            database.publish(self.name, self.new, pending=True)


class Shards(Output):
    """Webdataset shards: each is written when it is full, the last one at the end."""

    def path(self, number: int) -> Path:
        return self.settings.out.with_name(outputs.shard_name(self.settings.out, number))

    def begin(self) -> None:
        for name in filter(lambda name: name.endswith(".tar"), self.database.pending()):
            self.settle(name, self.settings.out.with_name(name))
        super().begin()

    def record(self, row: Row) -> bool:
        return self.database.record(row, upto=self.database.before, numbered=True)

    def add(self, rows: Sequence[Row]) -> None:
        earlier = self.database.completed
        super().add(rows)
        for number in range(earlier // SHARD_SIZE, self.database.completed // SHARD_SIZE):
            self.publish(number)

    def finish(self) -> None:
        places = self.database.query(
            "SELECT i.place FROM changed h JOIN inputs i ON i.id = h.input "
            "WHERE i.place >= 0 AND h.content IS NOT NULL"
        )
        changed = {place // SHARD_SIZE for (place,) in places}
        full, others = divmod(self.database.completed, SHARD_SIZE)
        for number in range(max(1, full + bool(others))):
            path, count = self.path(number), SHARD_SIZE if number < full else others
            old, stamp = self.database.published(path.name), stamp_of(path)
            there = old.sha256 if old and old.stamp == stamp else file_hash(path)
            as_before = old is not None and (old.style, old.upto) == (self.settings.style, count)
            if there is None or number in changed or not as_before:
                self.counts["again"] += as_before and there is None
                self.publish(number)
            elif old is not None and there != old.sha256:
                self.counts["edited"] += 1
            elif old is not None and stamp != old.stamp:  # it was copied or touched
                with self.database.transaction():
                    self.database.publish(path.name, old._replace(stamp=stamp))
        with self.database.transaction():
            self.database.execute("DELETE FROM changed")
        super().finish()

    def publish(self, number: int) -> None:
        """Write a shard."""
        path, first, style = self.path(number), number * SHARD_SIZE, self.settings.style
        rows = self.database.placed(first, first + SHARD_SIZE)
        count = min(SHARD_SIZE, self.database.completed - first)
        old = self.database.published(path.name)

        def make_way(there: bytes | None) -> bool:
            if there is not None and (old is None or there != old.sha256):
                if old is not None and not self.overwrite:
                    raise BulkError(
                        f"{path} was changed since it was written and would have to be written anew. Move it, or "
                        f"replace it with --existing overwrite, which keeps it as {path.name}{BACKUP}"
                    )
                self.keep_backup(path)
                self.counts["foreign" if old is None else "replaced"] += 1
            return True

        def write(beside: Path) -> None:
            outputs.write_shard(rows, beside, path, style)
            digest = file_hash(beside) or b""
            with self.database.transaction():
                self.database.publish(path.name, Published(digest, None, style, count), pending=True)

        self.put(path, write, make_way)
        now = self.database.published(path.name, pending=True)
        assert now is not None
        with self.database.transaction():
            self.database.publish(path.name, now._replace(stamp=stamp_of(path)))


class TextFiles(Output):
    """A text file for each image, written with its batch."""

    def begin(self) -> None:
        self.write_pending()
        super().begin()

    def record(self, row: Row) -> bool:
        changed = super().record(row)
        if "texts" not in row or "sidecar" not in row:
            return changed
        file, style = row["sidecar"], self.settings.style
        old = self.database.published(file)
        form = row.get("form", old.form if old else None)
        if old is None and "base" in row:  # what is to be added to
            self.database.publish(file, Published(row["base"]))
        content = outputs.text_content(row, style, form)
        new = Published(hashlib.sha256(content).digest(), None, style, 0, form)
        self.database.publish(file, new, pending=True)
        return changed

    def add(self, rows: Sequence[Row]) -> None:
        super().add(rows)
        self.write_pending()

    def write_pending(self) -> None:
        """Write the text files that are not known to be there."""
        rows = self.database.query(
            "SELECT p.path, c.texts FROM published p JOIN inputs i ON i.file = p.path "
            "JOIN contents c ON c.id = i.content WHERE p.pending = 1"
        )
        done: dict[str, Published] = {}
        for packed, texts in rows:
            file = from_blob(packed)
            old, new = (self.database.published(file, pending=pending) for pending in (False, True))
            assert new is not None and new.style is not None
            row = {"image": "", "texts": json.loads(texts)}
            content = outputs.text_content(row, new.style, new.form)
            self.write_text(self.settings.out / file, content, old, new)
            done[file] = new
        if done:
            with self.database.transaction():
                for file, new in done.items():
                    self.database.publish(file, new)

    def write_text(self, path: Path, content: bytes, old: Published | None, new: Published) -> None:
        """Write a text file unless it is there, or the user's."""

        def make_way(there: bytes | None) -> bool:
            if there is None or (old is not None and there == old.sha256):
                return True
            if there == new.sha256:
                return False
            if self.overwrite:
                self.keep_backup(path)
                self.counts["replaced"] += 1
                return True
            self.counts["edited"] += 1
            return False

        def write(beside: Path) -> None:
            beside.write_bytes(content)

        self.put(path, write, make_way, many=True)


def open_output(database: Database, settings: RunSettings) -> Output:
    """The output of a format."""
    kinds = {"txt": TextFiles, "webdataset": Shards}
    return kinds.get(settings.kind, Table)(database, settings)


@contextmanager
def _writing(path: Path, *, sync_name: bool = True) -> Iterator[Path]:
    """`replace_file`; what the disk refuses is a BulkError."""
    try:
        with replace_file(path, sync_name=sync_name) as beside:
            yield beside
    except OutputError as error:
        raise BulkError(str(error)) from error
    except OSError as error:
        raise disk_error(path, error) from error
