"""Commands about images: captions, answers, conversation, matching, vectors, explanations."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import blip2
from blip2.commands.sets import bulk, need_out
from blip2.commands.terminal import (
    DONE,
    SOME_FAILED,
    load_matcher,
    load_named,
    one_line,
    print_json,
    print_line,
    report_error,
)

if TYPE_CHECKING:
    from blip2.predict import Chat


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The decoding options as keywords of `Predictor.caption`, `.ask` and `Chat.send`."""
    from blip2.generation.options import GenerationOptions

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
    num_beams = args.num_beams if args.num_beams is not None else 1 if sample or args.stream else 5
    GenerationOptions(num_beams=num_beams, **options)  # complains before a model is loaded
    if args.stream and (num_beams > 1 or args.json or options.get("num_return_sequences", 1) > 1):
        raise ValueError(
            "--stream prints one text as it comes: leave out --beams, --json and --num-return-sequences"
        )
    return options | {"num_beams": num_beams}


def caption(args: argparse.Namespace) -> int:
    begun = time.perf_counter() - time.process_time()  # when Python was started, about
    options = _decoding(args)
    if args.prompt is not None:
        options["prompt"] = args.prompt
    if args.out is not None:
        return bulk(args, options, begun)
    need_out(args)
    return _write(args, "caption", options)


def ask(args: argparse.Namespace) -> int:
    return _write(args, "answer", _decoding(args) | {"question": args.question})


def _write(args: argparse.Namespace, kind: str, options: dict[str, Any]) -> int:
    """Captions or answers for all images."""
    model = load_named(args)
    method = model.caption if kind == "caption" else model.ask
    if args.stream:
        return _stream(args, method, options)

    def write(images: list[Any]) -> list[Any]:
        return list(method(images, batch_size=args.batch_size, **options))

    def show(name: str, found: Any, alone: bool) -> None:
        for text in found if isinstance(found, list) else [found]:
            if args.json:
                print_json({"image": name, kind: text, "score": text.score})
            else:
                print_line(one_line(text) if alone else f"{name}\t{one_line(text)}")

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
        report_error(args, name, str(error))
        return SOME_FAILED
    print_line("")
    return DONE


def chat(args: argparse.Namespace) -> int:
    options = _decoding(args)
    if args.image == "-":
        raise ValueError("chat reads questions from standard input; give the image as a path")
    model = load_named(args)
    try:
        chat = model.chat(args.image)
    except blip2.ImageError as error:
        report_error(args, args.image, str(error))
        return SOME_FAILED
    status = DONE
    for question in _questions():
        try:
            _answer(args, chat, question, options)
        except ValueError as error:  # this question cannot be answered; the next one may
            report_error(args, args.image, str(error))
            status = SOME_FAILED
    return status


def _answer(args: argparse.Namespace, chat: Chat, question: str, options: dict[str, Any]) -> None:
    if args.stream:
        for piece in chat.send(question, stream=True, **options):
            print(piece, end="", flush=True)
        print_line("")
        return
    answer = chat.send(question, **options)
    if args.json:
        print_json({"image": args.image, "question": question, "answer": answer, "score": answer.score})
    else:
        print_line(one_line(answer))


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
    model = load_matcher(args)

    def show(name: str, found: Any, alone: bool) -> None:
        for text, fit in zip(args.texts, found, strict=True):
            if args.json:
                print_json(
                    {
                        "image": name,
                        "text": text,
                        "probability": fit.probability,
                        "similarity": fit.similarity,
                    }
                )
            else:
                line = f"{fit.probability:.4f}\t{one_line(text)}"
                print_line(line if alone else f"{name}\t{line}")

    return _for_each_image(args, [args.images], lambda images: list(model.match(images, args.texts)), show)


def embed(args: argparse.Namespace) -> int:
    if not args.images and not args.text:
        raise ValueError("nothing to embed: give images, or --text")
    args.json = True
    model = load_matcher(args)
    for text, vector in zip(args.text, model.embed_text(args.text).tolist(), strict=True):
        print_json({"text": text, "embedding": vector})

    def show(name: str, found: Any, alone: bool) -> None:
        print_json({"image": name, "embedding": found})

    return _for_each_image(args, args.images, lambda images: list(model.embed(images).tolist()), show)


def explain(args: argparse.Namespace) -> int:
    from pathlib import Path

    target = Path(args.output)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"-o {args.output}: the name must end with .png, .jpg or .webp")
    if not target.parent.is_dir():
        raise ValueError(f"-o {args.output}: there is no folder {target.parent}")
    name, image = _expand(args.image)[0] if args.image == "-" else (args.image, args.image)
    model = load_named(args)
    try:
        if isinstance(image, Exception):
            raise image
        found = model.explain(image, text=args.text, question=args.question)
    except blip2.ImageError as error:
        report_error(args, name, str(error))
        return SOME_FAILED
    found.image().save(target)
    if args.json:
        words = [
            {"text": word.text, "logprob": word.logprob, "heat": word.heat.tolist()} for word in found.words
        ]
        print_json({"image": name, "text": found.text, "words": words, "output": str(target)})
    else:
        print_line(one_line(found.text))
    return DONE


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
                        report_error(args, name, str(image))
                    else:
                        show(name, next(results), alone)
            bar.update(len(batch))
    return status
