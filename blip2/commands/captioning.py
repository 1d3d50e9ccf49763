"""What `caption` and `ask` both do: texts about any number of images, to standard output or into files."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.commands.arguments import decoding_keywords, decoding_options, option, switch
from blip2.commands.images import countable, inputs_of, print_rows, report_doubts, report_left_out
from blip2.commands.streams import complain, put, unsteered, visible
from blip2.commands.terminal import DONE, SOME_FAILED, load_named, matcher_of, print_line, report_error
from blip2.generation.options import GenerationOptions, TextKind

if TYPE_CHECKING:
    from blip2.bulk import Inputs, RunSettings
    from blip2.bulk.run import DecodeImage, Describe, Engine, Progress
    from blip2.images import ImageProcessor
    from blip2.predict import Predictor

ONLY_FILES = ("format", "existing", "engine")  # options that need --out
OF_TEXTS = ("score", "match", "keep_best")
NOT_STREAMED = (
    "out",
    "json",
    "num_beams",
    "num_return_sequences",
    "questions",
    "prefix",
    "suffix",
    *OF_TEXTS,
    "abstain",
    "dry_run",
)


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Options about the texts, and --out with what belongs to it."""
    group = parser.add_argument_group("texts")
    option(group, "--prefix", "TEXT", "put before each text", default="")
    option(group, "--suffix", "TEXT", "put after each text", default="")
    switch(group, "--score", "the log-probability of each text too")
    switch(group, "--match", "how well each text fits, by the matcher")
    switch(group, "--keep-best", "keep the text that fits best, by the matcher")
    switch(group, "--dry-run", "count images and estimate the time only")
    group = parser.add_argument_group("output to files (docs/bulk.md)")
    about = (
        "write there and go on where an earlier run stopped: .jsonl, .csv, .parquet, .json (COCO's results), "
        ".tar (webdataset), or a folder for a .txt beside each image; - is standard output"
    )
    option(group, "-o --out", "PATH", about)
    formats = ("jsonl", "csv", "parquet", "coco", "txt", "webdataset")
    option(group, "--format", None, "the format, where the name of --out does not tell", choices=formats)
    about = "what to do with text files that exist; overwrite makes a finished output anew and keeps edits as .bak "
    about += "(default: skip)"
    option(group, "--existing", None, about, choices=("skip", "overwrite", "append", "prepend"))
    about = "ray: on all machines of a Ray cluster (default: local)"
    option(group, "--engine", None, about, choices=("local", "ray"))


