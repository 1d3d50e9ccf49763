"""What each command does. Imported when a command runs; see cli.py for the command line itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import blip2

if TYPE_CHECKING:
    from blip2.predict import Chat, Predictor

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2  # exit status


def complain(message: str) -> None:
    """One error line."""
    print(f"blip2: {_one_line(message)}", file=sys.stderr)


def _one_line(text: str) -> str:
    """Text for a line of a terminal: neither line breaks nor anything that steers it."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _print(line: str) -> None:
    print(line, flush=True)


def _print_json(record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False)
    # A file name that is no UTF-8 arrives with surrogates: written as escapes, the line stays JSON and the name exact.
    _print("".join(f"\\u{ord(char):04x}" if "\ud800" <= char <= "\udfff" else char for char in text))


def _load(args: argparse.Namespace) -> Predictor:
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return blip2.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        vision=args.vision,
        language=args.language,
        quantize=args.quantize,
        matcher=getattr(args, "matcher", None),
    )


def _load_matcher(args: argparse.Namespace) -> Predictor:
    from blip2.models import DEFAULT, DEFAULT_MATCHER_FOLDER

    if args.model == DEFAULT:  # the matcher alone: its generator is not needed here
        return blip2.load(
            DEFAULT_MATCHER_FOLDER,
            device=args.device,
            dtype=args.dtype,
            revision=args.revision,
            quantize=args.quantize,
        )
    return _load(args)


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The decoding options as keywords of `Predictor.caption`, `.ask` and `Chat.send`."""
    from blip2.generate import GenerationOptions

    early: dict[str, bool | str] = {"false": False, "true": True, "never": "never"}
    sample = args.sample or args.temperature != 1 or args.top_k != 0 or args.top_p != 1
    options = {
        "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.min_new_tokens,
        "length_penalty": args.length_penalty,
        "early_stopping": early[args.early_stopping],
        "repetition_penalty": args.repetition_penalty,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
        "do_sample": sample,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    if "num_return_sequences" in args:
        options["num_return_sequences"] = args.num_return_sequences
    beams = args.beams if args.beams is not None else 1 if sample or args.stream else 5
    GenerationOptions(beams=beams, **options)  # complains before a model is loaded
    if args.stream and (beams > 1 or args.json or options.get("num_return_sequences", 1) > 1):
        raise ValueError(
            "--stream prints one text as it comes: leave out --beams, --json and --num-return-sequences"
        )
    return options | {"beams": beams}


def caption(args: argparse.Namespace) -> int:
    options = _decoding(args)
    if args.prompt is not None:
        options["prompt"] = args.prompt
    if args.out is not None:
        return _bulk(args, options)
    return _write(args, "caption", options)


def _bulk(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Captions of any number of images into a file or folder."""
    from pathlib import Path

    from blip2.bulk import BulkError, Settings, caption_all, estimate, list_items
    from blip2.bulk.describe import describer, fingerprint, shrinker
    from blip2.bulk.journal import GO_ON
    from blip2.bulk.outputs import format_of
    from blip2.bulk.progress import progress_bar
    from blip2.bulk.run import part_of

    if args.stream or args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--out takes no --stream, and a --batch-size and a --limit of at least 1")
    out = Path(args.out)
    kind = format_of(out, args.format)
    questions: list[str] = []
    if args.questions is not None:
        questions = [line.strip() for line in Path(args.questions).read_text("utf-8").splitlines()]
        questions = [line for line in questions if line]
        if not questions or "prompt" in options:
            raise ValueError("--questions needs a file with a question a line, and goes without --prompt")
    if options["do_sample"] and options["seed"] is None:
        raise BulkError("sampling into a file needs --seed: else no run could be repeated or gone on with")

    def listed() -> Iterator[Any]:
        items = list_items(args.images, include=args.include, exclude=args.exclude)
        return part_of(items, limit=args.limit, shard=args.shard)

    listed()  # complains of a wrong --shard before a model is loaded
    model = _load(args)
    if args.match or args.keep_best:
        _ = model.matcher  # says now where there is none
    describe = describer(
        model,
        options,
        questions=questions,
        prefix=args.prefix,
        suffix=args.suffix,
        score=args.score,
        match=args.match,
        keep_best=args.keep_best,
    )
    prepare = shrinker(model, match=args.match or args.keep_best)
    if args.dry_run:
        count, seconds = estimate(listed(), describe, prepare=prepare, batch_size=args.batch_size)
        _print(f"{count:,} inputs, about {_duration(seconds)} on this machine; nothing was written")
        return DONE
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
        "shard": args.shard,
    }
    settings = Settings(
        out=out,
        kind=kind,
        made_with=made_with,
        existing=args.existing,
        batch_size=args.batch_size,
        threads=min(8, os.cpu_count() or 1),
    )
    # To count the rows of parquet files is to read the images within them.
    countable = not any(source.lower().endswith(".parquet") for source in args.images)
    quiet = contextlib.nullcontext(lambda progress: None)
    with quiet if args.quiet else progress_bar(listed if countable else None) as show:
        try:
            done = caption_all(listed(), settings, describe, prepare=prepare, progress=show)
        except KeyboardInterrupt:
            complain(f"stopped; what was done is kept, {GO_ON}")
            return 130
    if not args.quiet:
        total = done.done + done.before
        print(f"{out}: {total:,} inputs, {done.failed:,} of them failed", file=sys.stderr)
    return SOME_FAILED if done.failed else DONE


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def ask(args: argparse.Namespace) -> int:
    return _write(args, "answer", _decoding(args) | {"question": args.question})


