"""Convert a checkpoint between the layouts of transformers, PaddleNLP and LAVIS, one tensor at a time.

blip2 convert ./blip2-opt-6.7b-coco-paddle ./hf --to hf --dtype bf16 --verify
blip2 convert opt-2.7b ./paddle --to paddle
blip2 convert ./hf ./small --to hf --dtype smallest-exact
"""

from __future__ import annotations

import argparse
import re

from blip2.commands.arguments import add_conversion, option, switch
from blip2.commands.terminal import DONE, named_checkpoint, print_line, print_written, progress_bars


def configure(parser: argparse.ArgumentParser) -> None:
    add_conversion(parser)
    about, layouts = "whose layout: transformers', Paddle's, LAVIS's", ("hf", "paddle", "lavis")
    option(parser, "--to", None, about, choices=layouts, required=True)
    about = "what to store; smallest-exact: 16 bits where not one value changes (default: as it is)"
    option(parser, "--dtype", None, about, choices=("fp32", "bf16", "fp16", "smallest-exact"))
    about = "start another file beyond this, such as 2GB (default: 5GB for hf)"
    option(parser, "--shard-size", "SIZE", about)
    switch(parser, "--verify", "read all back and compare every value, and outputs for an image")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written."""
    from blip2.checkpoint import convert

    if args.to == "lavis" and args.shard_size is not None:
        raise ValueError("LAVIS reads one file: leave out --shard-size")
    with progress_bars(hidden=args.quiet, unit="B", unit_scale=True, mininterval=1) as progress:
        result = convert(
            named_checkpoint(args.source),
            args.target,
            to=args.to,
            dtype=args.dtype,
            shard_bytes=None if args.shard_size is None else _bytes(args.shard_size),
            verify=args.verify,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    exact = args.dtype == "smallest-exact"
    more = f"; {result.narrowed} tensors now in 16 bits, none changed" if exact else ""
    print_written(args, result, f"{result.tensors} tensors", more)
    if result.verified and not args.json:
        print_line(f"  verified: {result.verified}")
    return DONE


def _bytes(text: str) -> int:
    """'2GB' -> 2,000,000,000."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    if size is None or size[2] not in units or not float(size[1]):
        raise ValueError(f"--shard-size {text!r}: expected a number above 0 and KB, MB or GB, such as 2GB")
    return int(float(size[1]) * units[size[2]])
