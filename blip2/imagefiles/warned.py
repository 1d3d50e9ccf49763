"""Warnings while images are decoded, which Pillow raises without saying of which image."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

# The image that this thread reads, and what was warned of it already.
_image: ContextVar[tuple[str, set[str]] | None] = ContextVar("image", default=None)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Warnings within the block are about this image; of blocks within each other the outermost counts."""
    token = _image.set(_image.get() or (name, set()))
    try:
        yield
    finally:
        _image.reset(token)


def report_warnings(report: Callable[[str], None]) -> None:
    """Give Python's warnings to `report` from now on, with the image's name and once for each image.

    `warnings.catch_warnings()` around it limits this to a block. Called from whatever thread reads the image.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        name, seen = _image.get() or ("", set[str]())
        if str(message) not in seen:
            seen.add(str(message))
            report(f"{name}: {message}" if name else str(message))

    warnings.showwarning = show
    if not sys.warnoptions:
        warnings.filterwarnings("always", module=r"PIL\b")  # else only for the first image of all
        warnings.filterwarnings("ignore", "Image size", module=r"PIL\b")  # our own limit counts
