"""What the commands about images share: images in, rows of results to standard output in the order of the images."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blip2.commands.streams import complain, one_line, visible
from blip2.commands.terminal import DONE, SOME_FAILED, print_json, print_line, report_error

if TYPE_CHECKING:
    from blip2.bulk import Inputs
    from blip2.bulk.run import Describe, Progress
    from blip2.calibration import Calibration
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


def report_doubts(calibration: Calibration | None, done: Progress) -> None:
    """Print one line about captions that may well be wrong, and about those that were left out for it."""
    left_out = f"{done.abstained:,} caption{'s' * (done.abstained > 1)} left out by --abstain"
    parts = [left_out] if done.abstained else []
    if calibration is not None and done.flagged:
        parts.insert(0, calibration.advice_for(done.flagged, done.captioned))
    if parts:
        complain("; ".join(parts))


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
    calibration: Calibration | None = None,
) -> int:
    """Print what `describe` gives for each image as it comes; one that cannot be read is an error line of its own.

    Args:
        columns: what a line holds of a result, where it has it; with --json all of it is printed but the question,
            which must be a column.
        image_processors: of all models that see the images.
        parallel: the model, where two batches may be computed at once.
        calibration: how likely its texts are right, where they are captions of a calibrated model.

    Returns:
        The exit status.
    """
    from tqdm import tqdm

    from blip2.bulk import RunSettings, caption_rows
    from blip2.bulk.describe import decoding, parallel_batches
    from blip2.bulk.outputs import flat, is_flagged
    from blip2.bulk.progress import progress_bar
    from blip2.bulk.run import Progress

    items = iter(inputs)
    first = list(itertools.islice(items, args.batch_size + 1))
    single, model = len(first) == 1, parallel if len(first) > args.batch_size else None
    hidden = args.quiet or single or not sys.stderr.isatty()
    bar = progress_bar(countable(inputs), hidden=hidden, leave=False)
    count, progress = Counter[str](), Progress(0, 0, 0)
    settings = RunSettings(batch_size=args.batch_size)
    workers = 0 if single else settings.threads  # a single image is not kept waiting for a process to start
    with (
        bar as show,
        parallel_batches(model) as side_by_side,
        decoding(*image_processors, workers=workers, max_pixels=args.max_pixels) as decode_image,
    ):
        settings = replace(settings, parallel_batches=side_by_side)
        for rows in caption_rows(
            itertools.chain(first, items), settings, describe, decode_image=decode_image
        ):
            with tqdm.external_write_mode():
                for row in flat(rows):
                    count["abstained"] += "abstained" in row
                    if "error" in row:
                        report_error(args, row["image"], row["error"])
                    elif args.json:
                        print_json({k: v for k, v in row.items() if k != "question" or k in columns})
                    else:
                        row = {"caption": ""} | row if "abstained" in row else row
                        values = [row[name] for name in columns if name in row]
                        cells = [one_line(v) if isinstance(v, str) else f"{v:.4f}" for v in values]
                        print_line("\t".join(cells if single else [visible(row["image"]), *cells]))
            for row in rows:
                count["failed" if "error" in row else "captioned"] += 1
                count["flagged"] += calibration is not None and is_flagged(row, calibration.threshold)
            progress = Progress(
                count["captioned"] + count["failed"],
                before=0,
                failed=count["failed"],
                captioned=count["captioned"],
                flagged=count["flagged"],
                abstained=count["abstained"],
            )
            show(progress)
    report_left_out(inputs)
    report_doubts(calibration, progress)
    return SOME_FAILED if progress.failed else DONE
