"""What the commands share: the model they name, lines of output, progress, errors of images, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blip2
from blip2.commands.options import as_typed
from blip2.commands.streams import complain, put, visible, visible_json
from blip2.commands.streams import one_line as one_line
from blip2.storage import TextFileError, read_text_lines

if TYPE_CHECKING:
    from blip2.matching import Matcher
    from blip2.predict import Predictor

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2  # exit status


def print_line(line: str) -> None:
    """Print a line at once, of cells between tabs."""
    put("\t".join(map(visible, line.split("\t"))))


def print_json(record: dict[str, Any]) -> None:
    """Print an object on a line of its own."""
    put(visible_json(record))


def report_error(args: argparse.Namespace, name: str, message: str) -> None:
    """Print what is wrong with an image: with --json an object among the results, else an error line."""
    parts = message.split(name) if name else [message]
    message = name.join(as_typed(part, args.flags) for part in parts)  # the name stays as it is
    if args.json:
        print_json({"image": name, "error": message})
    else:
        complain(message if name in message else f"{name}: {message}")


def read_lines(option: str, name: str) -> list[str]:
    """The lines of an option's file, white space around them removed. Raises ValueError where there are none."""
    from blip2.text import TextError, check_text

    lines, where = list[str](), ""
    try:
        for number, line in read_text_lines(name):
            if line.strip():
                where = f"{name}, line {number}: "
                lines.append(check_text(line, "line").strip())
    except OSError as error:
        raise ValueError(f"{option} {name}: cannot be read ({error.strerror})") from error
    except (TextFileError, TextError) as error:
        raise ValueError(f"{option} {where * isinstance(error, TextError)}{error}") from error
    if not lines:
        raise ValueError(f"{option} {name}: the file holds none; write one a line")
    return lines


def check_words(text: str, what: str, advice: str) -> None:
    """Refuse a text, by position, that is blank, or that names a file and was meant as an image.

    Args:
        what: what it must be, as the usage writes it.
        advice: how several images are given.
    """
    from blip2.imagefiles.names import is_image_name
    from blip2.text import check_text

    check_text(text, what)
    kind = ""
    if os.path.lexists(text):
        kind = f"is the name of a {'folder' if os.path.isdir(text) else 'file'} here"
    elif len(text.split()) == 1 and text == text.rstrip() and ("://" in text or is_image_name(text)):
        kind = "looks like the name of an image"  # that is not there, or a URL
    if kind:
        meant = "if it is meant as text, put a space after it"
        raise ValueError(f'{what} "{text}" {kind}: {advice}; {meant}')


@contextlib.contextmanager
def progress_bars(
    *, hidden: bool, in_all: bool = False, **style: Any
) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each kind of work: what it is, how much more of it (`in_all`: in all) is done, of how much."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, disable=hidden, **style)
        bars[what].update(done - bars[what].n if in_all else done)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def load_named(args: argparse.Namespace) -> Predictor:
    """The model that --model names."""
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    names = ("device", "dtype", "revision", "vision", "language", "quantize", "matcher", "max_pixels")
    options: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    return blip2.load(args.model, **options)


def check_calibrated(args: argparse.Namespace) -> None:
    """Raises ValueError where nothing tells how likely captions of the model that --model names are right."""
    from blip2.calibration import FILE, Calibration
    from blip2.checkpoint import resolve_path

    path = resolve_path(named_checkpoint(args.model), args.revision, only=FILE)
    if Calibration.load(path if path.is_dir() else path.parent) is None:
        raise ValueError(
            f"--abstain: {args.model} has no {FILE}, by which it would be known how likely its captions are right; "
            "leave it out"
        )


def load_matcher(args: argparse.Namespace) -> Predictor:
    """The same for a command that only matches: of the default model, its matcher alone."""
    from blip2.registry import DEFAULT, DEFAULT_MATCHER_FOLDER

    if args.model == DEFAULT:
        args = argparse.Namespace(**vars(args) | {"model": DEFAULT_MATCHER_FOLDER})
    model = load_named(args)
    matcher_of(model, "give a matcher: --model itm or --model itm-coco")
    return model


def matcher_of(model: Predictor, advice: str) -> Matcher:
    """The model's matcher. Raises ValueError, with advice, where it has none."""
    from blip2.predict import NoMatcherError

    try:
        return model.matcher
    except NoMatcherError:
        raise ValueError(f"{model.name} writes text and has no matcher; {advice}") from None


def print_written(args: argparse.Namespace, result: Any, content: str, more: str = "") -> None:
    """Print the folder of a checkpoint that was written, and what is in it."""
    from blip2.registry import readable

    if args.json:
        print_json(asdict(result) | {"folder": str(result.folder)})
    else:
        sizes = f"{readable(result.read_bytes)} read, {readable(result.written_bytes)} written"
        print_line(f"{visible(str(result.folder))}: {content}, {sizes}{more}")


def named_checkpoint(name: str) -> str | Path:
    """The folder, file or name on the Hub that a checkpoint's name stands for.

    Raises:
        ValueError: `default`, and this installation holds no such model; or one of LAVIS's that is not on the Hub.
    """
    from blip2.registry import DEFAULT, DEFAULT_FOLDER, default_model, resolve_alias

    if name != DEFAULT:
        return resolve_alias(name)
    default_model()
    return DEFAULT_FOLDER
