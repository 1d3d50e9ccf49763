"""How long a run would take, measured on the first of its inputs; nothing is written."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from blip2.bulk.index import Index, key_of
from blip2.bulk.journal import NAME, Journal
from blip2.bulk.outputs import sidecar, state_folder
from blip2.bulk.run import Describe, Prepare, RunSettings, on_this_machine
from blip2.bulk.sources import ImageItem

ENOUGH = 5.0  # seconds of work at its usual speed


@dataclass(frozen=True)
class Estimate:
    """What a run is to do: so many inputs, of which so many are done already, and the seconds the others will take."""

    inputs: int
    done: int
    seconds: float


def estimate(
    items: Iterable[ImageItem], settings: RunSettings, describe: Describe, *, prepare: Prepare
) -> Estimate:
    """Describe the first inputs that are still to be done, as `caption_all` would, and count all others.

    The first batches are slower than what follows (memory is allocated, code is loaded): they count as they are, and
    the speed is that of the batches after them.

    Raises:
        BulkError: as `caption_all` does before it begins.
    """
    names, inputs, to_do = _names(settings), 0, 0
    keep_files = settings.kind == "txt" and settings.existing == "skip"

    def new() -> Iterator[ImageItem]:
        nonlocal inputs, to_do
        stream = iter(items)
        while some := list(itertools.islice(stream, 256)):
            old = names.known([key_of(item.name) for item in some])
            inputs += len(some)
            for item, known in zip(some, old, strict=True):
                if not (known or (keep_files and (settings.out / sidecar(item, settings.out)).exists())):
                    to_do += 1
                    yield item

    stream = new()
    ends = [(0, 0.0)]  # of each batch: how many inputs were done, and when
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, closing(Journal(Path(folder), {})) as journal:
        for rows in on_this_machine(stream, journal, settings, describe, prepare):
            journal.add(rows)
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


def _names(settings: RunSettings) -> Index:
    """Of the inputs that the output has; none where it would be made anew."""
    folder = state_folder(settings.out, settings.kind)
    if settings.kind == "stdout" or settings.existing == "overwrite" or not (folder / NAME).is_file():
        return Index()
    with closing(Journal(folder, settings.run_config)) as journal:
        return journal.names
