"""How long a run would take, measured on the first of its inputs; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from blip2.bulk.database import NAME, Database, Row
from blip2.bulk.listing import WorkItem, work_items
from blip2.bulk.outputs import check_output, file_hash, state_folder
from blip2.bulk.run import DecodeImage, Describe, caption_tasks
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import ImageItem

ENOUGH = 5.0  # seconds of work at its usual speed


@dataclass(frozen=True)
class Estimate:
    """What a run is to do: so many inputs, of which so many are done already, and the seconds the others will take."""

    inputs: int
    done: int
    seconds: float


def estimate(
    items: Iterable[ImageItem], settings: RunSettings, describe: Describe, *, decode_image: DecodeImage
) -> Estimate:
    """Describe the first inputs that are still to be done, as `caption_all` would, and count all others.

    The first batches are slower than what follows (memory is allocated, code is loaded): they count as they are, and
    the speed is that of the batches after them.

    Raises:
        BulkError, OutputError: as `caption_all` does before it begins.
    """
    with closing(_database(settings)) as database:
        inputs = to_do = 0
        texts: dict[str, list[Row]] = {}

        def counted() -> Iterator[ImageItem]:
            nonlocal inputs
            for item in items:
                inputs += 1
                yield item

        def new() -> Iterator[WorkItem]:
            nonlocal to_do
            for task in work_items(counted(), database, settings, database.before):
                if not task.kept and not _is_kept(task, settings):
                    to_do += 1
                    yield task

        stream = new()
        ends = [(0, 0.0)]  # of each batch: how many inputs were done, and when
        begin = time.perf_counter()

        def recorded(key: str) -> list[Row] | None:  # without --out a key is no hash, and nothing is recorded
            return texts.get(key) or (None if settings.kind == "stdout" else database.texts(key))

        for rows in caption_tasks(stream, settings, describe, decode_image, recorded):
            texts |= {row["hash"]: row["texts"] for row in rows if "hash" in row}
            ends.append((ends[-1][0] + len(rows), time.perf_counter() - begin))
            rounds, others = divmod(len(ends) - 1, settings.parallel_batches)
            if rounds >= 2 and not others and ends[-1][1] - ends[settings.parallel_batches][1] >= ENOUGH:
                break
        for _ in stream:
            pass  # counted
    sample, spent = ends[-1]
    first, started = ends[min(settings.parallel_batches, len(ends) - 1)]
    seconds_each = (spent - started) / max(1, sample - first)
    return Estimate(inputs, inputs - to_do, spent + seconds_each * (to_do - sample))


def _is_kept(task: WorkItem, settings: RunSettings) -> bool:
    """Whether a text file of the user's stays where it is."""
    kept = settings.existing == "skip" and bool(task.file) and not task.ours
    return kept and file_hash(settings.out / task.file) is not None


def _database(settings: RunSettings) -> Database:
    """Of the output; an empty one where there is none, or it would be made anew."""
    folder = state_folder(settings.out, settings.kind)
    if settings.kind != "stdout":
        check_output(settings.out, settings.kind)
        if (folder / NAME).is_file():
            database = Database(folder, settings.run_config)
            if not (settings.existing == "overwrite" and database.get("finished")):
                return database
            database.close()
    return Database()
