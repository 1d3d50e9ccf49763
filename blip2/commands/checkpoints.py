"""Commands about checkpoints and this machine: inspect, convert, quantize, bench, models, doctor."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blip2.commands.terminal import DONE, SOME_FAILED, one_line, print_json, print_line


def inspect(args: argparse.Namespace) -> int:
    from blip2.checkpoint import inspect
    from blip2.registry import readable, resolve_alias

    found = inspect(resolve_alias(args.path), vision=args.vision, language=args.language)
    if args.json:
        print_json(found.as_json())
        return SOME_FAILED if found.problems else DONE
    print_line(f"{one_line(found.path)}: {found.layout} ({found.file_format})")
    print_line(f"  {found.variant}")
    for name, part in found.parts.items():
        dtypes = ", ".join(sorted(part.dtypes))
        print_line(f"  {name}: {part.parameters:,} parameters in {part.tensors} tensors, {dtypes}")
    print_line(
        f"  in all {found.parameters:,} parameters, {readable(found.stored_bytes)} stored in {found.tensors} tensors"
    )
    if found.head != "none":
        print_line(f"  head: {found.head}")
    for kind, lines in (("WRONG", found.problems), ("note", found.notes)):
        for line in lines:
            print_line(f"  {kind}: {one_line(line)}")
    return SOME_FAILED if found.problems else DONE


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each kind of work: what is done, how many bytes more, and of how many."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=quiet, mininterval=1)
        bars[what].update(done)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def convert(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from blip2.checkpoint import convert
    from blip2.registry import readable, resolve_alias

    with _bars(args.quiet) as progress:
        made = convert(
            resolve_alias(args.source),
            args.target,
            to=args.to,
            dtype=args.dtype,
            shard_bytes=None if args.shard_size is None else _bytes(args.shard_size),
            verify=args.verify,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    if args.json:
        print_json(asdict(made) | {"folder": str(made.folder)})
        return DONE
    saved = (
        "" if args.dtype != "smallest-exact" else f"; {made.narrowed} tensors now in 16 bits, none changed"
    )
    sizes = f"{readable(made.read_bytes)} read, {readable(made.written_bytes)} written"
    print_line(f"{one_line(str(made.folder))}: {made.tensors} tensors, {sizes}{saved}")
    if made.verified:
        print_line(f"  verified: {made.verified}")
    return DONE


def _bytes(text: str) -> int:
    """'2GB' -> 2,000,000,000."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in units:
        raise ValueError(f"--shard-size {text!r}: expected a number and KB, MB or GB, such as 2GB")
    return int(float(found[1]) * units[found[2]])


def quantize(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from blip2.checkpoint import quantize_checkpoint
    from blip2.registry import readable, resolve_alias

    with _bars(args.quiet) as progress:
        made = quantize_checkpoint(
            resolve_alias(args.source),
            args.target,
            args.to,
            vision=args.vision,
            language=args.language,
            progress=progress,
        )
    if args.json:
        print_json(asdict(made) | {"folder": str(made.folder)})
        return DONE
    sizes = f"{readable(made.read_bytes)} read, {readable(made.written_bytes)} written"
    print_line(f"{one_line(str(made.folder))}: {made.layers} layers in {args.to}, {sizes}")
    return DONE


def bench(args: argparse.Namespace) -> int:
    from blip2.bench import Contender, run
    from blip2.checkpoint import count_parameters, resolve_path, stored_as
    from blip2.loading import device_of
    from blip2.registry import DEFAULT, DEFAULT_FOLDER, default_dtype, resolve_alias

    if min(args.rounds, *args.batches) < 1:
        raise ValueError("--rounds and --batches are at least 1")
    names = args.model or [DEFAULT]
    folder, *more = (
        DEFAULT_FOLDER if name == DEFAULT else resolve_path(resolve_alias(name)) for name in names
    )
    dtype = args.dtype or default_dtype(count_parameters(folder))
    device = str(device_of(args.device))
    if args.quantize and stored_as(folder):
        raise ValueError("the model is rounded already: give the original, and this one beside it")
    sides = [Contender("blip2", str(folder), dtype, stored_as(folder), device)]
    sides += [Contender("blip2", str(each), dtype, stored_as(each), device) for each in more]
    sides += [Contender("blip2", str(folder), dtype, mode, device) for mode in args.quantize]
    if len({side.name for side in sides}) < len(sides):
        raise ValueError("two of the models are stored alike; give one in each precision")
    if args.against:
        sides.append(Contender(args.against, str(folder), dtype, None, device))
    found = run(
        tuple(sides),
        rounds=args.rounds,
        batches=tuple(args.batches),
        record=None if args.record is None else Path(args.record),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for line in found.lines():
        print_line(line)
    print_line(found.as_json())
    return DONE


def models(args: argparse.Namespace) -> int:
    from blip2.registry import PRECISIONS, known_models, readable

    known = known_models()
    if args.json:
        for model in known:
            needs = {dtype: model.memory_bytes(dtype) for dtype in PRECISIONS}
            print_json(
                {
                    "name": model.name,
                    "alias": model.alias,
                    "lavis": model.lavis,
                    "use": model.use,
                    "parameters": model.parameters,
                    "image_px": model.config.vision.image_size,
                    "disk_bytes": model.disk_bytes,
                    "memory_bytes": needs,
                }
            )
        return DONE
    rows: list[tuple[str, ...]] = [
        ("NAME", "ALIAS", "PARAMETERS", "DISK", "MEMORY fp32", *PRECISIONS[1:], "FOR", "IN LAVIS")
    ]
    for model in known:
        count = model.parameters
        rows.append(
            (
                model.name,
                model.alias,
                f"{count / 1e9:.2f} B" if count >= 10**9 else f"{count / 1e6:.1f} M",
                readable(model.disk_bytes),
                *(readable(model.memory_bytes(dtype)) for dtype in PRECISIONS),
                model.use,
                model.lavis,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def doctor(args: argparse.Namespace) -> int:
    from blip2.doctor import as_json, as_text, examine_machine, examine_models

    machine = examine_machine()
    checkups = examine_models(machine, args.model)
    if args.json:
        for record in as_json(machine, checkups):
            print_json(record)
    else:
        for line in as_text(machine, checkups):
            print_line(line)
    return SOME_FAILED if args.model is not None and checkups[0].problems else DONE