def write_texts(args: argparse.Namespace, kind: TextKind, questions: list[str]) -> int:
    """Texts about all images, one or more lines each: answers where there are questions, else captions.

    kind: whose decoding options these are.
    """
    begun = time.perf_counter() - time.process_time()  # when Python was started, about
    args.out = None if args.out == "-" else args.out
    _check(args)
    options = decoding_options(args, kind)
    if args.stream:
        return _stream(args, options, questions)
    inputs = inputs_of(args, strict=args.out is not None)
    if args.out is not None:
        return _write_files(args, inputs, options, questions, begun)
    model = load_named(args)
    describe, processors = _captioner(args, lambda: model, model, options, questions)
    if args.dry_run:
        from blip2.bulk import RunSettings
        from blip2.bulk.describe import decoding, parallel_batches

        settings = RunSettings(batch_size=args.batch_size)
        decoders = decoding(*processors, workers=settings.threads, max_pixels=args.max_pixels)
        with parallel_batches(model) as count, decoders as decode_image:
            settings = replace(settings, parallel_batches=count)
            return _print_estimate(inputs, settings, describe, decode_image, begun)
    columns = ("question", "caption", "answer", "logprob", "match")[args.command == "ask" :]
    return print_rows(
        args,
        inputs,
        _styled(describe, args.prefix, args.suffix),
        columns,
        image_processors=processors,
        parallel=model,
        calibration=None if questions else model.generator.calibration,
    )


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError where options were given that would do nothing."""
    names = [name for name in ONLY_FILES if getattr(args, name) is not None] if args.out is None else []
    if names:
        raise ValueError(f"{', '.join(f'--{name}' for name in names)}: only with --out PATH")
    values = {name: getattr(args, name, None) for name in (NOT_STREAMED if args.stream else ())}
    names = [name for name, value in values.items() if value is True or value not in (None, False, "", 1)]
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"--stream prints one text as it comes: leave out {options}")


def _stream(args: argparse.Namespace, options: GenerationOptions, questions: list[str]) -> int:
    """One text about one image, word by word."""
    from blip2.bulk import RunSettings
    from blip2.bulk.listing import WorkItem
    from blip2.bulk.run import decode

    items = list(itertools.islice(inputs_of(args), 2))
    if len(items) != 1:
        count = "several" if items else "no"
        raise ValueError(f"--stream prints one text as it comes, and there are {count} images")
    model = load_named(args)
    decoded = decode(WorkItem(items[0]), RunSettings())
    if decoded.image is None:
        report_error(args, items[0].name, decoded.row["error"])
        return SOME_FAILED
    write: Any = model.ask if questions else model.caption
    for piece in write(decoded.image, *questions, stream=True, **decoding_keywords(args, options)):
        put(unsteered(piece), end="")
    print_line("")
    return DONE


def _captioner(
    args: argparse.Namespace,
    load: Callable[[], Predictor],
    model: Predictor,
    options: GenerationOptions,
    questions: list[str],
) -> tuple[Describe, list[ImageProcessor]]:
    """What gives the texts of images, and how the models that see them take them. load: gives the model that does the
    work."""
    from blip2.bulk.describe import make_captioner

    processors = [model.generator.image_processor]
    if args.match or args.keep_best:
        advice = (
            "leave out --match and --keep-best, or compare afterwards: blip2 match IMAGE TEXT --model itm"
        )
        processors.append(matcher_of(model, advice).image_processor)  # an error now where there is none
    settings = {name: getattr(args, name) for name in OF_TEXTS} | {"abstain": getattr(args, "abstain", None)}
    describe = make_captioner(load, decoding_keywords(args, options), questions=questions, **settings)
    return describe, processors


def _styled(describe: Describe, prefix: str, suffix: str) -> Describe:
    """The same with something around each text."""
    from blip2.bulk.outputs import styled

    return lambda images: [[styled(row, prefix, suffix) for row in rows] for rows in describe(images)]


def _print_estimate(
    inputs: Inputs, settings: RunSettings, describe: Describe, decode_image: DecodeImage, begun: float
) -> int:
    from blip2.bulk import estimate

    to_begin = time.perf_counter() - begun
    work = estimate(inputs, settings, describe, decode_image=decode_image)
    report_left_out(inputs)
    already = f", {work.done:,} of them done already" if work.done else ""
    seconds = to_begin + work.seconds
    minutes = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    duration = f"{seconds:.0f} seconds" if seconds < 120 else minutes
    print_line(f"{work.inputs:,} inputs{already}: about {duration} on this machine; nothing was written")
    return DONE


def _write_files(
    args: argparse.Namespace, inputs: Inputs, options: GenerationOptions, questions: list[str], begun: float
) -> int:
    """Texts of any number of images into a file or folder, going on where an earlier run stopped."""
    from blip2.bulk import BulkError, RunSettings, caption_all
    from blip2.bulk.database import GO_ON
    from blip2.bulk.describe import decoding, parallel_batches
    from blip2.bulk.outputs import check_output, format_of
    from blip2.bulk.progress import progress_bar

    out = Path(args.out)
    kind = format_of(out, args.format)
    check_output(out, kind)
    if options.do_sample and options.seed is None:
        raise BulkError("sampling into a file needs --seed: else no run could be repeated or gone on with")
    inputs.check()
    engine: Engine | None = None
    if args.engine == "ray":
        try:
            from blip2.bulk.on_ray import on_ray as engine
        except ImportError as error:
            raise BulkError(f"--engine ray needs Ray ({error}); pip install 'blip2[ray]'") from None
    # With Ray the model is loaded here only for what is written down about it.
    model = load_named(args if engine is None else argparse.Namespace(**vars(args) | {"device": "cpu"}))
    load = (lambda: model) if engine is None else (lambda: load_named(args))
    describe, processors = _captioner(args, load, model, options, questions)
    calibration = None if questions else model.generator.calibration
    settings = RunSettings(
        out=out,
        kind=kind,
        run_config=_run_config(args, options, questions, model, kind),
        prefix=args.prefix,
        suffix=args.suffix,
        existing=args.existing or "skip",
        threshold=None if calibration is None else calibration.threshold,
        batch_size=args.batch_size,
    )
    # A single image is not kept waiting for a process to start; on a cluster each task decodes in its own.
    single = len(list(itertools.islice(inputs, 2))) == 1
    decoders = decoding(
        *processors, workers=0 if single or engine else settings.threads, max_pixels=args.max_pixels
    )
    try:
        with parallel_batches(model) as count, decoders as decode_image:
            settings = replace(settings, parallel_batches=count)
            if args.dry_run:
                return _print_estimate(inputs, settings, describe, decode_image, begun)
            with progress_bar(countable(inputs), hidden=args.quiet) as show:
                done = caption_all(
                    inputs, settings, describe, decode_image=decode_image, progress=show, engine=engine
                )
    except KeyboardInterrupt:
        complain("stopped" if args.dry_run else f"stopped; what was done is kept, {GO_ON}")
        return 130
    report_left_out(inputs)
    if not args.quiet:
        print(visible(_summary(out, kind, done)), file=sys.stderr)
    report_doubts(calibration, done)
    return SOME_FAILED if done.failed else DONE


def _summary(out: Path, kind: str, done: Progress) -> str:
    """What a run did, and what it left alone."""
    from blip2.bulk.outputs import state_folder
    from blip2.bulk.publish import BACKUP, ERRORS

    kept = {name: getattr(done, name) for name in ("edited", "added", "removed", "existing")}
    several = ", ".join(f"{count:,} {name}" for name, count in kept.items() if count)
    left = f"{sum(kept.values()):,} left alone" + f" ({several})" * bool(several)
    parts = [f"{out}: {done.captioned:,} captioned, {done.failed:,} failed, {left}"]
    if done.before:
        parts.append(f"{done.before:,} inputs were known before")
    if done.again:
        parts.append(f"{done.again:,} written again")
    if done.replaced:
        parts.append(f"{done.replaced:,} edits replaced and kept in {BACKUP}")
    if done.foreign:
        parts.append(f"what was there before is kept in {BACKUP}")
    if done.failed:
        parts.append(f"errors: {state_folder(out, kind) / ERRORS}")
    return "; ".join([*parts, done.note] if done.note else parts)


def _run_config(
    args: argparse.Namespace, options: GenerationOptions, questions: list[str], model: Predictor, kind: str
) -> dict[str, Any]:
    """Whatever decides what a run writes: all of it is recorded, and an output goes on only with the same."""
    from blip2.bulk.describe import fingerprint

    calibration = None if questions else model.generator.calibration
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # recorded for an option that was not given
    decoding = {name: neutral.get(name) if value is None else value for name, value in vars(options).items()}
    for name in ("model", "dtype", "quantize", *OF_TEXTS, "shard"):
        decoding[name] = getattr(args, name)
    return decoding | {
        "eos_token_id": args.eos_token_id,  # a list, as JSON gives it back
        "prompt": getattr(args, "prompt", None),
        "questions": questions,
        "abstain": getattr(args, "abstain", None),
        "calibration": None if calibration is None else calibration.to_dict(),
        "weights": fingerprint(model, matcher=args.match or args.keep_best),
        "format": kind,
        "existing": args.existing if args.existing in ("append", "prepend") else None,
    }
