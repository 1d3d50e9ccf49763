"""Measure a model on this machine; the last line is one JSON object.

blip2 bench
blip2 bench ./opt-6.7b-coco --quantize int8 int4 --against transformers
blip2 bench ./opt-6.7b-coco ./opt-6.7b-coco-int8 --against transformers --record figures.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip2.commands.arguments import option
from blip2.commands.streams import visible
from blip2.commands.terminal import DONE, named_checkpoint, print_line


def configure(parser: argparse.ArgumentParser) -> None:
    about = "a name or a folder (default: default); beside it the same model stored in other precisions"
    parser.add_argument("model", nargs="*", metavar="MODEL", help=about)
    option(parser, "--device", "NAME", "auto, cpu or cuda", default="auto")
    option(parser, "--dtype", None, "as for caption", choices=("fp32", "bf16", "fp16"))
    about = "measure with quantized weights too"
    parser.add_argument("--quantize", nargs="+", choices=("int8", "int4"), default=[], help=about)
    option(parser, "--against", None, "measure this beside it, on the same files", choices=("transformers",))
    option(parser, "--rounds", "N", "figures are medians of so many", type=int, default=3)
    about = "write each side's figures here as they come; what is in it already is not measured again"
    option(parser, "--record", "FILE", about, type=Path)
    about = "images at a time (default: 1 4 16)"
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], metavar="N", help=about)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures."""
    from blip2.bench import Contender, run_benchmark
    from blip2.checkpoint import count_parameters, resolve_path, stored_as
    from blip2.loading import device_of
    from blip2.registry import DEFAULT, default_dtype

    if min(args.rounds, *args.batches) < 1:
        raise ValueError("--rounds and --batches are at least 1")
    folder, *others = (resolve_path(named_checkpoint(name)) for name in args.model or [DEFAULT])
    dtype = args.dtype or default_dtype(count_parameters(folder))
    device = str(device_of(args.device))
    if args.quantize and stored_as(folder):
        raise ValueError("the model is quantized already: give the original, and this one beside it")
    sides = [Contender("blip2", str(path), dtype, stored_as(path), device) for path in (folder, *others)]
    sides += [Contender("blip2", str(folder), dtype, mode, device) for mode in args.quantize]
    if len({side.name for side in sides}) < len(sides):
        raise ValueError("two of the models are stored alike; give one in each precision")
    if args.against:
        sides.append(Contender(args.against, str(folder), dtype, None, device))
    figures = run_benchmark(
        tuple(sides),
        rounds=args.rounds,
        batches=tuple(args.batches),
        record=args.record,
        report=lambda line: print(visible(line), file=sys.stderr, flush=True),
    )
    for line in figures.lines():
        print_line(line)
    print_line(figures.as_json())
    return DONE
