"""Commands about many images: captions into files, scores on benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from blip2.commands.terminal import (
    DONE,
    SOME_FAILED,
    complain,
    load_matcher,
    load_named,
    print_json,
    print_line,
)

if TYPE_CHECKING:
    from blip2.bulk.run import Engine


# Options of `caption` that mean nothing without --out, and what they are where they were not given.
WITH_OUT: dict[str, Any] = {
    "format": None,
    "include": [],
    "exclude": [],
    "existing": "skip",
    "prefix": "",
    "suffix": "",
    "questions": None,
    "score": False,
    "match": False,
    "keep_best": False,
    "limit": None,
    "shard": "1/1",
    "engine": "local",
    "dry_run": False,
}


def need_out(args: argparse.Namespace) -> None:
    """Raises ValueError where options were given that would do nothing without --out."""
    given = [
        f"--{name.replace('_', '-')}" for name, unset in WITH_OUT.items() if getattr(args, name) != unset
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: only with --out PATH")


def bulk(args: argparse.Namespace, options: dict[str, Any], begun: float) -> int:
    """Captions of any number of images into a file or folder. begun: the clock when the command was."""
    from pathlib import Path

    from blip2.bulk import BulkError, Inputs, Settings, caption_all, estimate
    from blip2.bulk.describe import describer, fingerprint, shrinker, side_by_side
    from blip2.bulk.journal import GO_ON
    from blip2.bulk.outputs import ERRORS, format_of, state_folder
    from blip2.bulk.progress import progress_bar
    from blip2.inputs import SUFFIXES

    if args.stream or args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--out takes no --stream, and a --batch-size and a --limit of at least 1")
    out = Path(args.out)
    kind = format_of(out, args.format)
    questions: list[str] = []
    if args.questions is not None:
        if "prompt" in options:
            raise ValueError("--questions goes without --prompt")
        questions = _lines("--questions", args.questions)
    if options["do_sample"] and options["seed"] is None:
        raise BulkError("sampling into a file needs --seed: else no run could be repeated or gone on with")

    inputs = Inputs(
        sources=args.images, include=args.include, exclude=args.exclude, limit=args.limit, shard=args.shard
    )
    if next(iter(inputs), None) is None and args.shard == "1/1":
        raise BulkError(f"{' '.join(args.images)}: no images found (folders: {' '.join(sorted(SUFFIXES))})")
    engine = _ray() if args.engine == "ray" else None
    here = args if engine is None else argparse.Namespace(**vars(args) | {"device": "cpu"})  # others describe
    model = load_named(here)
    if args.match or args.keep_best:
        _ = model.matcher  # says now where there is none
    describe = describer(
        (lambda: model) if engine is None else (lambda: load_named(args)),
        options,
        questions=questions,
        prefix=args.prefix,
        suffix=args.suffix,
        score=args.score,
        match=args.match,
        keep_best=args.keep_best,
    )
    prepare = shrinker(model, match=args.match or args.keep_best)
    made_with = options | {
        "model": args.model,
        "weights": fingerprint(model),
        "dtype": args.dtype,
        "quantize": args.quantize,
        "questions": questions,
        "prefix": args.prefix,
        "suffix": args.suffix,
        "score": args.score,
        "match": args.match,
        "keep_best": args.keep_best,
        "format": kind,
        "existing": args.existing if args.existing in ("append", "prepend") else None,
        "shard": args.shard,
    }
    # To count the rows of parquet files is to read the images within them.
    countable = not any(source.lower().endswith(".parquet") for source in args.images)
    quiet = contextlib.nullcontext(lambda progress: None)
    bar = quiet if args.quiet or args.dry_run else progress_bar(inputs if countable else None)
    try:
        with bar as show, side_by_side(model) as beside:
            settings = Settings(
                out=out,
                kind=kind,
                made_with=made_with,
                existing=args.existing,
                batch_size=args.batch_size,
                side_by_side=beside,
                threads=min(8, os.cpu_count() or 1),
            )
            if args.dry_run:
                to_begin = time.perf_counter() - begun
                found = estimate(inputs, settings, describe, prepare=prepare)
                done_already = f", {found.done:,} of them done already" if found.done else ""
                lasts = _duration(to_begin + found.seconds)
                print_line(
                    f"{found.inputs:,} inputs{done_already}: about {lasts} on this machine; nothing was written"
                )
                return DONE
            done = caption_all(inputs, settings, describe, prepare=prepare, progress=show, engine=engine)
    except KeyboardInterrupt:
        complain("stopped" if args.dry_run else f"stopped; what was done is kept, {GO_ON}")
        return 130
    if not args.quiet:
        total = done.done + done.before
        which = f": {state_folder(out, kind) / ERRORS}" if done.failed else ""
        print(f"{out}: {total:,} inputs, {done.failed:,} of them failed{which}", file=sys.stderr)
    return SOME_FAILED if done.failed else DONE


def _lines(option: str, name: str) -> list[str]:
    """The lines of an option's file. Raises ValueError where there are none."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            lines = [line for line in map(str.strip, file) if line]
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ValueError(f"{option} {name}: cannot be read ({told})") from error
    if not lines:
        raise ValueError(f"{option} {name}: the file holds none; write one a line")
    return lines


def _ray() -> Engine:
    """The engine of a cluster. Raises BulkError where Ray is missing."""
    try:
        from blip2.bulk.on_ray import on_ray
    except ImportError as error:
        from blip2.bulk import BulkError

        raise BulkError(f"--engine ray needs Ray ({error}); pip install 'blip2[ray]'") from None
    return on_ray


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def evaluate(args: argparse.Namespace) -> int:
    from pathlib import Path

    from blip2.evaluate.report import lines, report_json, write
    from blip2.evaluate.run import EvalSettings, evaluate

    if args.abstain and not args.answers:
        raise ValueError("--abstain is about answers that are ranked: give them with --answers FILE")
    answers = _lines("--answers", args.answers) if args.answers else []
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: this is a file; name a folder")
    data, images, annotations = (
        None if path is None else Path(path) for path in (args.data, args.images, args.annotations)
    )
    load = load_matcher if args.task.startswith("retrieval-") and args.matcher is None else load_named
    with _counts(args.quiet) as progress:
        settings = EvalSettings(
            protocol=args.protocol,
            limit=args.limit,
            batch_size=args.batch_size,
            answers=tuple(answers),
            abstain=args.abstain,
            images=images,
            annotations=annotations,
            progress=progress,
        )
        reports = evaluate(lambda: load(args), args.task, data, settings, model_name=args.model)
    for report in reports:
        for line in [] if args.json else lines(report):
            print_line(line)
        if args.out:
            folder = Path(args.out) / report.task if len(reports) > 1 else Path(args.out)
            for path in write(report, folder):
                print(path, file=sys.stderr)
        if args.json:
            print_json(report_json(report))
    return DONE


@contextlib.contextmanager
def _counts(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each kind of work: what, how many are done, of how many."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, disable=quiet or not sys.stderr.isatty(), leave=False)
        bars[what].update(done - bars[what].n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
