"""The engine: images are decoded while the model works on earlier ones, and come back as rows in their order.

`caption_rows` gives the rows to its caller, for standard output. `caption_all` writes them to files: every batch is one
transaction of the database. `on_ray` is another engine for the same run: whatever gives the rows in order can be one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from blip2.bulk.database import Database, Row
from blip2.bulk.listing import WorkItem, work_items
from blip2.bulk.outputs import check_output, file_hash, stamp_of, state_folder
from blip2.bulk.publish import open_output
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import ImageItem
from blip2.imagefiles.advice import unreadable_suffix
from blip2.imagefiles.warned import naming
from blip2.images import ImageError, load_image
from blip2.storage import OutputError, TextFileError, read_text_and_form

# For each image its texts, as rows of the output.
Describe = Callable[[Sequence[Image.Image]], list[list[Row]]]
# Of the bytes of an image file, the image as `describe` takes it. Raises ImageError.
DecodeImage = Callable[[bytes], Image.Image]
# Of (items, database, settings, describe, decode_image): the rows of each batch, in the order of the items.
Engine = Callable[[Iterable[ImageItem], Database, RunSettings, Describe, DecodeImage], Iterator[list[Row]]]
Recorded = Callable[[str], list[Row] | None]  # of a content, by its key, the texts that are recorded
Thing = TypeVar("Thing")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a run is: inputs of this run, those of earlier ones, and how many of this run's failed.

    captioned, again: inputs whose texts are new; files that were written again with known ones.
    flagged, abstained: of the new ones, inputs whose captions may well be wrong; captions that were left out.
    edited, added, removed, existing: what of the user's was left alone: edited text files, shards and rows, added rows,
        removed rows, text files that were there before.
    replaced: edits of the user's that were replaced; foreign: files that no run had written. All are kept as .bak.
    note: what else the user should know.
    """

    done: int
    before: int
    failed: int
    captioned: int = 0
    flagged: int = 0
    abstained: int = 0
    again: int = 0
    edited: int = 0
    added: int = 0
    removed: int = 0
    existing: int = 0
    replaced: int = 0
    foreign: int = 0
    note: str = ""


def caption_all(
    items: Iterable[ImageItem],
    settings: RunSettings,
    describe: Describe,
    *,
    decode_image: DecodeImage = load_image,
    progress: Callable[[Progress], None] = lambda progress: None,
    engine: Engine | None = None,
) -> Progress:
    """Caption all items that the output does not have yet, then publish it; text files and shards as they are done.

    What failed is tried again, what changed is captioned again, files that are gone are written again. What a user has
    edited, added or removed stays so.

    Args:
        describe: images to texts. It is called with images of different content only, in several threads at once where
            the settings say so.
        decode_image: the bytes of an image file to the image that `describe` takes, in several threads at once.
        engine: where the work is done; None: here.

    Raises:
        BulkError: another run has the output, it was begun with other settings, the disk is full, or a file that would
            have to be written anew was changed and what was changed cannot be told.
        OutputError: the output is no file that could be written.
    """
    check_output(settings.out, settings.kind)
    folder = state_folder(settings.out, settings.kind)
    with closing(Database(folder, settings.run_config)) as database:
        done, output = 0, open_output(database, settings)
        output.begin()
        before = database.before

        def state() -> Progress:
            return Progress(done, before, **{"failed": 0} | output.counts, note=output.note)

        progress(state())
        for rows in (engine or on_this_machine)(items, database, settings, describe, decode_image):
            output.add(rows)
            done += sum(not row.get("known") for row in rows)
            progress(state())
        output.finish()
        return state()


def on_this_machine(
    items: Iterable[ImageItem],
    database: Database,
    settings: RunSettings,
    describe: Describe,
    decode_image: DecodeImage,
) -> Iterator[list[Row]]:
    """The engine of one machine: threads read and decode ahead of the model."""
    tasks = work_items(items, database, settings, database.before)
    return caption_tasks(tasks, settings, describe, decode_image, database.texts)


def caption_rows(
    items: Iterable[ImageItem],
    settings: RunSettings,
    describe: Describe,
    *,
    decode_image: DecodeImage = load_image,
) -> Iterator[list[Row]]:
    """Caption all items and give their rows batch by batch, in the order of the items; nothing is recorded.

    What cannot be read is a row with `error`. Arguments as `caption_all`; an item that comes twice gives two rows.
    """
    return caption_tasks(map(WorkItem, items), settings, describe, decode_image, lambda key: None)


