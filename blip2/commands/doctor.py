"""Tell what this machine has, what models need of it, and what would go wrong.

blip2 doctor
blip2 doctor opt-6.7b-coco
blip2 doctor ./my-model --json
"""

from __future__ import annotations

import argparse

from blip2.commands.arguments import add_output
from blip2.commands.terminal import DONE, SOME_FAILED, print_json, print_line


def configure(parser: argparse.ArgumentParser) -> None:
    about = "a name or a folder; without one all known models"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=about)
    add_output(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the report; exit status 1 where the model that was named cannot run."""
    from blip2.doctor import examine_machine, examine_models, report_lines, report_records

    machine = examine_machine()
    checkups = examine_models(machine, args.model)
    for record in report_records(machine, checkups) if args.json else ():
        print_json(record)
    for line in () if args.json else report_lines(machine, checkups):
        print_line(line)
    return SOME_FAILED if args.model is not None and checkups[0].problems else DONE
