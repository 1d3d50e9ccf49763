"""Turn images and texts into vectors for search, one JSON object a line.

blip2 embed photos/ > photos.jsonl
blip2 embed --text "a red car" --text "a blue car"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from blip2.commands.arguments import add_images, add_model, add_output, repeatable
from blip2.commands.images import inputs_of, print_rows
from blip2.commands.terminal import load_matcher, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    add_images(parser, nargs="*")
    repeatable(parser, "--text", "TEXT", "a text")
    add_model(parser)
    add_output(parser, "--batch-size", "--quiet")
    parser.set_defaults(json=True)


def run(args: argparse.Namespace) -> int:
    """Print the vectors of the texts, then those of the images."""
    if not args.images and not args.text:
        raise ValueError("nothing to embed: give images, or --text")
    from blip2.text import check_text

    for text in args.text:
        check_text(text, "text")
    inputs, model = inputs_of(args), load_matcher(args)
    if args.text:
        for text, vector in zip(args.text, model.embed_text(args.text).tolist(), strict=True):
            print_json({"text": text, "embedding": vector})

    def describe(images: Sequence[Any]) -> list[list[dict[str, Any]]]:
        return [[{"embedding": vectors}] for vectors in model.embed(list(images)).tolist()]

    return print_rows(args, inputs, describe, (), image_processors=[model.matcher.image_processor])
