"""Print a script that completes commands, options and their values in a shell.

blip2 completion bash > ~/.local/share/bash-completion/completions/blip2
blip2 completion zsh > "${fpath[1]}/_blip2"
blip2 completion fish > ~/.config/fish/completions/blip2.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from blip2.commands.streams import put
from blip2.commands.terminal import DONE, SOME_FAILED

# Each runs the command with --words for what may come; where nothing does, file names may.
SHELLS = {
    "bash": """\
_blip2() {
    local choices=$("$1" completion bash --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "$2"))
}
complete -o bashdefault -o default -F _blip2 blip2""",
    "zsh": """\
#compdef blip2
_blip2() {
    local choices=(${(f)"$(${words[1]} completion zsh --words "${(@)words[2,CURRENT]}" 2> /dev/null)"})
    if (($#choices)); then compadd -a choices; else _files; fi
}
if [[ ${funcstack[1]} == _blip2 ]]; then _blip2 "$@"; else compdef _blip2 blip2; fi""",
    "fish": """\
function __blip2_words
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completion fish --words $words[2..] 2> /dev/null
    or __fish_complete_path (commandline -ct)
end
complete -c blip2 -f -a '(__blip2_words)'""",
}


def configure(parser: argparse.ArgumentParser) -> None:
    about = "one of %(choices)s; a new one uses it"
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help=about)
    about = "print what the last of these words may be instead; exit status 1: any, such as a file's name"
    parser.add_argument("--words", nargs=argparse.REMAINDER, metavar="WORD...", help=about)


def run(args: argparse.Namespace) -> int:
    """Print the script, or the words that may come."""
    if args.words is None:
        put(SHELLS[args.shell])
        return DONE
    choices = _choices(args.words)
    for word, about in choices.items():
        put(f"{word}\t{about}" if args.shell == "fish" else word)
    return DONE if choices else SOME_FAILED


def _choices(words: Sequence[str]) -> dict[str, str]:
    """What may be the last of the words, and what it means; nothing where any word may."""
    from blip2.commands.parser import build_parser, subcommands

    parser = build_parser()
    commands = subcommands(parser)
    if "=" in words[1:]:  # bash makes three words of --format=csv
        words = [*words, ""] if words[-1] == "=" else words
        words = [word for word in words if word != "="]
    *before, current = words or [""]
    if not before:
        return {name: command.description or "" for name, command in commands.items()} | _flags(parser)
    if before[0] not in commands:
        return {}
    actions = commands[before[0]]._actions
    option, equals, _ = current.partition("=")  # --format=csv
    flag, start = (option, f"{option}=") if equals else (before[-1], "")
    for action in actions:
        if flag in action.option_strings and action.nargs != 0:
            return {f"{start}{choice}": "" for choice in action.choices or ()}
    if current.startswith("-"):
        return _flags(commands[before[0]])
    choices = (action.choices for action in actions if not action.option_strings)
    return {str(choice): "" for some in choices for choice in some or ()}


def _flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    return {flag: action.help or "" for action in parser._actions for flag in action.option_strings}
