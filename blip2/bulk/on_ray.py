"""The same run on a Ray cluster: Ray Data lists, reads and describes wherever there is room, balances, and restarts.

Every machine must find this package, the model and the images under the same paths. The database and the output are
written by the process that began the run, so everything about them holds here too; what is to be done is listed on its
machine, from the database.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from blip2.bulk.database import BulkError, Database, Row
from blip2.bulk.listing import work_items
from blip2.bulk.run import Decoded, DecodeImage, Describe, decode, describe_all
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import ImageItem


@dataclass(frozen=True)
class _Batch:
    """A row of Ray Data: a batch's tasks, then what was decoded, then finished rows; or what was raised on the way."""

    content: Any


def on_ray(
    items: Iterable[ImageItem],
    database: Database,
    settings: RunSettings,
    describe: Describe,
    decode_image: DecodeImage,
) -> Iterator[list[Row]]:
    """The engine of a cluster: the one that RAY_ADDRESS names or this machine is part of, else this machine.

    Batches are so many items one after the other; an image that comes in two of them is described twice, and the
    first text counts. `items`, `describe` and `decode_image` travel to other machines.

    Raises:
        BulkError: Ray gave up. What is raised on one of the machines is raised here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it calls errors what Ray Data does on purpose
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    folder, state, before = os.getcwd(), database.folder, database.before
    cpus, gpus, actors = _room()

    def listed(_: Any) -> Iterator[dict[str, Any]]:
        os.chdir(folder)
        try:
            known = Database(state, read_only=True)
            stream = work_items(items, known, settings, before)
            while some := list(itertools.islice(stream, settings.batch_size)):
                yield {"batch": np.array([_Batch(some)], object)}
        except Exception as error:
            yield {"batch": np.array([_Batch(error)], object)}

    def decoded(row: dict[str, Any]) -> dict[str, Any]:
        os.chdir(folder)
        return _next(row, lambda batch: [decode(task, settings, decode_image) for task in batch])

    def described(read: list[Decoded]) -> list[Row]:
        images = {decoded.key: decoded.image for decoded in read if decoded.image is not None}
        texts = describe_all(images, describe)
        return [decoded.row if decoded.image is None else decoded.with_texts(texts) for decoded in read]

    class Describer:
        def __init__(self) -> None:
            os.chdir(folder)
            torch.set_num_threads(max(1, cpus))

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return _next(row, described)

    batches = (
        ray.data.from_items([None])
        .map_batches(listed, num_cpus=0, resources={_this_machine(): 0.001})  # where the database is
        .repartition(target_num_rows_per_block=1)  # so that batches are read side by side
        .map(decoded, num_cpus=0.5)  # half of the time it waits for the disk
        .map(
            Describer,  # Ray makes one in each actor
            num_cpus=cpus,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        )
    )
    try:
        for row in batches.iter_rows():
            content = row["batch"].content
            if isinstance(content, Exception):
                raise content
            yield [
                done | {"texts": database.texts(done["hash"]) or done["texts"]} if "hash" in done else done
                for done in content
            ]
    except ray.exceptions.RayError as error:
        raise BulkError(f"on Ray: {str(error).splitlines()[0]}") from error


def _next(row: dict[str, Any], work: Callable[[Any], Any]) -> dict[str, Any]:
    """A batch's next state. What is raised goes through as it is: Ray's own errors are pages of text."""
    content = row["batch"].content
    if not isinstance(content, Exception):
        try:
            content = work(content)
        except Exception as error:
            content = error
    return {"batch": _Batch(content)}


def _this_machine() -> str:
    """The resource that a Ray cluster has on this machine alone."""
    here = ray.get_runtime_context().get_node_id()
    resources: list[str] = next(list(node["Resources"]) for node in ray.nodes() if node["NodeID"] == here)
    return next(name for name in resources if name.startswith("node:") and "__" not in name)


def _room() -> tuple[int, int, int]:
    """CPUs and GPUs of an actor, and how many actors: one a GPU, or one a machine; a CPU is left for reading."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    if gpus:
        return 0, 1, gpus
    cpus = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not cpus:
        raise ValueError("no machine of this Ray cluster has a whole CPU or GPU to give")
    return min(cpus) - 1, 0, len(cpus)
