"""Score a model on a benchmark, or on captions and questions of your own.

blip2 eval easyvqa
blip2 eval scenes --data data
blip2 eval coco --data coco --model opt-6.7b-coco --protocol paper --out results
blip2 eval captions --data captions.json --images photos
blip2 eval vqav2 --data vqa --model opt-2.7b --answers answers.txt --abstain 0.3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip2.commands import arguments, terminal
from blip2.evaluate.tasks import TASK_NAMES


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "task",
        choices=TASK_NAMES,
        metavar="TASK",
        help="one of %(choices)s; default: easyvqa and scenes",
    )
    about = "the folder of the data, for captions and questions a file; see docs/evaluating.md"
    arguments.option(parser, "--data", "DIR", about)
    arguments.option(parser, "--images", "DIR", "the images, where they are not in the usual place")
    arguments.option(
        parser, "--annotations", "FILE", "with questions in VQA's form: the file of their answers"
    )
    arguments.option(parser, "--matcher", "NAME", "the model that matches, beside one that writes")
    about = "paper: the settings of the published tables, and their figures beside ours"
    arguments.option(parser, "--protocol", None, about, choices=("default", "paper"), default="default")
    arguments.option(
        parser, "--answers", "FILE", "choose each answer among these, one a line, instead of writing it"
    )
    about = "with --answers: give no answer that is less probable than this"
    arguments.option(parser, "--abstain", "P", about, type=float, default=0.0)
    arguments.option(parser, "--limit", "N", "the first N items only", type=int)
    about = "write results.json, predictions.json and a page to look through, index.html"
    arguments.option(parser, "-o --out", "DIR", about)
    arguments.add_model(parser)
    arguments.add_output(parser, "--json", "--batch-size", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the figures and write the reports."""
    from blip2.evaluate.report import lines, report_summary, write
    from blip2.evaluate.run import EvalSettings, evaluate

    if args.abstain and not args.answers:
        raise ValueError("--abstain is about answers that are ranked: give them with --answers FILE")
    answers = terminal.read_lines("--answers", args.answers) if args.answers else []
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: this is a file; name a folder")
    data, images, annotations = (
        None if path is None else Path(path) for path in (args.data, args.images, args.annotations)
    )
    load = (
        terminal.load_matcher
        if args.task.startswith("retrieval-") and args.matcher is None
        else terminal.load_named
    )
    hidden = args.quiet or not sys.stderr.isatty()
    with terminal.progress_bars(hidden=hidden, in_all=True, leave=False) as progress:
        settings = EvalSettings(
            protocol=args.protocol,
            limit=args.limit,
            batch_size=args.batch_size,
            answers=tuple(answers),
            abstain=args.abstain,
            images=images,
            annotations=annotations,
            progress=progress,
        )
        reports = evaluate(lambda: load(args), args.task, data, settings, model_name=args.model)
    for report in reports:
        for line in [] if args.json else lines(report):
            terminal.print_line(line)
        if args.out:
            folder = Path(args.out) / report.task if len(reports) > 1 else Path(args.out)
            for path in write(report, folder):
                print(path, file=sys.stderr)
        if args.json:
            terminal.print_json(report_summary(report))
    return terminal.DONE
