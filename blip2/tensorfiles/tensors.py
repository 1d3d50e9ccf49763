"""What every reader of tensor files gives: names, shapes and dtypes at once, values on request."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2.tensorfiles.errors import quoted
from blip2.tensorfiles.filebytes import FileBytes, swap_bytes

MAX_ELEMENTS = 2**48
BLOCK_ELEMENTS = 8 << 20  # how much is read, converted and written at a time: 32 MB of fp32


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes its values take."""
        return self.numel * self.dtype.itemsize


class TensorFile:
    """One open file of tensors, whatever its format ("safetensors", "torch", "paddle"): shapes and dtypes by name."""

    format: str
    info: Mapping[str, TensorInfo]

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        raise NotImplementedError

    def mapped(self, name: str) -> Tensor:
        """The tensor, mapped from the file where its format allows."""
        return self.copied(name)

    def blocks(self, name: str, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
        """The values of a tensor in order, flat, in pieces of `size`; read piece by piece where its format allows."""
        return blocks(self.copied(name), size)

    def sources(self, name: str) -> Iterator[tuple[TensorFile, str]]:
        """The stored tensors that a tensor is made of, each with its file."""
        yield self, name


def blocks(tensor: Tensor, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
    """A tensor's values in order, flat, in pieces."""
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its values, from the byte `start` in steps of `strides` values; None: in order.

    start: None where its values are not one after another in the file.
    """

    info: TensorInfo
    start: int | None
    strides: tuple[int, ...] | None = None
    big_endian: bool = False

    @property
    def span(self) -> int:
        """How many values there are from the first to the last, both included."""
        shape, strides = self.info.shape, self.strides
        if strides is None or 0 in shape:
            return self.info.numel
        return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class StoredTensors(TensorFile):
    """The tensors that a file of any format holds."""

    def __init__(self, file: FileBytes, format: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.format, self._file, self._tensors = format, file, tensors
        self.path = file.path
        self.info = {name: tensor.info for name, tensor in tensors.items()}

    def status(self) -> os.stat_result:
        """The open file's size, times and inode."""
        return self._file.status()

    def mapped(self, name: str) -> Tensor:  # where its values are aligned
        tensor, dtype, row = self._tensors[name], self.info[name].dtype, None
        if tensor.start is not None and not tensor.big_endian:
            length = tensor.span * dtype.itemsize
            row = self._file.mapped(tensor.start, length, dtype, f"tensor {quoted(name)}")
        return self.copied(name) if row is None else self._shaped(row, tensor)

    def copied(self, name: str) -> Tensor:
        tensor, dtype = self._tensors[name], self.info[name].dtype
        row = torch.empty(tensor.span * dtype.itemsize, dtype=torch.uint8)
        self._read(name, row.numpy().data)
        if tensor.big_endian:
            swap_bytes(row, dtype)
        values = self._shaped(row.view(dtype), tensor)
        return values if tensor.span == values.numel() else values.contiguous()

    def blocks(self, name: str, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
        tensor, dtype = self._tensors[name], self.info[name].dtype
        in_order = tensor.strides in (None, torch.empty(tensor.info.shape, device="meta").stride())
        if tensor.start is None or tensor.big_endian or not in_order:
            yield from super().blocks(name, size)
            return
        width = size * dtype.itemsize
        for done in range(0, tensor.info.nbytes, width):
            block = torch.empty(min(width, tensor.info.nbytes - done), dtype=torch.uint8)
            self._file.read_into(tensor.start + done, block.numpy().data, f"tensor {quoted(name)}")
            yield block.view(dtype)

    def _read(self, name: str, out: memoryview) -> None:
        """Fill `out` with the values as they are in the file."""
        start = self._tensors[name].start
        assert start is not None
        self._file.read_into(start, out, f"tensor {quoted(name)}")

    @staticmethod
    def _shaped(row: Tensor, tensor: StoredTensor) -> Tensor:
        shape = tensor.info.shape
        return row.reshape(shape) if tensor.strides is None else row.as_strided(shape, tensor.strides)


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

    @property
    def numel(self) -> int:
        """How many values all tensors have."""
        return sum(self.info(name).numel for name in self)

    @property
    def nbytes(self) -> int:
        """Bytes the values of all tensors take."""
        return sum(self.info(name).nbytes for name in self)

    def copy(self, name: str) -> Tensor:
        """The tensor in memory of its own. For a value that is converted and dropped: a mapped one would leave the
        file's pages in the process."""
        return self._files[name].copied(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor in order, flat, in pieces; read piece by piece where the file allows it."""
        return self._files[name].blocks(name)

    def file(self, name: str) -> TensorFile:
        """The open file that holds a tensor."""
        return self._files[name]


def checked_shape(sizes: Any) -> tuple[int, ...] | None:
    """A shape as a file gives it, or None where no tensor can have it."""
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) > 64
        or any(type(n) is not int or n < 0 for n in sizes)
    ):
        return None
    # Zeros do not count: torch multiplies the other sizes into strides all the same.
    return tuple(sizes) if math.prod(max(n, 1) for n in sizes) <= MAX_ELEMENTS else None
