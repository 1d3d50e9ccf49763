"""Talk about an image: one question a line, from the keyboard or a pipe.

blip2 chat photo.jpg
printf 'what is it?\\nwhat color is it?\\n' | blip2 chat photo.jpg
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import blip2
from blip2.commands import arguments, terminal
from blip2.storage import stream_lines

if TYPE_CHECKING:
    from blip2.predict import Chat


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="path of an image")
    arguments.add_model(parser, from_environment=True)
    arguments.add_decoding(parser, "answer", several=False)
    arguments.add_output(parser, "--json", "--stream", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Answer questions until they end."""
    if args.stream and (args.json or args.num_beams not in (None, 1)):
        raise ValueError("--stream prints words as they come: leave out --json and --num-beams")
    options = arguments.decoding_keywords(args, arguments.decoding_options(args, "answer"))
    if args.image == "-":
        raise ValueError("chat reads questions from standard input; give the image as a path")
    model = terminal.load_named(args)
    try:
        chat = model.chat(args.image)
    except blip2.ImageError as error:
        terminal.report_error(args, args.image, str(error))
        return terminal.SOME_FAILED
    status = terminal.DONE
    for question in _questions():
        try:
            _answer(args, chat, question, options)
        except ValueError as error:  # this question cannot be answered; the next one may
            terminal.report_error(args, args.image, str(error))
            status = terminal.SOME_FAILED
    return status


def _answer(args: argparse.Namespace, chat: Chat, question: str, options: dict[str, Any]) -> None:
    answer: Any = chat.send(question, stream=args.stream, **options)
    if args.stream:
        for piece in answer:
            print(piece, end="", flush=True)
        terminal.print_line("")
    elif args.json:
        record = {"image": args.image, "question": question, "answer": answer, "score": answer.score}
        terminal.print_json(record)
    else:
        terminal.print_line(terminal.one_line(answer))


def _questions() -> Iterator[str]:
    """Lines from the keyboard, with a prompt and the line editor, or from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        lines = stream_lines(sys.stdin.buffer, "standard input")
        yield from (line.strip() for _, line in lines if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editor)
    print("Ask about the image; an empty line or Ctrl-D ends.", file=sys.stderr)
    try:
        while line := input("> ").strip():
            yield line
    except EOFError:
        print(file=sys.stderr)
