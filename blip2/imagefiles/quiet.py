"""Pillow's warnings while it decodes: what they tell is an error of ours or nothing."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _ThisThread(threading.local):
    """In place of the pattern for a warning's module: matches all of them while this thread is decoding.

    `warnings.catch_warnings` would silence every thread, and may leave them silenced.
    """

    depth = 0

    def match(self, module: str) -> bool:
        return self.depth > 0


_this_thread = _ThisThread()
_FILTER = ("ignore", None, Warning, _this_thread, 0)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore the warnings of this thread, whatever filters are set."""
    filters: list[object] = warnings.filters  # type: ignore[assignment]
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
    _this_thread.depth += 1
    try:
        yield
    finally:
        _this_thread.depth -= 1
