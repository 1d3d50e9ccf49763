"""What the commands about images share: images in, rows of results to standard output in the order of the images."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blip2.commands.streams import one_line, visible
from blip2.commands.terminal import DONE, SOME_FAILED, print_json, print_line, report_error

if TYPE_CHECKING:
    from blip2.bulk import Inputs
    from blip2.bulk.run import Describe
    from blip2.images import ImageProcessor
    from blip2.predict import Predictor

MOST = 10**15  # of images; itertools.islice, for one, takes no number of any size


def inputs_of(args: argparse.Namespace, *, strict: bool = False) -> Inputs:
    """The images that the arguments name. strict: one that is not there is an error, and no failed image."""
    from blip2.bulk import Inputs

    for option, number in (("--batch-size", args.batch_size), ("--limit", args.limit)):
        if number is not None and not 1 <= number <= MOST:
            raise ValueError(f"{option} must be a whole number from 1 to {MOST:,}; got {number}")
    sources = [args.images] if isinstance(args.images, str) else args.images
    return Inputs(
        sources=sources,
        include=args.include,
        exclude=args.exclude,
        limit=args.limit,
        shard=args.shard,
        strict=strict,
        stdin=sys.stdin.buffer.read() if "-" in sources and not strict else None,
    )


def report_left_out(inputs: Inputs) -> None:
    """Print what listing the images passed over, and what would help."""
    from blip2.imagefiles.advice import left_out_text

    if text := left_out_text(inputs.left_out):
        print(text, file=sys.stderr)


def countable(inputs: Inputs) -> Inputs | None:
    """The inputs where they can be counted at once: to count the rows of parquet files is to read their images."""
    return None if any(source.lower().endswith(".parquet") for source in inputs.sources) else inputs


def print_rows(
    args: argparse.Namespace,
    inputs: Inputs,
    describe: Describe,
    columns: Sequence[str],
    *,
    image_processors: Sequence[ImageProcessor],
    parallel: Predictor | None = None,
) -> int:
    """Print what `describe` gives for each image as it comes; one that cannot be read is an error line of its own.

    Args:
        columns: what a line holds of a result, where it has it; with --json all of it is printed but the question,
            which must be a column.
        image_processors: of all models that see the images.
        parallel: the model, where two batches may be computed at once.

    Returns:
        The exit status.
    """
    from tqdm import tqdm

    from blip2.bulk import RunSettings, caption_rows
    from blip2.bulk.describe import decoding, parallel_batches
    from blip2.bulk.outputs import flat
    from blip2.bulk.progress import progress_bar
    from blip2.bulk.run import Progress

    items = iter(inputs)
    first = list(itertools.islice(items, args.batch_size + 1))
    single, model = len(first) == 1, parallel if len(first) > args.batch_size else None
    hidden = args.quiet or single or not sys.stderr.isatty()
    bar = progress_bar(countable(inputs), hidden=hidden, leave=False)
    done = failed = 0
    settings = RunSettings(batch_size=args.batch_size)
    workers = 0 if single else settings.threads  # a single image is not kept waiting for a process to start
    with (
        bar as show,
        parallel_batches(model) as count,
        decoding(*image_processors, workers=workers, max_pixels=args.max_pixels) as decode_image,
    ):
        settings = replace(settings, parallel_batches=count)
        for rows in caption_rows(
            itertools.chain(first, items), settings, describe, decode_image=decode_image
        ):
            with tqdm.external_write_mode():
                for row in flat(rows):
                    if "error" in row:
                        report_error(args, row["image"], row["error"])
                    elif args.json:
                        print_json({k: v for k, v in row.items() if k != "question" or k in columns})
                    else:
                        values = [row[name] for name in columns if name in row]
                        cells = [one_line(v) if isinstance(v, str) else f"{v:.4f}" for v in values]
                        print_line("\t".join(cells if single else [visible(row["image"]), *cells]))
            done, failed = done + len(rows), failed + sum("error" in row for row in rows)
            show(Progress(done, 0, failed))
    report_left_out(inputs)
    return SOME_FAILED if failed else DONE
