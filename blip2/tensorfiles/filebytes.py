"""The bytes of a file, by offset: every range is checked before anything is read, allocated or mapped."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsupportedFileError


class FileBytes:
    """A file open to be read at any place, by several threads if need be."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        """Opens the file; `stack` closes it. Raises CheckpointError where there is none that can be read."""
        self.path = path
        self._lock = threading.Lock()
        self._map: npt.NDArray[np.uint8] | None = None
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
                raise UnsupportedFileError(f"{path}: no regular file; give the path of a tensor file")
            self._file = stack.enter_context(path.open("rb", buffering=0))
            self.size = self._file.seek(0, 2)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    def status(self) -> os.stat_result:
        """The open file's size, times and inode."""
        return os.fstat(self._file.fileno())

    def broken(self, problem: str) -> BrokenFileError:
        """The error of a file that is cut short or contradicts itself."""
        return BrokenFileError(f"{self.path}: {problem}; get the file again")

    def unsupported(self, problem: str) -> UnsupportedFileError:
        """The error of a file that is none of the kinds read here; `problem` says what to do about it."""
        return UnsupportedFileError(f"{self.path}: {problem}")

    def read(self, start: int, length: int, what: str) -> bytes:
        """`length` bytes. `what`: what is read, for the message of an error."""
        self._check(start, length, what)
        content = bytearray(length)
        self.read_into(start, memoryview(content), what)
        return bytes(content)

    def read_into(self, start: int, out: memoryview, what: str) -> None:
        """Fill `out` with the bytes from `start`."""
        self._check(start, len(out), what)
        done = 0
        try:
            with self._lock:
                self._file.seek(start)
                while done < len(out):
                    count = self._file.readinto(out[done:])
                    if not count:
                        raise self.broken(f"{what} cannot be read: the file became shorter")
                    done += count
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {what} cannot be read ({error.strerror or error})"
            ) from error

    def mapped(self, start: int, length: int, dtype: torch.dtype, what: str) -> Tensor | None:
        """`length` bytes of values in a row, mapped privately: changes stay in this process, the map outlives the file.

        None where the system gives no mapping or the values are not aligned: then they must be read.
        """
        self._check(start, length, what)
        if start % dtype.itemsize or not length:
            return None
        if self._map is None:
            try:
                content = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                return None
            self._map = np.frombuffer(content, np.uint8)
        return torch.from_numpy(self._map[start : start + length]).view(dtype)  # a storage of its own

    def _check(self, start: int, length: int, what: str) -> None:
        if self._file.closed:
            raise CheckpointError(
                f"{self.path}: {what} cannot be read: the file is closed; read tensors inside the `with` block"
            )
        if start < 0 or length < 0 or start + length > self.size:
            raise self.broken(
                f"{what} ends beyond the end of the file; it is cut short or contradicts itself"
            )


def swap_bytes(values: Tensor, dtype: torch.dtype) -> None:
    """Turn big-endian values of `dtype`, given as bytes, into little-endian ones, in place."""
    width = dtype.itemsize // (2 if dtype.is_complex else 1)
    if width > 1:
        values.numpy().view(f"u{width}").byteswap(inplace=True)