def _write(args: argparse.Namespace, kind: str, options: dict[str, Any]) -> int:
    """Captions or answers for all images."""
    model = _load(args)
    method = model.caption if kind == "caption" else model.ask
    if args.stream:
        return _stream(args, method, options)

    def write(images: list[Any]) -> list[Any]:
        return list(method(images, batch_size=args.batch_size, **options))

    def show(name: str, found: Any, alone: bool) -> None:
        for text in found if isinstance(found, list) else [found]:
            if args.json:
                _print_json({"image": name, kind: text, "score": text.score})
            else:
                _print(_one_line(text) if alone else f"{name}\t{_one_line(text)}")

    return _for_each_image(args, args.images, write, show)


def _stream(args: argparse.Namespace, method: Callable[..., Iterator[str]], options: dict[str, Any]) -> int:
    sources = [source for argument in args.images for source in _expand(argument)]
    if len(sources) != 1:
        raise ValueError(f"--stream prints one text as it comes, and there are {len(sources)} images")
    name, image = sources[0]
    try:
        if isinstance(image, Exception):
            raise image
        for piece in method(image, stream=True, **options):
            print(piece, end="", flush=True)
    except blip2.ImageError as error:
        _report(args, name, str(error))
        return SOME_FAILED
    _print("")
    return DONE


def chat(args: argparse.Namespace) -> int:
    options = _decoding(args)
    if args.image == "-":
        raise ValueError("chat reads questions from standard input; give the image as a path")
    model = _load(args)
    try:
        chat = model.chat(args.image)
    except blip2.ImageError as error:
        _report(args, args.image, str(error))
        return SOME_FAILED
    status = DONE
    for question in _questions():
        try:
            _answer(args, chat, question, options)
        except ValueError as error:  # this question cannot be answered; the next one may
            _report(args, args.image, str(error))
            status = SOME_FAILED
    return status


def _answer(args: argparse.Namespace, chat: Chat, question: str, options: dict[str, Any]) -> None:
    if args.stream:
        for piece in chat.send(question, stream=True, **options):
            print(piece, end="", flush=True)
        _print("")
        return
    answer = chat.send(question, **options)
    if args.json:
        _print_json({"image": args.image, "question": question, "answer": answer, "score": answer.score})
    else:
        _print(_one_line(answer))