def caption_tasks(
    tasks: Iterable[WorkItem],
    settings: RunSettings,
    describe: Describe,
    decode_image: DecodeImage,
    recorded: Recorded,
) -> Iterator[list[Row]]:
    """As `caption_rows`. recorded: gives the texts that a content has from an earlier batch."""
    far, parallel = 2 * settings.batch_size + settings.threads, settings.parallel_batches
    decoded = _ahead(tasks, lambda task: decode(task, settings, decode_image), settings.threads, far)
    batches = _batches(decoded, settings, recorded)

    def work(batch: Batch) -> tuple[Batch, dict[str, list[Row]]]:
        return batch, describe_all(batch.unseen, describe)

    # A single one is computed in this thread, where Ctrl-C takes effect at once.
    # Of several one more has begun, which takes the place of the one that is done while its rows are recorded.
    described = map(work, batches) if parallel == 1 else _ahead(batches, work, parallel, parallel)
    for batch, texts in described:
        yield [decoded.with_texts(texts, recorded) for decoded in batch.read]


def _ahead(
    things: Iterable[Thing], work: Callable[[Thing], Result], threads: int, most: int
) -> Iterator[Result]:
    """What threads make of things, in order; of `most` more the work has begun."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Result]] = deque()
        try:
            for thing in things:
                begun.append(pool.submit(work, thing))
                if len(begun) > most:
                    yield begun.popleft().result()
            for future in begun:
                yield future.result()
        finally:
            for future in begun:
                future.cancel()


@dataclass(frozen=True)
class Decoded:
    """An item that was read. image: None where there is nothing for the model."""

    row: Row  # what is known before the model has seen the image
    image: Image.Image | None
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def key(self) -> str:
        """What images of equal content share: the hash; without one no two are equal."""
        return str(self.row.get("hash", self.number))

    def with_texts(self, texts: Mapping[str, list[Row]], recorded: Recorded = lambda key: None) -> Row:
        """The row with its texts: the new ones of the content, else those recorded."""
        if self.image is None and "hash" not in self.row:
            return self.row
        return self.row | {"texts": texts[self.key] if self.key in texts else recorded(self.key)}


def decode(task: WorkItem, settings: RunSettings, decode_image: DecodeImage = load_image) -> Decoded:
    """Read an item; what cannot be read is a row with `error`."""
    item = task.item
    row: Row = {"image": item.name} | ({} if item.id is None else {"id": item.id})
    if task.kept:
        return Decoded(row | {"kept": task.kept, "known": True}, None)
    if task.file:
        row["sidecar"] = task.file
    try:
        if settings.kind == "txt" and _is_kept(task, row, settings):
            return Decoded(row | {"kept": "existing"}, None)
        if task.digest:
            return Decoded(row | {"hash": task.digest, "stamp": task.stamp, "again": True}, None)
        row["stamp"] = stamp_of(item.path)  # before it is read: a change after that is seen next time
        content = item.read()
        if settings.kind != "stdout":
            row["hash"] = hashlib.sha256(content).hexdigest()
        if settings.kind == "webdataset":
            row["at"] = [item.path, item.start, item.size]
        with naming(item.name):
            return Decoded(row, decode_image(content))
    except (ImageError, OSError, TextFileError, OutputError) as error:
        message = re.sub(r"^an image of [0-9,]+ bytes", lambda _: item.name, str(error))
        message += unreadable_suffix(item.name, message)
        row.pop("hash", None)
        return Decoded(row | {"error": message if item.name in message else f"{item.name}: {message}"}, None)


def _is_kept(task: WorkItem, row: Row, settings: RunSettings) -> bool:
    """Whether an item's text file stays as it is. Notes in the row what is kept of the user's text."""
    if task.item.problem:
        return False
    text = settings.out / task.file
    if text.parent.is_dir() and not os.access(text.parent, os.W_OK):
        raise ImageError(f"{task.item.name}: {text} cannot be written; name another folder with --out")
    there = file_hash(text)
    if task.ours or settings.existing == "overwrite" or not text.exists():
        return False
    if settings.existing == "skip":
        return there is not None
    old, form = read_text_and_form(text)
    if old := old.strip():
        row["base"] = there
    around = [f"{old} ", ""] if settings.existing == "append" else ["", f" {old}"]
    row["form"] = [*(around if old else ["", ""]), form]
    return False


@dataclass(frozen=True)
class Batch:
    """Images in their order, and those of them, by their keys, that the model is to describe."""

    read: list[Decoded]
    unseen: dict[str, Image.Image]


def _batches(stream: Iterable[Decoded], settings: RunSettings, recorded: Recorded) -> Iterator[Batch]:
    """Runs of images, each with so many contents the model has not seen; what needs no model goes along."""
    size, batch = settings.batch_size, Batch([], {})
    latest = deque([batch], settings.parallel_batches + 1)  # their texts may not be recorded yet
    for decoded in stream:
        batch.read.append(decoded)
        if decoded.image is not None:
            key = decoded.key
            if not any(key in begun.unseen for begun in latest) and recorded(key) is None:
                batch.unseen[key] = decoded.image
        if len(batch.unseen) == size or len(batch.read) == 16 * size:
            yield batch
            batch = Batch([], {})
            latest.append(batch)
    if batch.read:
        yield batch


def describe_all(images: Mapping[str, Image.Image], describe: Describe) -> dict[str, list[Row]]:
    """The texts of each content."""
    return dict(zip(images, describe(list(images.values())), strict=True)) if images else {}
