"""The whole command line, put together from the commands' files; nothing heavy is imported for it."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from importlib import import_module
from inspect import cleandoc
from textwrap import dedent, indent
from typing import Any, NoReturn

import blip2
from blip2.commands.streams import put, visible

# Each has a file in this folder: what it does and examples (the docstring), its arguments (`configure`), and `run`,
# from the arguments to an exit status.
COMMANDS = (
    "caption", "ask", "chat", "match", "embed", "eval", "explain", "serve", "inspect", "convert", "quantize",
    "bench", "models", "doctor", "completion",
)  # fmt: skip
EXAMPLES = """\
  blip2 caption two-rabbits.jpg             # -> two rabbits
  blip2 ask rose.jpg "what color is it?"    # -> red
  blip2 chat photo.jpg
"""
EPILOG = """\
Results go to standard output, progress and errors to standard error.
Exit status: 0 all went well, 1 some images failed, 2 wrong usage, no model, or no room for the output.
BLIP2_DEBUG=1 shows where an error comes from. BLIP2_MODEL=NAME is another default of --model
for caption, ask, chat, explain and serve.
After # -> is what the model that ships answers; those images are in the folder examples of the source.
"""


# Arguments that mean something where they are empty; texts, and the words of a command, which are checked themselves.
MAY_BE_EMPTY = ("command", "prompt", "prefix", "suffix", "words", "question", "text", "texts")


class CommandParser(argparse.ArgumentParser):
    """A parser that suggests the word that was probably meant."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)  # a script must not break when an option is added

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and a message of one line."""
        word, words = "", list[str]()
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            word, words = choice[1], re.findall(r"[\w.-]+", choice[2])
        elif option := re.search(r"unrecognized arguments:(?: .*?)? (--?\w[\w-]*)", message):
            word, words = option[1], [text for action in self._actions for text in action.option_strings]
        close = difflib.get_close_matches(word, words, n=1)
        super().error(visible(message + (f"; did you mean {close[0]}?" if close else "")))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if not arg_string and action.dest not in MAY_BE_EMPTY:  # "$out" of a script that never set it
            raise argparse.ArgumentError(action, "it is empty")
        return super()._get_value(action, arg_string)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program, with an error where the help that was printed cannot be written."""
        put("", end="")
        super().exit(status, message)


def build_parser() -> CommandParser:
    """The parser of `blip2`; docs/make_cli.py writes its page from this."""
    parser = CommandParser(
        prog="blip2",
        description="From a picture to words: captions, answers, conversation and matching.",
        epilog=f"examples:\n{EXAMPLES}\n{EPILOG}",
    )
    parser.add_argument("--version", action="version", version=f"blip2 {blip2.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    flags: dict[str, str] = {}  # how each option is typed: {"num_beams": "--num-beams", ...}
    for name in COMMANDS:
        module = import_module(f"blip2.commands.{name}")
        about, _, examples = cleandoc(module.__doc__ or name).partition("\n\n")
        command = commands.add_parser(
            name,
            help=about[0].lower() + about[1:].rstrip("."),
            description=about,
            epilog=f"examples:\n{indent(dedent(examples), '  ')}\n\n{EPILOG}",
        )
        module.configure(command)
        options = (action for action in command._actions if action.option_strings)
        own = {action.dest: max(action.option_strings, key=len) for action in options}
        flags |= own
        # What other commands have as options may be names of serve's limits, which are typed as they are.
        command.set_defaults(run=module.run, flags=own if name == "serve" else flags)
    return parser


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; help is printed and the program ended where there are none, or wrong ones."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = parser if args.command is None else subcommands(parser)[args.command]
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        parser.print_help()
        parser.exit()
    return args
