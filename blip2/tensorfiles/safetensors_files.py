"""Safetensors files. The library maps the tensors; we check what it lets pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsupportedFileError, quoted
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.strict_json import parse_json
from blip2.tensorfiles.tensors import TensorInfo, checked_shape

MAX_HEADER_BYTES = 4 << 20  # 1,247 tensors (the 6.7B model) take 0.2 MB

# safetensors' names of dtypes.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class SafetensorsFile:
    """The tensors of one safetensors file."""

    format = "safetensors"

    def __init__(self, file: FileBytes, stack: ExitStack) -> None:
        """Raises BrokenFileError or UnsupportedFileError for a header that lies."""
        self._bytes = file
        self.info, self._starts, self.metadata = _read_header(file)
        try:
            self._file = stack.enter_context(safe_open(file.path, framework="pt"))
        except Exception as error:
            raise BrokenFileError(
                f"{file.path}: a broken safetensors file ({_first_line(error)}); get it again"
            ) from error

    def mapped(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except Exception as error:
            raise CheckpointError(
                f"{self._bytes.path}: tensor {quoted(name)} cannot be read ({_first_line(error)}); read tensors inside "
                "the `with` block, and leave the file as it is meanwhile"
            ) from error
        return tensor

    def copied(self, name: str) -> Tensor:
        info = self.info[name]
        values = torch.empty(info.nbytes, dtype=torch.uint8)
        self._bytes.read_into(self._starts[name], values.numpy().data, f"tensor {quoted(name)}")
        return values.view(info.dtype).reshape(info.shape)

    def place(self, name: str) -> tuple[FileBytes, int]:
        return self._bytes, self._starts[name]


def _read_header(file: FileBytes) -> tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]:
    """The tensors that the header lists, where in the file each begins, and the header's metadata.

    Checks what the safetensors library lets pass, repeated names and absurd sizes; the library checks offsets.
    """
    length = int.from_bytes(file.read(0, 8, "the header"), "little")
    if length > MAX_HEADER_BYTES:
        raise UnsupportedFileError(
            f"{file.path}: the header announces {length:,} bytes, over {MAX_HEADER_BYTES:,}: no model's file"
        )
    header = parse_json(file.read(8, length, "the header"), f"{file.path}: its header", unique_names=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BrokenFileError(f"{file.path}: __metadata__ is no table of texts; get the file again")
    info, starts = {}, {}
    for name, entry in header.items():
        info[name], begin = _tensor_info(name, entry, file.path)
        starts[name] = 8 + length + begin
    return info, starts, metadata


def _tensor_info(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int]:
    """A header's entry for a tensor: what it is, and its first byte among the data."""
    wrong = f"{path}: the header gives tensor {quoted(name)}"
    if not isinstance(entry, dict):
        raise BrokenFileError(f"{wrong} no description; get the file again")
    shape, dtype, place = checked_shape(entry.get("shape")), entry.get("dtype"), entry.get("data_offsets")
    if shape is None:
        raise BrokenFileError(f"{wrong} no valid shape; get the file again")
    if not isinstance(place, list) or len(place) != 2 or any(type(n) is not int or n < 0 for n in place):
        raise BrokenFileError(f"{wrong} no valid place; get the file again")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedFileError(f"{wrong} the dtype {quoted(dtype)}; known are {', '.join(DTYPES)}")
    return TensorInfo(shape, DTYPES[dtype]), place[0]


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
