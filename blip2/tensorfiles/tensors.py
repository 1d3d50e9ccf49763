"""What every reader of tensor files gives: names, shapes and dtypes at once, values on request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from blip2.tensorfiles.filebytes import FileBytes

MAX_ELEMENTS = 2**48


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
        """The texts in a safetensors file's header; empty for the others."""

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes by name."""

    def mapped(self, name: str) -> Tensor:
        """The tensor, mapped from the file where its format allows."""

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own."""

    def place(self, name: str) -> tuple[FileBytes, int] | None:
        """The file and the first byte of its values, where these are one after another as in this machine's memory."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file or folder, by the names they have there. A value is read on request.

    Where the file can be mapped into memory a tensor costs no memory of its own until its values are looked at; it may
    be written to (the file stays as it is) and stays valid after the file is closed.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        """`files`: the file that holds each tensor."""
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
        """The open file that holds a tensor: its format and metadata."""
        return self._files[name]


def checked_shape(sizes: Any) -> tuple[int, ...] | None:
    """A shape as a file gives it, or None where no tensor can have it."""
    if not isinstance(sizes, (list, tuple)) or len(sizes) > 64:
        return None
    if any(type(n) is not int or n < 0 for n in sizes):
        return None
    # Zeros do not count: torch multiplies the other sizes into strides all the same.
    return tuple(sizes) if math.prod(max(n, 1) for n in sizes) <= MAX_ELEMENTS else None
