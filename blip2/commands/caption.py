"""Describe images in words.

blip2 caption two-rabbits.jpg             # -> two rabbits
blip2 caption photos/ --json > captions.jsonl
blip2 caption 'photos/*.png' --beams 3 --max-new-tokens 20
blip2 caption photo.jpg --num-captions 3 --match
blip2 caption photo.jpg --temperature 0.8 --top-p 0.9 --seed 1
curl -s https://example.org/photo.jpg | blip2 caption -
blip2 caption photo.jpg --model opt-6.7b-coco --dtype bf16
blip2 caption photos/ --out captions.jsonl
blip2 caption shards/*.tar rows.parquet --out captions.parquet --match
"""

from __future__ import annotations

import argparse

from blip2.commands.arguments import add_decoding, add_images, add_model, add_output, option
from blip2.commands.captioning import add_texts, write_texts
from blip2.commands.terminal import check_calibrated, read_lines


def configure(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser, from_environment=True)
    add_decoding(parser, "caption")
    option(parser, "--prompt", "TEXT", 'what the caption continues, "" for nothing (default: "a photo of")')
    option(parser, "--questions", "FILE", "answer these about each image instead, a question a line")
    about = "write no caption that is less likely to be right than P, 0 to 1, but say so (calibrated models)"
    option(parser, "--abstain", "P", about, type=float)
    add_output(parser, "--json", "--stream", "--batch-size", "--quiet")
    add_texts(parser)


def run(args: argparse.Namespace) -> int:
    """Caption all images, or answer a file's questions about each."""
    if args.questions is not None and args.prompt is not None:
        raise ValueError("--questions goes without --prompt")
    if args.abstain is not None:
        _check_abstain(args)
    questions = [] if args.questions is None else read_lines("--questions", args.questions)
    return write_texts(args, "caption", questions)


def _check_abstain(args: argparse.Namespace) -> None:
    """Raises ValueError where --abstain cannot be followed, before the model is loaded."""
    if not 0 <= args.abstain <= 1:
        raise ValueError(f"--abstain must be a number from 0 to 1; got {args.abstain}")
    if args.questions is not None:
        raise ValueError("--abstain is about captions: leave it out with --questions")
    check_calibrated(args)
