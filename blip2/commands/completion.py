"""Print a script that completes commands, options and their values in a shell.

blip2 completion bash > ~/.local/share/bash-completion/completions/blip2
blip2 completion zsh > "${fpath[1]}/_blip2"
blip2 completion fish > ~/.config/fish/completions/blip2.fish
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from blip2.commands.terminal import DONE, print_line

# Where the word before the cursor, and the command, are found; what is done with the words that may come.
SHELLS = {
    "bash": """\
_blip2() {{
    local place=$COMP_CWORD command=${{COMP_WORDS[1]}} choices=
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
{cases}
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
}}
complete -o bashdefault -o default -F _blip2 blip2""",
    "zsh": """\
#compdef blip2
_blip2() {{
    local place=$((CURRENT - 1)) command=${{words[2]}} choices=
    local current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}}
{cases}
    if [[ -n $choices ]]; then compadd -- ${{=choices}}; else _files; fi
}}
if [[ ${{funcstack[1]}} == _blip2 ]]; then _blip2 "$@"; else compdef _blip2 blip2; fi""",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=(*SHELLS, "fish"), metavar="SHELL", help="one of %(choices)s; a new one uses it"
    )


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from blip2.commands.parser import build_parser, subcommands

    parser = build_parser()
    commands = subcommands(parser)
    if args.shell == "fish":
        print_line("\n".join(_fish(parser, commands)))
    else:
        print_line(SHELLS[args.shell].format(cases="\n".join(_cases(parser, commands))))
    return DONE


def _cases(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    """What may come at a place, as bash and zsh both read it; where nothing is named file names may."""
    yield f"    if [ $place -eq 1 ]; then choices='{' '.join([*commands, *_flags(parser)])}'; else"
    yield '    case "$command $previous" in'
    for name, command in commands.items():
        for action in command._actions:
            if action.option_strings and action.nargs != 0:
                pattern = "|".join(f"'{name} {flag}'" for flag in action.option_strings)
                yield f"    {pattern}) choices='{' '.join(map(str, action.choices or ()))}' ;;"
    yield '    *) case "$command $current" in'
    for name, command in commands.items():
        yield f"        '{name} -'*) choices='{' '.join(_flags(command))}' ;;"
        for action in command._actions:
            if not action.option_strings and action.choices:
                yield f"        '{name} '*) choices='{' '.join(map(str, action.choices))}' ;;"
    yield "    esac ;; esac; fi"


def _fish(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    """The lines of fish's script."""
    for name, command in {"": parser, **commands}.items():
        condition = f"'__fish_seen_subcommand_from {name}'" if name else "__fish_use_subcommand"
        if name:
            about = _quoted(command.description or "")
            yield f"complete -c blip2 -f -n __fish_use_subcommand -a {name} -d {about}"
        for action in command._actions:
            choices = "" if action.choices is None else f" -a {_quoted(' '.join(map(str, action.choices)))}"
            if action.option_strings:
                flags = " ".join(
                    f"-l {flag[2:]}" if flag[:2] == "--" else f"-s {flag[1:]}"
                    for flag in action.option_strings
                )
                value = "" if action.nargs == 0 else " -x" if choices else " -r"
                about = f" -d {_quoted(action.help or '')}"
                yield f"complete -c blip2 -n {condition} {flags}{value}{choices}{about}"
            elif choices and name:
                yield f"complete -c blip2 -f -n {condition}{choices}"


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
