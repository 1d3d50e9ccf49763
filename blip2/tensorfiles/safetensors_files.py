"""Safetensors files: a header of JSON, and the tensors one after another, without a gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from blip2.tensorfiles.errors import quoted
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.strict_json import parse_json
from blip2.tensorfiles.tensors import StoredTensor, StoredTensors, TensorInfo, checked_shape

MAX_HEADER_BYTES = 4 << 20  # 1,247 tensors (the 6.7B model) take 0.2 MB

# safetensors' names of dtypes.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def open_safetensors(file: FileBytes) -> StoredTensors:
    """Open a file. Raises BrokenFileError or UnsupportedFileError where its header contradicts it or is too long."""
    length = int.from_bytes(file.read(0, 8, "the header"), "little")
    if length > MAX_HEADER_BYTES:
        raise file.unsupported(
            f"the header announces {length:,} bytes, over {MAX_HEADER_BYTES:,}: no model's file"
        )
    header = parse_json(file.read(8, length, "the header"), f"{file.path}: its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise file.broken("__metadata__ is no table of texts")
    tensors = {name: _read_entry(file, name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for start, nbytes, name in sorted((t.start or 0, t.info.nbytes, name) for name, t in tensors.items()):
        if start != position:
            raise file.broken(f"tensor {quoted(name)} does not begin where the one before it ends")
        position += nbytes
    if position != file.size:
        raise file.broken(f"its tensors end at byte {position:,} of {file.size:,}")
    return StoredTensors(file, "safetensors", tensors)


def _read_entry(file: FileBytes, name: str, entry: Any, data: int) -> StoredTensor:
    """A header's entry for a tensor. `data`: the first byte after the header."""
    what = f"the header gives tensor {quoted(name)}"
    if not isinstance(entry, dict):
        raise file.broken(f"{what} no description")
    shape, dtype, place = checked_shape(entry.get("shape")), entry.get("dtype"), entry.get("data_offsets")
    if shape is None:
        raise file.broken(f"{what} no valid shape")
    if not isinstance(place, list) or len(place) != 2 or any(type(n) is not int or n < 0 for n in place):
        raise file.broken(f"{what} no valid place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise file.unsupported(f"{what} the dtype {quoted(dtype)}; known are {', '.join(DTYPES)}")
    info = TensorInfo(shape, DTYPES[dtype])
    if place[1] - place[0] != info.nbytes:
        raise file.broken(f"{what} {place[1] - place[0]:,} bytes instead of {info.nbytes:,}")
    return StoredTensor(info, data + place[0])
