"""Answer a question about images.

blip2 ask two-rabbits.jpg "how many rabbits are there?"      # -> 2
blip2 ask mermaid-and-cat.jpg "what is to the right of the mermaid?"      # -> cat
blip2 ask photos/ "is it day or night?" --json
blip2 ask photo.jpg "what is the man doing?" --model opt-2.7b --max-new-tokens 20
blip2 ask photos/ "is there a person?" --out answers.csv
"""

from __future__ import annotations

import argparse

from blip2.commands.arguments import add_decoding, add_images, add_model, add_output
from blip2.commands.captioning import add_texts, write_texts
from blip2.commands.terminal import check_words


def configure(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    add_model(parser, from_environment=True)
    add_decoding(parser, "answer")
    add_output(parser, "--json", "--stream", "--batch-size", "--quiet")
    add_texts(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the question about each image."""
    check_words(args.question, "QUESTION", "it comes last, in quotes, after the images")
    return write_texts(args, "answer", [args.question])
