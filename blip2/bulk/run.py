"""The engine: images are decoded in threads while the model writes; every batch is one record of the journal.

`on_ray` is another engine for the same run: whatever gives a batch's rows in the order of the inputs can be one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from blip2.bulk.index import Index, content_key, key_of
from blip2.bulk.journal import Journal, Row
from blip2.bulk.outputs import publish, sidecar, state_folder, write_errors, write_sidecars
from blip2.bulk.sources import Item
from blip2.images import ImageError, load_image

# For each image its texts, as rows of the output.
Describe = Callable[[Sequence[Image.Image]], list[list[Row]]]
Prepare = Callable[[Image.Image], Image.Image]
# Of (items, journal, settings, describe, prepare): the rows of each batch, in the order of the items.
Engine = Callable[[Iterable[Item], Journal, "Settings", Describe, Prepare], Iterator[list[Row]]]
Existing = Literal["skip", "overwrite", "append", "prepend"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the output goes and how.

    kind: of `outputs.FORMATS`.
    made_with: whatever decides what is written; an output begun with other values is refused.
    existing: what happens to a text file that is there already; overwrite makes a finished output of any kind anew.
    batch_size: images computed at a time. threads: that decode.
    """

    out: Path
    kind: str
    made_with: dict[str, Any]
    existing: Existing = "skip"
    batch_size: int = 8
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
    """Caption all items that the output does not have yet, then publish it; text files are written at once.

    Args:
        describe: images to texts. It is called with images of different content only.
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
        if not journal.finished:  # the last batch may have been killed between the journal and its text files
            write_sidecars(journal.last(), settings.out)
        for rows in (engine or on_this_machine)(items, journal, settings, describe, prepare):
            journal.add(rows)
            write_sidecars(rows, settings.out)
            done += len(rows)
            progress(Progress(done, before, journal.failed))
        if done or not journal.finished:
            publish(journal.rows(), settings.out, settings.kind)
            if journal.failed:
                write_errors(journal.rows(), journal.path.parent)
            journal.finish()
        return Progress(done, before, journal.failed)
    finally:
        journal.close()


def on_this_machine(
    items: Iterable[Item], journal: Journal, settings: Settings, describe: Describe, prepare: Prepare
) -> Iterator[list[Row]]:
    """The engine of one machine: threads read and decode ahead of the model."""
    stream = _decoded(new_items(items, journal.names, journal.files, settings), settings, prepare)
    for batch in _batches(stream, settings.batch_size, journal.contents):
        yield finished_rows(batch, describe, journal.texts)


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


def _decoded(items: Iterable[Item], settings: Settings, prepare: Prepare) -> Iterator[Decoded]:
    """Images in the order of the items, read and decoded by threads not far ahead."""
    with ThreadPoolExecutor(settings.threads) as pool:
        ahead: deque[Future[Decoded]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(decode, item, settings, prepare))
                if len(ahead) > 2 * settings.batch_size + settings.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


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
            if item.content is not None:
                raise ImageError(f"{item.name}: images within parquet files cannot be put into shards")
            row["at"] = [item.path, item.start, item.size]
        return Decoded(row, prepare(load_image(content)))
    except (ImageError, OSError) as error:
        told = re.sub(r"^an image of [0-9,]+ bytes", lambda _: item.name, str(error))
        row.pop("hash", None)
        return Decoded(row | {"error": told if item.name in told else f"{item.name}: {told}"}, None)


def _batches(stream: Iterable[Decoded], size: int, contents: Index) -> Iterator[list[Decoded]]:
    """Runs of images, each with `size` contents the model has not seen; what needs no model goes along."""
    batch: list[Decoded] = []
    unseen: set[str] = set()
    for each in stream:
        batch.append(each)
        if each.image is not None and contents.get(content_key(each.row["hash"])) is None:
            unseen.add(each.row["hash"])
        if len(unseen) == size or len(batch) == 16 * size:
            yield batch
            batch, unseen = [], set()
    if batch:
        yield batch


def finished_rows(
    batch: Sequence[Decoded], describe: Describe, told: Callable[[str], list[Row] | None]
) -> list[Row]:
    """The batch's finished rows, each content described once. told: the texts of a content that came earlier."""
    texts: dict[str, list[Row]] = {}
    images: dict[str, Image.Image] = {}
    for each in batch:
        if each.image is None or each.row["hash"] in texts:
            continue
        found = told(each.row["hash"])
        if found is None:
            images[each.row["hash"]] = each.image
        else:
            texts[each.row["hash"]] = found
    if images:
        texts |= zip(images, describe(list(images.values())), strict=True)
    return [
        each.row if each.image is None else each.row | {"texts": texts[each.row["hash"]]} for each in batch
    ]


def estimate(
    items: Iterable[Item], describe: Describe, *, prepare: Prepare, batch_size: int = 8, sample: int = 16
) -> tuple[int, float]:
    """How many items there are, and the seconds they would take by the pace of the first ones (nothing is written)."""
    stream = iter(items)
    first = list(itertools.islice(stream, sample))
    images = []
    start = time.perf_counter()
    for item in first:
        try:
            images.append(prepare(load_image(item.read())))
        except ImageError:
            continue
    for place in range(0, len(images), batch_size):
        describe(images[place : place + batch_size])
    spent = time.perf_counter() - start
    count = len(first) + sum(1 for _ in stream)
    return count, spent * count / max(1, len(first))
