"""The engine: images are decoded while the model works on earlier ones; every batch is one record of the journal.

`on_ray` is another engine for the same run: whatever gives a batch's rows in the order of the inputs can be one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from blip2.bulk.index import Index, key_of
from blip2.bulk.journal import Journal, Row
from blip2.bulk.outputs import (
    publish,
    shard,
    sidecar,
    state_folder,
    write_errors,
    write_shard,
    write_sidecars,
)
from blip2.bulk.sources import Item
from blip2.images import ImageError, load_image

# For each image its texts, as rows of the output.
Describe = Callable[[Sequence[Image.Image]], list[list[Row]]]
Prepare = Callable[[Image.Image], Image.Image]
# Of (items, journal, settings, describe, prepare): the rows of each batch, in the order of the items.
Engine = Callable[[Iterable[Item], Journal, "Settings", Describe, Prepare], Iterator[list[Row]]]
Thing = TypeVar("Thing")
Result = TypeVar("Result")
Existing = Literal["skip", "overwrite", "append", "prepend"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the output goes and how.

    kind: of `outputs.FORMATS`.
    made_with: whatever decides what is written; an output begun with other values is refused.
    existing: what happens to a text file that is there already; overwrite makes a finished output of any kind anew.
    batch_size: images computed at a time. side_by_side: batches that are, each in a thread. threads: that decode.
    """

    out: Path
    kind: str
    made_with: dict[str, Any]
    existing: Existing = "skip"
    batch_size: int = 8
    side_by_side: int = 1
    threads: int = 2


@dataclass(frozen=True)
class Progress:
    """How far a run is: inputs of this run, those of earlier ones, and how many of all failed."""

    done: int
    before: int
    failed: int


def caption_all(
    items: Iterable[Item],
    settings: Settings,
    describe: Describe,
    *,
    prepare: Prepare = lambda image: image,
    progress: Callable[[Progress], None] = lambda progress: None,
    engine: Engine | None = None,
) -> Progress:
    """Caption all items that the output does not have yet, then publish it; text files and shards as they are done.

    Args:
        describe: images to texts. It is called with images of different content only, in several threads at once where
            the settings say so.
        prepare: makes a decoded image smaller for waiting; what `describe` says must not depend on it.
        engine: where the work is done; None: here.

    Raises:
        BulkError: another run has the output, it was begun with other settings, or the disk is full.
    """
    journal = Journal(
        state_folder(settings.out, settings.kind), settings.made_with, anew=settings.existing == "overwrite"
    )
    try:
        done, before = 0, journal.before
        progress(Progress(0, before, journal.failed))
        if not journal.finished:  # the last batch may have been killed between the journal and its files
            _write_done(journal, journal.last(), settings)
        for rows in (engine or on_this_machine)(items, journal, settings, describe, prepare):
            journal.add(rows)
            _write_done(journal, rows, settings)
            done += len(rows)
            progress(Progress(done, before, journal.failed))
        if done or not journal.finished:
            if settings.kind == "webdataset":
                _write_other_shards(journal, settings.out)
            elif settings.kind != "txt":
                publish(journal.rows(), settings.out, settings.kind)
            if journal.failed:
                write_errors(journal.rows(), journal.path.parent)
            journal.finish()
        return Progress(done, before, journal.failed)
    finally:
        journal.close()


