"""Tell how well texts fit an image, each as a probability.

blip2 match rose.jpg "a rose" "a cat"     # -> 0.98 a rose; 0.00 a cat
blip2 match photos/ "a red car" --json
blip2 match photo.jpg "a dog on a beach" --model itm
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from blip2.commands.arguments import add_images, add_model, add_output
from blip2.commands.images import inputs_of, print_rows
from blip2.commands.terminal import check_words, load_matcher


def configure(parser: argparse.ArgumentParser) -> None:
    add_images(parser, nargs=None)
    about = "texts to compare with the image, each in quotes"
    parser.add_argument("texts", nargs="+", metavar="TEXT", help=about)
    add_model(parser)
    add_output(parser, "--json", "--batch-size", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Print how well each text fits each image."""
    for text in args.texts:
        check_words(
            text, "TEXT", "give several images as a folder, a pattern in quotes ('*.jpg') or a .txt list"
        )
    inputs, model = inputs_of(args), load_matcher(args)

    def describe(images: Sequence[Any]) -> list[list[dict[str, Any]]]:
        matches: Any = model.match(list(images), args.texts)
        return [
            [{"text": text, **vars(fit)} for text, fit in zip(args.texts, fits, strict=True)]
            for fits in matches
        ]

    processors = [model.matcher.image_processor]
    return print_rows(args, inputs, describe, ("probability", "text"), image_processors=processors)
