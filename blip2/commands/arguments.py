"""Groups of arguments that several commands have."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from blip2.generation.options import GenerationOptions, TextKind, make_options

SOURCES = (
    "images, patterns in quotes ('photos/*.jpg'), folders (searched through), .txt lists of paths, .tar shards, "
    "tables (.csv, .tsv, .parquet, .json, .jsonl), or - for an image on standard input"
)
_MODEL = "a name from `blip2 models`, one on the Hugging Face Hub, or a folder"
_OUTPUT = {
    "--json": "one JSON object a line",
    "--stream": "print words as they come, one image, no beams",
    "--quiet": "no progress",
}
Group = argparse._ActionsContainer  # a parser or a group of its arguments


def option(
    group: Group, names: str, metavar: str | None, text: str, *, default: Any = None, **more: Any
) -> None:
    """Add an option with a value; its help shows the default. names: "-o --out"."""
    text += "" if default in (None, "") else f" (default: {default})"
    group.add_argument(*names.split(), metavar=metavar, default=default, help=text.lstrip(), **more)


def repeatable(group: Group, name: str, metavar: str, text: str, **more: Any) -> None:
    """Add an option that may be given several times."""
    text += "; may be repeated"
    group.add_argument(name, action="append", metavar=metavar, help=text, **{"default": [], **more})


def switch(group: Group, name: str, text: str) -> None:
    """Add an option without a value."""
    group.add_argument(name, action="store_true", help=text)


def add_images(parser: argparse.ArgumentParser, *, nargs: str | None = "+") -> None:
    """IMAGE, and the options that choose among the images."""
    parser.add_argument("images", nargs=nargs, metavar="IMAGE", help=SOURCES)
    group = parser.add_argument_group("which images")
    repeatable(group, "--include", "GLOB", "only these files of folders")
    repeatable(group, "--exclude", "GLOB", "not these")
    option(group, "--limit", "N", "the first N images only", type=int)
    option(group, "--shard", "I/N", "the I-th of N equal parts of the images, from 1", default="1/1")


def add_model(parser: argparse.ArgumentParser, *, from_environment: bool = False) -> None:
    """The model and its parts. from_environment: BLIP2_MODEL may name another default."""
    group = parser.add_argument_group("model")
    default = (from_environment and os.environ.get("BLIP2_MODEL")) or "default"
    about = f"{_MODEL} (default: {'$BLIP2_MODEL, else ' if from_environment else ''}the model that ships)"
    group.add_argument("--model", metavar="NAME", default=default, help=about)
    option(group, "--revision", "NAME", "branch, tag or commit on the Hub")
    option(group, "--device", "NAME", "auto, cpu, cuda or mps", default="auto")
    about = "what to compute in (default: fp32 up to a billion parameters, bf16 above)"
    option(group, "--dtype", None, about, choices=("fp32", "bf16", "fp16"))
    about = "hold the weights in 8 or 4 bits: less memory, faster on a CPU"
    option(group, "--quantize", None, about, choices=("int8", "int4"))
    about = (
        "refuse larger images; JPEGs are decoded at reduced scale (default: 89 million, served 50 million)"
    )
    option(group, "--max-pixels", "N", about, type=int)
    add_parts(parser)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """The parts that a checkpoint may lack."""
    group = parser.add_argument_group("parts that LAVIS's checkpoints leave out")
    option(group, "--vision", "PATH", "the image encoder: EVA-CLIP's .pth, or a folder")
    option(group, "--language", "PATH", "the language model: a folder of OPT or T5, or its name")


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """SRC and DST of a command that writes a checkpoint anew."""
    parser.add_argument("source", metavar="SRC", help="a folder, a tensor file, a name, or default")
    parser.add_argument("target", metavar="DST", help="a new folder")
    add_parts(parser)
    add_output(parser, "--json", "--quiet")


def add_output(parser: argparse.ArgumentParser, *names: str) -> None:
    """Those of --json, --stream, --batch-size and --quiet that a command has."""
    group = parser.add_argument_group("output")
    for name in names:
        if name == "--batch-size":
            option(group, name, "N", "images at a time", type=int, default=8)
        else:
            switch(group, name, _OUTPUT[name])


def add_decoding(parser: argparse.ArgumentParser, kind: TextKind, *, several: bool = True) -> None:
    """An option for each field of `GenerationOptions`; None where it was not given. several: texts for an image."""
    group = parser.add_argument_group("decoding")
    defaults = make_options(kind)
    short = {"num_beams": ["--beams"], "do_sample": ["--sample"]}
    if kind == "caption" and several:
        short["num_return_sequences"] = ["--num-captions"]
    for field in fields(GenerationOptions):
        name, text, default = field.name, field.metadata["help"], getattr(defaults, field.name)
        flags = " ".join([f"--{name.replace('_', '-')}", *short.get(name, ())])
        if name == "do_sample":
            group.add_argument(*flags.split(), action="store_true", default=None, help=text)
        elif name == "early_stopping":
            option(group, flags, None, f"{text} (default: false)", choices=("false", "true", "never"))
        elif name == "eos_token_id":
            repeatable(group, flags, "ID", text, type=int, default=None)
        elif name != "num_return_sequences" or several:
            more = "; 1 when sampling or streaming" if name == "num_beams" else ""
            text += "" if default is None else f" (default: {default}{more})"
            number = float if str(field.type).startswith("float") else int
            option(group, flags, "N", text, type=number)


def decoding_options(args: argparse.Namespace, kind: TextKind) -> GenerationOptions:
    """The decoding options that were given, and the rules' for the rest.

    Raises:
        ValueError: options out of bounds, or that contradict each other.
    """
    names = [field.name for field in fields(GenerationOptions)]
    chosen: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    chosen["early_stopping"] = {"false": False, "true": True}.get(args.early_stopping, args.early_stopping)
    return make_options(kind, stream=args.stream, **chosen)


def decoding_keywords(args: argparse.Namespace, options: GenerationOptions) -> dict[str, Any]:
    """Options, and the prompt, as keywords of `Predictor.caption`, `.ask` and `Chat.send`."""
    others = {name: getattr(args, name, None) for name in ("num_return_sequences", "prompt")}
    return {name: value for name, value in (vars(options) | others).items() if value is not None}
