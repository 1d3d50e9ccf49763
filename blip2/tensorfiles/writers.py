"""Tensors written to an open file, a piece at a time: as safetensors, and as paddle.save and torch.save write them.

The latter two are pickles, written here opcode by opcode: a list of arrays needs a handful of them.
Values go to the file as they come and are never in memory as a whole.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from blip2.tensorfiles import paddle_files, torch_files
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.safetensors_files import DTYPES
from blip2.tensorfiles.tensors import TensorInfo

Read = Callable[[str], Iterable[Tensor]]  # a tensor's values by its name: in order, flat, in pieces


class Writer(Protocol):
    """Writes tensors to an open file."""

    def __call__(self, file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None: ...


# --- safetensors ----------------------------------------------------------------------------------------------------

_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write a safetensors file. Wide dtypes come first so that every tensor is aligned.

    Values are read in the order of `info`: the parts of a quantized weight, of several dtypes, one after another.
    """
    names = sorted(info, key=lambda name: (-info[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        end = position + info[name].nbytes
        header[name] = {
            "dtype": _SAFETENSORS[info[name].dtype],
            "shape": list(info[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    for name in info:
        file.seek(start + header[name]["data_offsets"][0])
        _write_values(file, read(name), info[name])


# --- pickle, as much as is needed of it -----------------------------------------------------------------------------

_NUMPY = {dtype: name for name, dtype in paddle_files.DTYPES.items()}
_STORAGES = {
    dtype: storage.name for storage, dtype in torch_files.STORAGES.items() if storage.module == "torch"
}

_MARK, _STOP, _REDUCE, _BUILD, _SETITEMS, _PERSISTENT = b"(", b".", b"R", b"b", b"u", b"Q"
_EMPTY_DICT, _EMPTY_TUPLE, _TUPLE, _NONE, _TRUE, _FALSE = b"}", b")", b"t", b"N", b"\x88", b"\x89"
_PROTOCOL_2, _PROTOCOL_4 = b"\x80\x02", b"\x80\x04"


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    width = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return _MARK + b"".join(items) + _TUPLE if items else _EMPTY_TUPLE


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")


# --- paddle ---------------------------------------------------------------------------------------------------------

NAME_TABLE = "StructuredToParameterName@@"  # with it paddle.load makes tensors of the arrays


def write_pdparams(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write what paddle.save(state_dict, path, protocol=4) writes: a pickle of arrays, and a table of their names.

    Raises:
        CheckpointError: a dtype that Paddle's arrays do not have.
    """
    file.write(_PROTOCOL_4 + _EMPTY_DICT + _MARK)
    for name, entry in info.items():
        if entry.dtype not in _NUMPY:
            raise CheckpointError(f"{name} is {entry.dtype}, which a .pdparams file cannot hold")
        file.write(_text(name) + _array_start(entry))
        _write_values(file, read(name), entry)
        file.write(_TUPLE + _BUILD)
    names = b"".join(_text(name) + _text(name) for name in info)
    file.write(_text(NAME_TABLE) + _EMPTY_DICT + _MARK + names + _SETITEMS)
    file.write(_SETITEMS + _STOP)


def _array_start(entry: TensorInfo) -> bytes:
    """A numpy array up to its bytes: as numpy pickles one."""
    empty = _tuple(_global("numpy", "ndarray"), _tuple(_number(0)), b"C\x01b")
    code = _NUMPY[entry.dtype]
    order = "|" if entry.dtype.itemsize == 1 else "<"
    dtype = _global("numpy", "dtype") + _tuple(_text(code), _FALSE, _TRUE) + _REDUCE
    dtype += (
        _tuple(_number(3), _text(order), _NONE, _NONE, _NONE, _number(-1), _number(-1), _number(0)) + _BUILD
    )
    shape = _tuple(*(_number(n) for n in entry.shape))
    start = _global("numpy.core.multiarray", "_reconstruct") + empty + _REDUCE
    return start + _MARK + _number(1) + shape + dtype + _FALSE + b"\x8e" + struct.pack("<Q", entry.nbytes)


# --- torch ----------------------------------------------------------------------------------------------------------

_ROOT = "archive"
_ALIGNMENT = 64  # of the values in the file, so that torch can map it


def write_torch(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write what torch.save({"model": state_dict}, path) writes: LAVIS's checkpoints are such files.

    Raises:
        CheckpointError: a dtype that torch's storages do not have.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_member(archive, "data.pkl", [_state_dict(info)])
        _write_member(archive, "byteorder", [sys.byteorder.encode()])
        for i, (name, entry) in enumerate(info.items()):
            _write_member(archive, f"data/{i}", (_bytes(block) for block in read(name)), entry.nbytes)
        _write_member(archive, "version", [b"3\n"])


def _state_dict(info: Mapping[str, TensorInfo]) -> bytes:
    """The pickle of {"model": {name: tensor}}, each tensor on a storage of its own."""
    entries = []
    for i, (name, entry) in enumerate(info.items()):
        if entry.dtype not in _STORAGES:
            raise CheckpointError(f"{name} is {entry.dtype}, which a torch file of this kind cannot hold")
        count = 1
        strides: list[int] = []
        for n in reversed(entry.shape):
            strides.insert(0, count)
            count *= max(n, 1)
        storage = _tuple(
            _text("storage"),
            _global("torch", _STORAGES[entry.dtype]),
            _text(str(i)),
            _text("cpu"),
            _number(entry.nbytes // entry.dtype.itemsize),
        )
        hooks = _global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE
        tensor = _tuple(
            storage + _PERSISTENT,
            _number(0),
            _tuple(*map(_number, entry.shape)),
            _tuple(*map(_number, strides)),
            _FALSE,
            hooks,
        )
        entries.append(_text(name) + _global("torch._utils", "_rebuild_tensor_v2") + tensor + _REDUCE)
    model = _EMPTY_DICT + _MARK + b"".join(entries) + _SETITEMS
    return _PROTOCOL_2 + _EMPTY_DICT + _MARK + _text("model") + model + _SETITEMS + _STOP


def _write_member(
    archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], size: int = 0
) -> None:
    """One file of the archive, uncompressed, its content beginning at a multiple of 64 bytes."""
    member = zipfile.ZipInfo(f"{_ROOT}/{name}", (1980, 1, 1, 0, 0, 0))
    large = size >= 2**31
    assert archive.fp is not None
    # the header: 30 bytes, the name, 20 more for sizes over 4 GB, and padding in a field of its own
    start = archive.fp.tell() + 30 + len(member.filename) + (20 if large else 0) + 4
    padding = -start % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=large) as out:
        for piece in pieces:
            out.write(piece)


# --- kinds of files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileKind:
    """How a layout stores tensors: the writer, and the names of one file, of one of several, and of their index."""

    write: Writer
    single: str
    shard: str = ""
    index: str = ""


SAFETENSORS = FileKind(
    write_safetensors, "model.safetensors", "model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"
)
PDPARAMS = FileKind(
    write_pdparams,
    "model_state.pdparams",
    "model_state-{:05}-of-{:05}.pdparams",
    "model_state.pdparams.index.json",
)
TORCH = FileKind(write_torch, "model.pth")


# --- values ---------------------------------------------------------------------------------------------------------


def _bytes(block: Tensor) -> memoryview:
    data: memoryview = block.contiguous().view(torch.uint8).numpy().data
    return data


def _write_values(file: BinaryIO, blocks: Iterable[Tensor], entry: TensorInfo) -> None:
    written = 0
    for block in blocks:
        assert block.dtype == entry.dtype
        written += file.write(_bytes(block))
    assert written == entry.nbytes, (written, entry)
