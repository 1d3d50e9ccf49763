"""What every reader of tensor files gives: names, shapes and dtypes at once, values when asked for; and its errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blip2.tensorfiles.filebytes import FileBytes

MAX_ELEMENTS = 2**48


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, loaded or written."""


class UnsafeFileError(CheckpointError):
    """A file that asks for more than data: a class, a function, a module. Nothing of what it asks for was run.

    `asked` is the name it asked for, where it was one.
    """

    def __init__(self, message: str, asked: str = "") -> None:
        super().__init__(message)
        self.asked = asked


class BrokenFileError(CheckpointError):
    """A file cut short, or one whose parts contradict each other."""


class UnsupportedFileError(CheckpointError):
    """A file of a kind or a layout that this package does not read."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """One open file of tensors, whatever its format."""

    @property
    def format(self) -> str:
        """ "safetensors", "torch" or "paddle"."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a safetensors file says of itself; empty for the others."""

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes by name."""

    def mapped(self, name: str) -> Tensor:
        """The tensor, mapped from the file where its format allows."""

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own."""

    def place(self, name: str) -> tuple[FileBytes, int] | None:
        """Where its values stand one after another as this machine keeps them; None where they do not."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file or folder, by the names they have there. A value is read when it is asked for.

    Where the file can be mapped into memory a tensor costs no memory of its own until its values are looked at; it may
    be written to (the file stays as it is) and stays valid after the file is closed.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        """`files`: where each tensor stands."""
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].mapped(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the tensor."""
        return self._files[name].info[name]

    def copy(self, name: str) -> Tensor:
        """The tensor in memory of its own. For a value that is converted and dropped: a mapped one would leave the
        file's pages in the process."""
        return self._files[name].copied(name)

    def file(self, name: str) -> TensorFile:
        """The open file a tensor stands in: its format, and what it says of itself."""
        return self._files[name]


def checked_shape(sizes: Any) -> tuple[int, ...] | None:
    """A shape as a file gives it, or None where no tensor can have it."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) > 64:
        return None
    if any(type(n) is not int or n < 0 for n in sizes):
        return None
    # Zeros do not count: torch multiplies the other sizes into strides all the same.
    return tuple(sizes) if math.prod(max(n, 1) for n in sizes) <= MAX_ELEMENTS else None


def quoted(name: object) -> str:
    """A name from a file as a message may show it: short, on one line."""
    text = ascii(name) if isinstance(name, (str, int, float, bool, bytes)) else f"a {type(name).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in which a file lists its tensors. No name may stand twice: readers could take it in two ways."""
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        reason = f" ({error})" if isinstance(error, _RepeatedNameError) else ""
        raise BrokenFileError(
            f"{path}: no valid JSON where its list of tensors should be{reason}; get the file again"
        ) from error
    if not isinstance(raw, dict):
        raise BrokenFileError(
            f"{path}: its list of tensors is a {type(raw).__name__}, expected an object; get the file again"
        )
    return raw


class _RepeatedNameError(ValueError):
    pass


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedNameError("a name stands there twice")
    return found
