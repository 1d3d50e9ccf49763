"""Store a model's weights in 8 or 4 bits, one layer at a time; the folder loads at once.

blip2 quantize opt-6.7b-coco ./opt-6.7b-coco-int8 --to int8
blip2 caption photo.jpg --model ./opt-6.7b-coco-int8
"""

from __future__ import annotations

import argparse

from blip2.commands.arguments import add_conversion, option
from blip2.commands.terminal import DONE, named_checkpoint, print_written, progress_bars


def configure(parser: argparse.ArgumentParser) -> None:
    add_conversion(parser)
    option(parser, "--to", None, "how many bits", choices=("int8", "int4"), default="int8")


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what was written."""
    from blip2.checkpoint import quantize_checkpoint

    with progress_bars(hidden=args.quiet, unit="B", unit_scale=True, mininterval=1) as progress:
        result = quantize_checkpoint(
            named_checkpoint(args.source),
            args.target,
            args.to,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    print_written(args, result, f"{result.layers} layers in {args.to}")
    return DONE
