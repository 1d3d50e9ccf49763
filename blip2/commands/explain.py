"""Show where in an image each word of a caption or an answer comes from, as a picture.

blip2 explain mermaid-and-cat.jpg -o out.png      # -> a mermaid and a cat
blip2 explain photo.jpg --text "a dog on a beach" -o out.png
blip2 explain photo.jpg --question "how many dogs are there?" -o out.png
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import blip2
from blip2.commands import arguments, terminal
from blip2.storage import output_file, replace_file


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="path of an image, or - for standard input")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--text", metavar="TEXT", help="a caption to explain (default: the model's own)")
    group.add_argument("--question", metavar="TEXT", help="explain the answer to this question")
    arguments.option(parser, "-o --out", "FILE", "the picture to write: .png, .jpg or .webp", required=True)
    arguments.add_model(parser, from_environment=True)
    arguments.add_output(parser, "--json", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Write the picture, and print the text."""
    target = Path(args.out)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"-o {args.out}: the name must end with .png, .jpg or .webp")
    if not target.parent.is_dir():
        raise ValueError(f"-o {args.out}: there is no folder {target.parent}")
    output_file(target)  # an error now where it can be no file
    if args.image != "-" and target.exists() and os.path.exists(args.image) and target.samefile(args.image):
        raise ValueError(f"-o {args.out}: this is the image itself; name another file")
    image = sys.stdin.buffer.read() if args.image == "-" else args.image
    model = terminal.load_named(args)
    try:
        explanation = model.explain(image, text=args.text, question=args.question)
    except blip2.ImageError as error:
        terminal.report_error(args, args.image, str(error))
        return terminal.SOME_FAILED
    with replace_file(target) as beside:
        explanation.image().save(
            beside, "JPEG" if "jp" in target.suffix.lower() else target.suffix[1:].upper()
        )
    if args.json:
        words = [vars(word) | {"heat": word.heat.tolist()} for word in explanation.words]
        record = {"image": args.image, "text": explanation.text, "words": words, "output": str(target)}
        terminal.print_json(record)
    else:
        terminal.print_line(terminal.one_line(explanation.text))
    return terminal.DONE