def _questions() -> Iterator[str]:
    """Lines from the keyboard, with a prompt and the line editor, or from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editor)
    print("Ask about the image; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if not line:
            return
        yield line


def match(args: argparse.Namespace) -> int:
    model = _load_matcher(args)

    def show(name: str, found: Any, alone: bool) -> None:
        for text, fit in zip(args.texts, found, strict=True):
            if args.json:
                _print_json(
                    {
                        "image": name,
                        "text": text,
                        "probability": fit.probability,
                        "similarity": fit.similarity,
                    }
                )
            else:
                line = f"{fit.probability:.4f}\t{_one_line(text)}"
                _print(line if alone else f"{name}\t{line}")

    return _for_each_image(args, [args.images], lambda images: list(model.match(images, args.texts)), show)


def embed(args: argparse.Namespace) -> int:
    if not args.images and not args.text:
        raise ValueError("nothing to embed: give images, or --text")
    args.json = True
    model = _load_matcher(args)
    for text, vector in zip(args.text, model.embed_text(args.text).tolist(), strict=True):
        _print_json({"text": text, "embedding": vector})

    def show(name: str, found: Any, alone: bool) -> None:
        _print_json({"image": name, "embedding": found})

    return _for_each_image(args, args.images, lambda images: list(model.embed(images).tolist()), show)


def evaluate(args: argparse.Namespace) -> int:
    from pathlib import Path

    from blip2.evaluate import Settings, as_json, evaluate, lines, write

    if args.abstain and not args.answers:
        raise ValueError("--abstain is about answers that are ranked: give them with --answers FILE")
    answers = Path(args.answers).read_text(encoding="utf-8").splitlines() if args.answers else []
    data, images, annotations = (
        None if path is None else Path(path) for path in (args.data, args.images, args.annotations)
    )
    load = _load_matcher if args.task.startswith("retrieval-") and args.matcher is None else _load
    with _counts(args.quiet) as progress:
        settings = Settings(
            protocol=args.protocol,
            limit=args.limit,
            batch_size=args.batch_size,
            answers=tuple(answer.strip() for answer in answers if answer.strip()),
            abstain=args.abstain,
            images=images,
            annotations=annotations,
            progress=progress,
        )
        reports = evaluate(lambda: load(args), args.task, data, settings, called=args.model)
    for report in reports:
        for line in [] if args.json else lines(report):
            _print(line)
        if args.out:
            folder = Path(args.out) / report.task if len(reports) > 1 else Path(args.out)
            for path in write(report, folder):
                print(path, file=sys.stderr)
        if args.json:
            _print_json(as_json(report))
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


def explain(args: argparse.Namespace) -> int:
    from pathlib import Path

    target = Path(args.output)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"-o {args.output}: the name must end with .png, .jpg or .webp")
    if not target.parent.is_dir():
        raise ValueError(f"-o {args.output}: there is no folder {target.parent}")
    name, image = _expand(args.image)[0] if args.image == "-" else (args.image, args.image)
    model = _load(args)
    try:
        if isinstance(image, Exception):
            raise image
        found = model.explain(image, text=args.text, question=args.question)
    except blip2.ImageError as error:
        _report(args, name, str(error))
        return SOME_FAILED
    found.image().save(target)
    if args.json:
        words = [
            {"text": word.text, "logprob": word.logprob, "heat": word.heat.tolist()} for word in found.words
        ]
        _print_json({"image": name, "text": found.text, "words": words, "output": str(target)})
    else:
        _print(_one_line(found.text))
    return DONE


def serve(args: argparse.Namespace) -> int:
    from pathlib import Path

    try:
        from blip2.serve.keys import Keys
        from blip2.serve.limits import Limits
        from blip2.serve.run import serve
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("blip2"):
            raise
        raise ValueError(
            f"serving needs {error.name}, which is not installed: pip install 'blip2[serve]'"
        ) from None
    serve(
        lambda: _load(args),
        model=Path(args.model).name,
        host=args.host,
        port=args.port,
        keys=None if args.api_key_file is None else Keys.load(args.api_key_file),
        limits=Limits().changed(args.limit),
        allow_hosts=tuple(args.allow_host),
        fetch_urls=args.fetch_urls,
        log_contents=args.log_content,
    )
    return DONE


def inspect(args: argparse.Namespace) -> int:
    from blip2.checkpoint import inspect
    from blip2.models import readable, resolve

    found = inspect(resolve(args.path), vision=args.vision, language=args.language)
    if args.json:
        _print_json(found.as_json())
        return SOME_FAILED if found.problems else DONE
    _print(f"{_one_line(found.path)}: {found.layout} ({found.file_format})")
    _print(f"  {found.variant}")
    for name, part in found.parts.items():
        dtypes = ", ".join(sorted(part.dtypes))
        _print(f"  {name}: {part.parameters:,} parameters in {part.tensors} tensors, {dtypes}")
    _print(
        f"  in all {found.parameters:,} parameters, {readable(found.stored_bytes)} stored in {found.tensors} tensors"
    )
    if found.head != "none":
        _print(f"  head: {found.head}")
    for kind, lines in (("WRONG", found.problems), ("note", found.notes)):
        for line in lines:
            _print(f"  {kind}: {_one_line(line)}")
    return SOME_FAILED if found.problems else DONE


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each kind of work: what is done, how many bytes more, and of how many."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=quiet, mininterval=1)
        bars[what].update(done)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def convert(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from blip2.checkpoint import convert
    from blip2.models import readable, resolve

    with _bars(args.quiet) as progress:
        made = convert(
            resolve(args.source),
            args.target,
            to=args.to,
            dtype=args.dtype,
            shard_bytes=None if args.shard_size is None else _bytes(args.shard_size),
            verify=args.verify,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    if args.json:
        _print_json(asdict(made) | {"folder": str(made.folder)})
        return DONE
    saved = (
        "" if args.dtype != "smallest-exact" else f"; {made.narrowed} tensors now in 16 bits, none changed"
    )
    sizes = f"{readable(made.read_bytes)} read, {readable(made.written_bytes)} written"
    _print(f"{_one_line(str(made.folder))}: {made.tensors} tensors, {sizes}{saved}")
    if made.verified:
        _print(f"  verified: {made.verified}")
    return DONE


def _bytes(text: str) -> int:
    """'2GB' -> 2,000,000,000."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in units:
        raise ValueError(f"--shard-size {text!r}: expected a number and KB, MB or GB, such as 2GB")
    return int(float(found[1]) * units[found[2]])


