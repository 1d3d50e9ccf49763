"""Write docs/cli.md from the command line's own help; with --check say whether it is up to date (exit status 1: no)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
sys.path.insert(0, str(PAGE.parent.parent))  # a checkout that is not installed documents itself too

from blip2.commands.parser import EPILOG, build_parser, subcommands  # noqa: E402

STREAMS = """\
## What is printed
Standard output is UTF-8 where it is no terminal, whatever the locale is. In plain lines and messages a
character of a file name that would steer a terminal or break the line is shown as bash's `$'...'` has it:
`a\\nb.jpg`, `\\x1b`, `\\u202e`, and `\\xe9` for a byte that is no UTF-8; in captions and answers it is a space.
`--json` holds every name and text exactly. Standard output that cannot be written, for its disk is full, ends
the command with status 2; one that is closed, or whose reader has seen enough (`| head`), is no error. Warnings
of Pillow are lines on standard error that name the image.

A TEXT or QUESTION that is the name of a file or folder is refused, since it was meant as an image: put a space
after it if it is meant as text. URLs are not fetched, and empty texts are refused.

At the prompt of `blip2 chat` `exit`, `quit` and `bye`, with or without a slash, and Ctrl-D end with status 0,
`/help` tells so, any other single word with a slash is explained and not sent. Ctrl-C clears the line, or stops
an answer, which then does not count. In a pipe every line is a question but empty ones; one that cannot be
answered is an error and the next one follows; where a line is no text ([which files are
text](bulk.md#what-goes-in)) the command ends with status 1, and what was answered stands.
"""
INTRODUCTION = """\
# The command line

<!-- Written by docs/make_cli.py from the help texts in blip2/commands/: change those, then `make docs`. -->
"""


def page() -> str:
    """The whole page as Markdown."""
    parser = build_parser()
    parts = [INTRODUCTION, f"{parser.description}\n", EPILOG.replace("\n", "  \n").rstrip() + "\n"]
    parts.append(STREAMS)
    parts += [_section(name, command) for name, command in subcommands(parser).items()]
    return "\n".join(parts)


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    examples = (parser.epilog or "").removesuffix(EPILOG).removeprefix("examples:\n").strip("\n")
    lines = [f"## blip2 {name}", "", parser.description or "", "", "```sh"]
    lines += [line.strip() for line in examples.splitlines()]
    lines += ["```", "", "| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        about = (action.help or "").replace("%(choices)s", ", ".join(map(str, action.choices or ())))
        lines.append(f"| {_signature(action)} | {about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _signature(action: argparse.Action) -> str:
    """`--beams N`, `IMAGE...`, `[MODEL]`: as it is typed."""
    if action.option_strings:
        value = (
            "" if action.nargs == 0 else " " + str(action.metavar or "|".join(map(str, action.choices or ())))
        )
        return f"`{', '.join(action.option_strings)}{value}`".replace("|", "\\|")
    name = {"+": f"{action.metavar}...", "*": f"[{action.metavar}...]", "?": f"[{action.metavar}]"}
    return f"`{name.get(str(action.nargs), str(action.metavar))}`"


def main() -> int:
    """Write or check the page."""
    written = page()
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if current != written:
            print("docs/cli.md is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
