"""What all commands share: the model they name, lines of output, errors, exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import blip2

if TYPE_CHECKING:
    from blip2.predict import Predictor

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2  # exit status


def complain(message: str) -> None:
    """One error line."""
    print(f"blip2: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Text for a line of a terminal: neither line breaks nor anything that steers it."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def print_line(line: str) -> None:
    print(line, flush=True)


def print_json(record: dict[str, Any]) -> None:
    text = json.dumps(record, ensure_ascii=False)
    # A file name that is no UTF-8 arrives with surrogates: written as escapes, the line stays JSON and the name exact.
    print_line("".join(f"\\u{ord(char):04x}" if "\ud800" <= char <= "\udfff" else char for char in text))


def report_error(args: argparse.Namespace, name: str, message: str) -> None:
    if args.json:
        print_json({"image": name, "error": one_line(message)})
    else:
        complain(message if name in message else f"{name}: {message}")


def load_named(args: argparse.Namespace) -> Predictor:
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return blip2.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        vision=args.vision,
        language=args.language,
        quantize=args.quantize,
        matcher=getattr(args, "matcher", None),
    )


def load_matcher(args: argparse.Namespace) -> Predictor:
    from blip2.registry import DEFAULT, DEFAULT_MATCHER_FOLDER

    if args.model == DEFAULT:  # the matcher alone: its generator is not needed here
        return blip2.load(
            DEFAULT_MATCHER_FOLDER,
            device=args.device,
            dtype=args.dtype,
            revision=args.revision,
            quantize=args.quantize,
        )
    return load_named(args)