def quantize(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from blip2.checkpoint import quantize_checkpoint
    from blip2.models import readable, resolve

    with _bars(args.quiet) as progress:
        made = quantize_checkpoint(
            resolve(args.source),
            args.target,
            args.to,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    if args.json:
        _print_json(asdict(made) | {"folder": str(made.folder)})
        return DONE
    sizes = f"{readable(made.read_bytes)} read, {readable(made.written_bytes)} written"
    _print(f"{_one_line(str(made.folder))}: {made.layers} layers in {args.to}, {sizes}")
    return DONE


def bench(args: argparse.Namespace) -> int:
    from blip2.bench import Contender, run
    from blip2.checkpoint import count_parameters
    from blip2.checkpoint import resolve as find_files
    from blip2.models import DEFAULT, DEFAULT_FOLDER, default_dtype, resolve
    from blip2.predict import device_of

    if min(args.rounds, *args.batches) < 1:
        raise ValueError("--rounds and --batches are at least 1")
    folder = DEFAULT_FOLDER if args.model == DEFAULT else find_files(resolve(args.model))
    dtype = args.dtype or default_dtype(count_parameters(folder))
    device = str(device_of(args.device))
    sides = [Contender("blip2", str(folder), dtype, None, device)]
    sides += [Contender("blip2", str(folder), dtype, mode, device) for mode in args.quantize]
    if args.against:
        sides.append(Contender(args.against, str(folder), dtype, None, device))
    found = run(
        tuple(sides),
        rounds=args.rounds,
        batches=tuple(args.batches),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for line in found.lines():
        _print(line)
    _print(found.as_json())
    return DONE


def models(args: argparse.Namespace) -> int:
    from blip2.models import PRECISIONS, known_models, readable

    known = known_models()
    if args.json:
        for model in known:
            needs = {dtype: model.memory_bytes(dtype) for dtype in PRECISIONS}
            _print_json(
                {
                    "name": model.name,
                    "alias": model.alias,
                    "lavis": model.lavis,
                    "use": model.use,
                    "parameters": model.parameters,
                    "image_px": model.config.vision.image_size,
                    "disk_bytes": model.disk_bytes,
                    "memory_bytes": needs,
                }
            )
        return DONE
    rows: list[tuple[str, ...]] = [
        ("NAME", "ALIAS", "PARAMETERS", "DISK", "MEMORY fp32", *PRECISIONS[1:], "FOR", "IN LAVIS")
    ]
    for model in known:
        count = model.parameters
        rows.append(
            (
                model.name,
                model.alias,
                f"{count / 1e9:.2f} B" if count >= 10**9 else f"{count / 1e6:.1f} M",
                readable(model.disk_bytes),
                *(readable(model.memory_bytes(dtype)) for dtype in PRECISIONS),
                model.use,
                model.lavis,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def doctor(args: argparse.Namespace) -> int:
    from blip2.doctor import as_json, as_text, examine_machine, examine_models

    machine = examine_machine()
    checkups = examine_models(machine, args.model)
    if args.json:
        for record in as_json(machine, checkups):
            _print_json(record)
    else:
        for line in as_text(machine, checkups):
            _print(line)
    return SOME_FAILED if args.model is not None and checkups[0].problems else DONE


# --- over images -----------------------------------------------------------------------------------------------


def _expand(argument: str) -> list[tuple[str, Any]]:
    """(name to show, image or what is wrong) for an argument."""
    from blip2.inputs import expand

    if argument == "-":
        return [("-", sys.stdin.buffer.read())]
    try:
        return [(path, path) for path in expand(argument)]
    except blip2.ImageError as error:
        return [(argument, error)]


def _for_each_image(
    args: argparse.Namespace,
    arguments: list[str],
    compute: Callable[[list[Any]], list[Any]],
    show: Callable[[str, Any, bool], None],
) -> int:
    """Compute and show results in batches, in order; an image that cannot be read is an error line of its own."""
    from tqdm import tqdm

    from blip2.images import load_image
    from blip2.inputs import in_batches

    sources = [source for argument in arguments for source in _expand(argument)]
    alone = len(sources) == 1
    hidden = args.quiet or alone or not sys.stderr.isatty()
    status = DONE
    with tqdm(total=len(sources), unit=" images", disable=hidden, leave=False) as bar:
        for _, batch in in_batches(sources, args.batch_size):
            opened: list[Any] = []
            for _, source in batch:
                try:
                    opened.append(source if isinstance(source, Exception) else load_image(source))
                except blip2.ImageError as error:
                    opened.append(error)
            good = [image for image in opened if not isinstance(image, Exception)]
            results = iter(compute(good) if good else [])
            with bar.external_write_mode():
                for (name, _), image in zip(batch, opened, strict=True):
                    if isinstance(image, Exception):
                        status = SOME_FAILED
                        _report(args, name, str(image))
                    else:
                        show(name, next(results), alone)
            bar.update(len(batch))
    return status


def _report(args: argparse.Namespace, name: str, message: str) -> None:
    if args.json:
        _print_json({"image": name, "error": _one_line(message)})
    else:
        complain(message if name in message else f"{name}: {message}")


COMMANDS = {
    "caption": caption,
    "ask": ask,
    "chat": chat,
    "match": match,
    "embed": embed,
    "eval": evaluate,
    "explain": explain,
    "serve": serve,
    "inspect": inspect,
    "convert": convert,
    "quantize": quantize,
    "bench": bench,
    "models": models,
    "doctor": doctor,
}
