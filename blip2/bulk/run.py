"""The engine: images are decoded in threads while the model writes; every batch is one record of the journal."""

from __future__ import annotations

import hashlib
import itertools
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
from blip2.bulk.outputs import publish, sidecar, state_folder
from blip2.bulk.sources import Item
from blip2.images import ImageError, load_image

Describe = Callable[
    [Sequence[Image.Image]], list[list[Row]]
]  # for each image its texts, as rows of the output
Prepare = Callable[[Image.Image], Image.Image]
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
) -> Progress:
    """Caption all items that the output does not have yet, then publish it.

    Args:
        describe: images to texts. It is called with images of different content only.
        prepare: makes a decoded image smaller for waiting; what `describe` says must not depend on it.

    Raises:
        BulkError: another run has the output, it was begun with other settings, or the disk is full.
    """
    journal = Journal(
        state_folder(settings.out, settings.kind), settings.made_with, anew=settings.existing == "overwrite"
    )
    try:
        done, before = 0, journal.before
        progress(Progress(0, before, journal.failed))
        stream = _decoded(_new(items, journal.names), settings, prepare)
        for batch in _batches(stream, settings.batch_size, journal.contents):
            journal.add(_rows(batch, describe, journal))
            done += len(batch)
            progress(Progress(done, before, journal.failed))
        if done or not journal.finished:
            publish(journal.rows(), settings.out, settings.kind)
            journal.finish()
        return Progress(done, before, journal.failed)
    finally:
        journal.close()


def part_of(items: Iterable[Item], *, limit: int | None = None, shard: str | None = None) -> Iterator[Item]:
    """The first `limit` of the items, of those the i-th of n equal parts for a shard "i/n".

    Raises:
        ValueError: no such part.
    """
    first, step = 0, 1
    if shard is not None:
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard {shard!r}: expected I/N with I from 1 to N, such as 1/8")
        first, step = int(found[1]) - 1, int(found[2])
    return itertools.islice(items, first, limit, step)


def _new(items: Iterable[Item], names: Index) -> Iterator[Item]:
    """Items whose names have not come yet, the names looked up many at a time."""
    stream = iter(items)
    while some := list(itertools.islice(stream, 256)):
        keys = [key_of(item.name) for item in some]
        known = names.known(keys)
        if all(known):
            continue
        for item, key, old in zip(some, keys, known, strict=True):
            if not old and names.get(key) is None:  # a second time within these
                names.set(key, 0)
                yield item


@dataclass(frozen=True)
class _Decoded:
    row: Row  # what is known before the model has spoken
    image: Image.Image | None


def _decoded(items: Iterable[Item], settings: Settings, prepare: Prepare) -> Iterator[_Decoded]:
    """Images in the order of the items, read and decoded by threads not far ahead."""
    with ThreadPoolExecutor(settings.threads) as pool:
        ahead: deque[Future[_Decoded]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(_decode, item, settings, prepare))
                if len(ahead) > 2 * settings.batch_size + settings.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def _decode(item: Item, settings: Settings, prepare: Prepare) -> _Decoded:
    row: Row = {"image": item.name}
    if item.id is not None:
        row["id"] = item.id
    try:
        if settings.kind == "txt":
            text = sidecar(item.name, item.root, settings.out)
            row["sidecar"] = str(text)
            if text.exists() and settings.existing != "overwrite":
                if settings.existing == "skip":
                    return _Decoded(row | {"skipped": True}, None)
                old = text.read_text(encoding="utf-8", errors="surrogateescape").strip()
                row |= {"before": f"{old} "} if settings.existing == "append" else {"after": f" {old}"}
        content = item.read()
        row["hash"] = hashlib.sha256(content).hexdigest()
        if settings.kind == "webdataset":
            if item.content is not None:
                raise ImageError(f"{item.name}: images within parquet files cannot be put into shards")
            row["at"] = [item.path, item.start, item.size]
        return _Decoded(row, prepare(load_image(content)))
    except (ImageError, OSError) as error:
        told = re.sub(r"^an image of [0-9,]+ bytes", lambda _: item.name, str(error))
        row.pop("hash", None)
        return _Decoded(row | {"error": told if item.name in told else f"{item.name}: {told}"}, None)


def _batches(stream: Iterable[_Decoded], size: int, contents: Index) -> Iterator[list[_Decoded]]:
    """Runs of images, each with `size` contents the model has not seen; what needs no model goes along."""
    batch: list[_Decoded] = []
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


def _rows(batch: Sequence[_Decoded], describe: Describe, journal: Journal) -> list[Row]:
    """The batch's finished rows; each content is described once, in this batch or an earlier one."""
    texts: dict[str, list[Row]] = {}
    images: dict[str, Image.Image] = {}
    for each in batch:
        if each.image is None or each.row["hash"] in texts:
            continue
        place = journal.contents.get(content_key(each.row["hash"]))
        earlier = [] if place is None else journal.read(place)
        found = next((row["texts"] for row in earlier if row.get("hash") == each.row["hash"]), None)
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
