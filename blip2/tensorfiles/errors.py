"""The errors of checkpoints and of the files they are made of, and how a message shows what a file holds."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, loaded or written."""


class UnsafeFileError(CheckpointError):
    """A file that asks for more than data: a class, a function, a module. Nothing of what it asks for was run.

    `requested` is the name it asked for, where it was one.
    """

    def __init__(self, message: str, requested: str = "") -> None:
        super().__init__(message)
        self.requested = requested


class BrokenFileError(CheckpointError):
    """A file cut short, or one whose parts contradict each other."""


class UnsupportedFileError(CheckpointError):
    """A file of a kind or a layout that this package does not read."""


def quoted(name: object) -> str:
    """A name from a file as a message may show it: short, on one line."""
    text = ascii(name) if isinstance(name, (str, int, float, bool, bytes)) else f"a {type(name).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."
