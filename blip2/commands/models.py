"""List the models known by name, with their sizes and the memory they need.

blip2 models
blip2 models --json
"""

from __future__ import annotations

import argparse

from blip2.commands.arguments import add_output
from blip2.commands.terminal import DONE, print_json, print_line


def configure(parser: argparse.ArgumentParser) -> None:
    add_output(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from blip2.registry import PRECISIONS, describe_stem, known_models, readable

    header = ("NAME", "ALIAS", "PARAMETERS", "DISK", "MEMORY fp32", *PRECISIONS[1:], "FOR", "IN LAVIS")
    rows: list[tuple[str, ...]] = [header]
    for model in known_models():
        memory, count = {dtype: model.memory_bytes(dtype) for dtype in PRECISIONS}, model.parameters
        if args.json:
            names = ("name", "alias", "lavis", "use", "parameters", "disk_bytes")
            others = {"image_px": model.image_px, "memory_bytes": memory}
            if model.stem is not None:
                others["stem"] = describe_stem(model.stem)
            print_json({name: getattr(model, name) for name in names} | others)
            continue
        parameters = f"{count / 1e9:.2f} B" if count >= 10**9 else f"{count / 1e6:.1f} M"
        sizes = map(readable, (model.disk_bytes, *memory.values()))
        use = model.use if model.stem is None else f"{model.use}; on {describe_stem(model.stem)}"
        rows.append((model.name, model.alias, parameters, *sizes, use, model.lavis))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [] if args.json else rows:
        print_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE
