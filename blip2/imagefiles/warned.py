"""Warnings while images are decoded, which Pillow raises without saying of which image."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

# The name of the image that this thread reads; none any more once it was warned of; None: no image is read.
_image: ContextVar[list[str] | None] = ContextVar("image", default=None)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Warnings within the block are about this image; of blocks within each other the outermost counts."""
    outer = _image.get()
    token = _image.set([name] if outer is None else outer)
    try:
        yield
    finally:
        _image.reset(token)


def report_warnings(report: Callable[[str], None]) -> None:
    """Give Python's warnings to `report` from now on, of an image the first one alone, with its name.

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
        image = _image.get()
        if image is None:
            report(str(message))
        elif image:
            report(f"{image.pop()}: {message}")

    warnings.showwarning = show
    if not sys.warnoptions:
        warnings.filterwarnings("always", module=r"PIL\b")  # else only for the first image of all
        warnings.filterwarnings("ignore", "Image size", module=r"PIL\b")  # our own limit counts
