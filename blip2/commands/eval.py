"""Score a model on a benchmark, or on captions, questions and photographs of your own.

blip2 eval easyvqa
blip2 eval scenes --data data
blip2 eval coco --data coco --model opt-6.7b-coco --protocol paper --out results
blip2 eval captions --data captions.json --images photos
blip2 eval photos --data photos
blip2 eval vqav2 --data vqa --model opt-2.7b --answers answers.txt --abstain 0.3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip2.commands import terminal
from blip2.commands.arguments import add_model, add_output, option
from blip2.commands.streams import visible
from blip2.evaluate.names import TASK_NAMES


def configure(parser: argparse.ArgumentParser) -> None:
    about = "one of %(choices)s; the task default is easyvqa and scenes"
    parser.add_argument("task", choices=TASK_NAMES, metavar="TASK", help=about)
    about = "the folder of the data, for captions and questions a file; see docs/evaluating.md"
    option(parser, "--data", "DIR", about, type=Path)
    option(parser, "--images", "DIR", "the images, where they are not in the usual place", type=Path)
    about = "with questions in VQA's form: the file of their answers"
    option(parser, "--annotations", "FILE", about, type=Path)
    option(parser, "--matcher", "NAME", "the model that matches, beside one that writes")
    about = "paper: the settings of the published tables, and their figures beside ours"
    option(parser, "--protocol", None, about, choices=("default", "paper"), default="default")
    about = "choose each answer among these, one a line, instead of writing it"
    option(parser, "--answers", "FILE", about)
    about = "with --answers: give no answer that is less probable than this"
    option(parser, "--abstain", "P", about, type=float, default=0.0)
    option(parser, "--limit", "N", "the first N items only", type=int)
    about = "write results.json, predictions.json and a page to look through, index.html"
    option(parser, "-o --out", "DIR", about)
    add_model(parser)
    add_output(parser, "--json", "--batch-size", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the figures and write the reports."""
    from blip2.evaluate.report import lines, report_summary, write
    from blip2.evaluate.run import EvalSettings, evaluate

    if args.abstain and not args.answers:
        raise ValueError("--abstain is about answers that are ranked: give them with --answers FILE")
    answers = terminal.read_lines("--answers", args.answers) if args.answers else []
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out}: this is a file; name a folder")
    only_matches = args.task.startswith("retrieval-") and args.matcher is None
    load = terminal.load_matcher if only_matches else terminal.load_named
    hidden = args.quiet or not sys.stderr.isatty()
    with terminal.progress_bars(hidden=hidden, in_all=True, leave=False) as progress:
        settings = EvalSettings(
            protocol=args.protocol,
            limit=args.limit,
            batch_size=args.batch_size,
            answers=tuple(answers),
            abstain=args.abstain,
            images=args.images,
            annotations=args.annotations,
            progress=progress,
        )
        reports = evaluate(lambda: load(args), args.task, args.data, settings, model_name=args.model)
    for report in reports:
        for line in [] if args.json else lines(report):
            terminal.print_line(line)
        if args.out:
            folder = Path(args.out) / report.task if len(reports) > 1 else Path(args.out)
            for path in write(report, folder):
                print(visible(str(path)), file=sys.stderr)
        if args.json:
            terminal.print_json(report_summary(report))
    return (
        terminal.SOME_FAILED
        if any(report.damaged or report.left_out for report in reports)
        else terminal.DONE
    )
