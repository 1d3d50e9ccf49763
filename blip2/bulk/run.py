"""The engine: images are decoded while the model works on earlier ones, and come back as rows in their order.

`caption_rows` gives the rows to its caller, for standard output. `caption_all` writes them to files: every batch is one
record of the journal. `on_ray` is another engine for the same run: whatever gives the rows in order can be one.
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
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from blip2.bulk.index import Index, key_of
from blip2.bulk.journal import Journal, Row
from blip2.bulk.outputs import sidecar, state_folder, write_done, write_rest
from blip2.bulk.sources import ImageItem
from blip2.images import ImageError, load_image
from blip2.storage import TextFileError, read_text_and_form

# For each image its texts, as rows of the output.
Describe = Callable[[Sequence[Image.Image]], list[list[Row]]]
Prepare = Callable[[Image.Image], Image.Image]
# Of (items, journal, settings, describe, prepare): the rows of each batch, in the order of the items.
Engine = Callable[[Iterable[ImageItem], Journal, "RunSettings", Describe, Prepare], Iterator[list[Row]]]
Recorded = Callable[[str], list[Row] | None]  # of a content, by its key, the texts that are recorded
Thing = TypeVar("Thing")
Result = TypeVar("Result")
Existing = Literal["skip", "overwrite", "append", "prepend"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How images are captioned, and where the texts go.

    kind: the format of the output, as `outputs.format_of` gives it; "stdout": the rows go to the caller.
    out: the output's path; not used for "stdout".
    run_config: whatever decides what is written; an output begun with other values is refused.
    existing: what happens to a text file that is there already; overwrite makes a finished output of any kind anew.
    batch_size: images computed at a time. parallel_batches: batches computed at once, each in a thread.
    threads: that read and decode images.
    """

    kind: str = "stdout"
    out: Path = Path()
    run_config: dict[str, Any] = field(default_factory=dict)
    existing: Existing = "skip"
    batch_size: int = 8
    parallel_batches: int = 1
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))


@dataclass(frozen=True)
class Progress:
    """How far a run is: inputs of this run, those of earlier ones, and how many of all failed."""

    done: int
    before: int
    failed: int


def caption_all(
    items: Iterable[ImageItem],
    settings: RunSettings,
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
        prepare: makes a decoded image smaller while it waits; what `describe` gives must not depend on it.
        engine: where the work is done; None: here.

    Raises:
        BulkError: another run has the output, it was begun with other settings, or the disk is full.
    """
    out, kind, anew = settings.out, settings.kind, settings.existing == "overwrite"
    with closing(Journal(state_folder(out, kind), settings.run_config, anew=anew)) as journal:
        done, before = 0, journal.before
        progress(Progress(0, before, journal.failed))
        if not journal.finished:  # the last batch may have been killed between the journal and its files
            write_done(journal, journal.last(), out, kind)
        for rows in (engine or on_this_machine)(items, journal, settings, describe, prepare):
            journal.add(rows)
            write_done(journal, rows, out, kind)
            done += len(rows)
            progress(Progress(done, before, journal.failed))
        if not journal.finished:
            write_rest(journal, out, kind)
            journal.finish()
        return Progress(done, before, journal.failed)


def on_this_machine(
    items: Iterable[ImageItem], journal: Journal, settings: RunSettings, describe: Describe, prepare: Prepare
) -> Iterator[list[Row]]:
    """The engine of one machine: threads read and decode ahead of the model."""
    fresh = new_items(items, journal.names, journal.files, settings)
    return caption_rows(fresh, settings, describe, prepare=prepare, recorded=journal.texts)


def caption_rows(
    items: Iterable[ImageItem],
    settings: RunSettings,
    describe: Describe,
    *,
    prepare: Prepare,
    recorded: Recorded = lambda key: None,
) -> Iterator[list[Row]]:
    """Caption all items and give their rows batch by batch, in the order of the items; nothing is recorded.

    What cannot be read is a row with `error`. Arguments as `caption_all`; an item that comes twice gives two rows.
    recorded: gives the texts that a content has from an earlier batch.
    """
    far, parallel = 2 * settings.batch_size + settings.threads, settings.parallel_batches
    decoded = _ahead(items, lambda item: decode(item, settings, prepare), settings.threads, far)
    batches = _batches(decoded, settings, recorded)

    def work(batch: Batch) -> tuple[Batch, dict[str, list[Row]]]:
        return batch, describe_all(batch.unseen, describe)

    # A single one is computed in this thread, where Ctrl-C takes effect at once.
    described = map(work, batches) if parallel == 1 else _ahead(batches, work, parallel, parallel - 1)
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


def new_items(
    items: Iterable[ImageItem], names: Index, files: Index, settings: RunSettings
) -> Iterator[ImageItem]:
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
            if settings.kind == "txt" and not item.problem:
                text = sidecar(item, settings.out)
                if files.get(key_of(text)) is not None:
                    problem = f"{text} is the text file of another image; rename one of them"
                    item = item._replace(problem=problem)
                files.set(key_of(text), 0)
            yield item


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
        """The row with its texts: those recorded for the content, else the new ones."""
        return self.row if self.image is None else self.row | {"texts": recorded(self.key) or texts[self.key]}


def decode(item: ImageItem, settings: RunSettings, prepare: Prepare) -> Decoded:
    """Read an item; what cannot be read is a row with `error`."""
    row: Row = {"image": item.name}
    if item.id is not None:
        row["id"] = item.id
    try:
        if settings.kind == "txt" and _is_finished(item, row, settings):
            return Decoded(row | {"skipped": True}, None)
        content = item.read()
        if settings.kind != "stdout":
            row["hash"] = hashlib.sha256(content).hexdigest()
        if settings.kind == "webdataset":
            row["at"] = [item.path, item.start, item.size]
        return Decoded(row, prepare(load_image(content)))
    except (ImageError, OSError, TextFileError) as error:
        message = re.sub(r"^an image of [0-9,]+ bytes", lambda _: item.name, str(error))
        row.pop("hash", None)
        return Decoded(row | {"error": message if item.name in message else f"{item.name}: {message}"}, None)


def _is_finished(item: ImageItem, row: Row, settings: RunSettings) -> bool:
    """Whether an item's text file stays as it is. Notes in the row which file that is, and what is kept of it."""
    row["sidecar"] = sidecar(item, settings.out)
    text = settings.out / row["sidecar"]
    if text.parent.is_dir() and not os.access(text.parent, os.W_OK):
        raise ImageError(f"{item.name}: {text} cannot be written; name another folder with --out")
    if item.problem or settings.existing == "overwrite" or not text.exists():
        return False
    if settings.existing != "skip":
        old, row["form"] = read_text_and_form(text)
        if old := old.strip():
            row |= {"before": f"{old} "} if settings.existing == "append" else {"after": f" {old}"}
    return settings.existing == "skip"


@dataclass(frozen=True)
class Batch:
    """Images in their order, and those of them, by their keys, that the model is to describe."""

    read: list[Decoded]
    unseen: dict[str, Image.Image]


def _batches(stream: Iterable[Decoded], settings: RunSettings, recorded: Recorded) -> Iterator[Batch]:
    """Runs of images, each with so many contents the model has not seen; what needs no model goes along."""
    size, batch = settings.batch_size, Batch([], {})
    latest = deque([batch], settings.parallel_batches)  # their texts may not be recorded yet
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
