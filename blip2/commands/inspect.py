"""Tell what a checkpoint is and what looks wrong with it; no value is read.

blip2 inspect ./my-model
blip2 inspect ./blip2-opt-6.7b-coco-paddle/model_state.pdparams --json
blip2 inspect blip2_pretrained_opt2.7b.pth --vision eva_vit_g.pth --language ./opt-2.7b
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from blip2.commands.arguments import add_output, add_parts
from blip2.commands.options import as_typed
from blip2.commands.streams import visible
from blip2.commands.terminal import DONE, SOME_FAILED, named_checkpoint, print_json, print_line


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder, a tensor file, a name, or default")
    add_parts(parser)
    add_output(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print what the checkpoint is; problems make the exit status 1."""
    from blip2.checkpoint import inspect
    from blip2.registry import describe_stem, readable

    checkpoint = inspect(named_checkpoint(args.path), vision=args.vision, language=args.language)
    problems = tuple(as_typed(problem, args.flags) for problem in checkpoint.problems)
    checkpoint = replace(checkpoint, problems=problems)
    status = SOME_FAILED if checkpoint.problems else DONE
    if args.json:
        print_json(checkpoint.as_json())
        return status
    print_line(f"{visible(checkpoint.path)}: {checkpoint.layout} ({checkpoint.file_format})")
    print_line(f"  {checkpoint.variant}")
    for name, part in checkpoint.parts.items():
        dtypes = ", ".join(sorted(part.dtypes))
        print_line(f"  {name}: {part.parameters:,} parameters in {part.tensors} tensors, {dtypes}")
    stored = f"{readable(checkpoint.stored_bytes)} stored in {checkpoint.tensors} tensors"
    print_line(f"  in all {checkpoint.parameters:,} parameters, {stored}")
    if checkpoint.stem is not None:
        print_line(f"  images, {checkpoint.image_px} px, go through {describe_stem(checkpoint.stem)} first")
    if checkpoint.head != "none":
        print_line(f"  head: {checkpoint.head}")
    for kind, lines in (("WRONG", checkpoint.problems), ("note", checkpoint.notes)):
        for line in lines:
            print_line(f"  {kind}: {line}")
    return status
