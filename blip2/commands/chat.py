"""Talk about an image: one question a line, from the keyboard or a pipe.

blip2 chat photo.jpg
printf 'what is it?\\nwhat color is it?\\n' | blip2 chat rose.jpg      # -> rose; red
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import blip2
from blip2.commands import arguments, terminal
from blip2.commands.streams import complain, put, unsteered
from blip2.storage import TextFileError, stream_lines

if TYPE_CHECKING:
    from blip2.predict import Chat

HELP = """\
Ask about the image, one question a line. At this prompt, with or without the slash:
  /help        this text
  /exit        end; so do /quit, /bye and Ctrl-D
  Ctrl-C       clear the line, or stop an answer"""
_ENDS, _HELP = ("exit", "quit", "bye"), "help"


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
    if sys.stdin.isatty():
        return _converse(args, chat, options)
    try:
        return min(terminal.SOME_FAILED, sum(not _answer(args, chat, line, options) for line in _piped()))
    except TextFileError as error:  # no text, from here on; the answers before it count
        complain(str(error))
        return terminal.SOME_FAILED


def _answer(args: argparse.Namespace, chat: Chat, question: str, options: dict[str, Any]) -> bool:
    """Print the answer, or why there is none: the next question may have one. False: there is none."""
    try:
        answer: Any = chat.send(question, stream=args.stream, **options)
    except ValueError as error:
        terminal.report_error(args, args.image, str(error))
        return False
    if args.stream:
        for piece in answer:
            put(unsteered(piece), end="")
        put("")
    elif args.json:
        record = {"image": args.image, "question": question, "answer": answer, "score": answer.score}
        terminal.print_json(record)
    else:
        terminal.print_line(terminal.one_line(answer))
    return True


def _piped() -> Iterator[str]:
    """The questions in a pipe or file: each line, but empty ones. Raises TextFileError."""
    lines = stream_lines(sys.stdin.buffer, "standard input")
    return (line.strip() for _, line in lines if line.strip())


def _converse(args: argparse.Namespace, chat: Chat, options: dict[str, Any]) -> int:
    """Answer what is typed at a prompt, until it is enough. Ctrl-C stops what is going on, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editor)
    print("Ask about the image; /help tells more, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            if (question := _typed()) is None:
                return terminal.DONE
            _answer(args, chat, question, options)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def _typed() -> str | None:
    """The next question typed at the prompt; None: none will come. What is a command is followed here."""
    while True:
        shown = sys.stdout.isatty()  # else the prompt would be among the answers
        if not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            print(file=sys.stderr)
            return None
        word = line.lower().removeprefix("/")
        if word in _ENDS:
            return None
        if word == _HELP:
            print(HELP, file=sys.stderr)
        elif line.startswith("/") and " " not in line:
            complain(f"there is no command {line}; /help lists them")
        elif line:
            return line