def _write_done(journal: Journal, rows: Sequence[Row], settings: Settings) -> None:
    """The text files of the journal's last rows, or the shards that these have made full."""
    if settings.kind == "txt":
        write_sidecars(rows, settings.out)
    elif settings.kind == "webdataset":
        earlier = journal.sound - sum("error" not in row for row in rows)
        for number in range(earlier // journal.MANY, journal.sound // journal.MANY):
            write_shard(journal, settings.out, number)


def _write_other_shards(journal: Journal, out: Path) -> None:
    """The shard that is not full, where there is one or no other, and those that are missing."""
    full, others = divmod(journal.sound, journal.MANY)
    for number in range(max(1, full + bool(others))):
        if number == full or not shard(out, number).exists():
            write_shard(journal, out, number)


def on_this_machine(
    items: Iterable[Item], journal: Journal, settings: Settings, describe: Describe, prepare: Prepare
) -> Iterator[list[Row]]:
    """The engine of one machine: threads read and decode ahead of the model."""
    fresh = new_items(items, journal.names, journal.files, settings)
    far, beside = 2 * settings.batch_size + settings.threads, settings.side_by_side
    decoded = _ahead(fresh, lambda item: decode(item, settings, prepare), settings.threads, far)
    batches = _batches((each for _, each in decoded), settings, journal)

    def work(batch: Batch) -> dict[str, list[Row]]:
        return describe_all(batch.unseen, describe)

    # One at a time is done in this thread, where Ctrl-C is heard at once.
    described = (
        ((batch, work(batch)) for batch in batches)
        if beside == 1
        else _ahead(batches, work, beside, beside - 1)
    )
    for batch, texts in described:
        yield finished_rows(batch.read, texts, journal.texts)


def _ahead(
    things: Iterable[Thing], work: Callable[[Thing], Result], threads: int, most: int
) -> Iterator[tuple[Thing, Result]]:
    """Things with what threads made of them, in order; of `most` more the work has begun."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[tuple[Thing, Future[Result]]] = deque()
        try:
            for thing in things:
                begun.append((thing, pool.submit(work, thing)))
                if len(begun) > most:
                    thing, future = begun.popleft()
                    yield thing, future.result()
            for thing, future in begun:
                yield thing, future.result()
        finally:
            for _, future in begun:
                future.cancel()


def new_items(items: Iterable[Item], names: Index, files: Index, settings: Settings) -> Iterator[Item]:
    """Items whose names have not come yet, the names looked up many at a time.

    One whose text file is another image's is given with that as its problem.
    """
    stream = iter(items)
    while some := list(itertools.islice(stream, 256)):
        keys = [key_of(item.name) for item in some]
        known = names.known(keys)
        if all(known):
            continue
        for item, key, old in zip(some, keys, known, strict=True):
            if old or names.get(key) is not None:  # a second time within these
                continue
            names.set(key, 0)
            if settings.kind == "txt":
                text = sidecar(item, settings.out)
                if files.get(key_of(text)) is not None:
                    item = item._replace(
                        problem=f"{text} is the text file of another image; rename one of them"
                    )
                files.set(key_of(text), 0)
            yield item


@dataclass(frozen=True)
class Decoded:
    """An item that was read. image: None where there is nothing for the model."""

    row: Row  # what is known before the model has spoken
    image: Image.Image | None


def decode(item: Item, settings: Settings, prepare: Prepare) -> Decoded:
    """Read an item; what cannot be read is a row with `error`."""
    row: Row = {"image": item.name}
    if item.id is not None:
        row["id"] = item.id
    try:
        if settings.kind == "txt":
            row["sidecar"] = sidecar(item, settings.out)
            text = settings.out / row["sidecar"]
            if text.parent.is_dir() and not os.access(text.parent, os.W_OK):
                raise ImageError(f"{item.name}: {text} cannot be written; name another folder with --out")
            if not item.problem and settings.existing != "overwrite" and text.exists():
                if settings.existing == "skip":
                    return Decoded(row | {"skipped": True}, None)
                old = text.read_text(encoding="utf-8", errors="surrogateescape").strip()
                row |= {"before": f"{old} "} if settings.existing == "append" else {"after": f" {old}"}
        content = item.read()
        row["hash"] = hashlib.sha256(content).hexdigest()
        if settings.kind == "webdataset":
            row["at"] = [item.path, item.start, item.size]
        return Decoded(row, prepare(load_image(content)))
    except (ImageError, OSError) as error:
        told = re.sub(r"^an image of [0-9,]+ bytes", lambda _: item.name, str(error))
        row.pop("hash", None)
        return Decoded(row | {"error": told if item.name in told else f"{item.name}: {told}"}, None)


@dataclass(frozen=True)
class Batch:
    """Images in their order, and those of them, by their contents, that the model is to describe."""

    read: list[Decoded]
    unseen: dict[str, Image.Image]


def _batches(stream: Iterable[Decoded], settings: Settings, journal: Journal) -> Iterator[Batch]:
    """Runs of images, each with so many contents the model has not seen; what needs no model goes along."""
    size, batch = settings.batch_size, Batch([], {})
    latest = deque([batch], settings.side_by_side)  # the journal may not have these yet
    for each in stream:
        batch.read.append(each)
        if each.image is not None:
            digest = each.row["hash"]
            if not any(digest in begun.unseen for begun in latest) and journal.texts(digest) is None:
                batch.unseen[digest] = each.image
        if len(batch.unseen) == size or len(batch.read) == 16 * size:
            yield batch
            batch = Batch([], {})
            latest.append(batch)
    if batch.read:
        yield batch


def describe_all(images: Mapping[str, Image.Image], describe: Describe) -> dict[str, list[Row]]:
    """The texts of each content."""
    return dict(zip(images, describe(list(images.values())), strict=True)) if images else {}


def finished_rows(
    read: Iterable[Decoded], texts: Mapping[str, list[Row]], told: Callable[[str], list[Row] | None]
) -> list[Row]:
    """The rows with their texts: those that the content had earlier (`told`), else the new ones."""
    return [
        each.row
        if each.image is None
        else each.row | {"texts": told(each.row["hash"]) or texts[each.row["hash"]]}
        for each in read
    ]
