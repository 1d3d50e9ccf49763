"""Tensors written to an open file, a piece at a time: as safetensors, and as paddle.save and torch.save write them.

Paddle's is a pickle with the values within, written here opcode by opcode: a list of arrays needs a handful of them.
Values go to the file as they come and are never in memory as a whole.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from blip2.tensorfiles import paddle_files, torch_files
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.safetensors_files import DTYPES
from blip2.tensorfiles.tensors import TensorInfo

Read = Callable[[str], Iterable[Tensor]]  # a tensor's values by its name: in order, flat, in pieces
Writer = Callable[[BinaryIO, Mapping[str, TensorInfo], Read], None]  # writes tensors to an open file


_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write a safetensors file. Wide dtypes come first so that every tensor is aligned.

    Values are read in the order of `info`: the parts of a quantized weight, of several dtypes, one after another.
    """
    names = sorted(info, key=lambda name: (-info[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape, end = info[name].dtype, list(info[name].shape), position + info[name].nbytes
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    for name in info:
        file.seek(start + header[name]["data_offsets"][0])
        _write_values(file, read(name), info[name])


_NUMPY = {dtype: name for name, dtype in paddle_files.DTYPES.items()}
NAME_TABLE = "StructuredToParameterName@@"  # with it paddle.load makes tensors of the arrays


def write_pdparams(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write what paddle.save(state_dict, path, protocol=4) writes: a pickle of arrays, and a table of their names.

    Raises CheckpointError for a dtype that Paddle's arrays do not have.
    """
    file.write(b"\x80\x04}(")  # protocol 4, a dict, its entries
    for name, entry in info.items():
        if entry.dtype not in _NUMPY:
            raise CheckpointError(f"{name} is {entry.dtype}, which a .pdparams file cannot hold")
        file.write(_text(name) + _array_start(entry))
        _write_values(file, read(name), entry)
        file.write(b"tb")  # the end of the array's state, and to the array with it
    names = b"".join(_text(name) * 2 for name in info)
    file.write(_text(NAME_TABLE) + b"}(" + names + b"uu.")


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _array_start(entry: TensorInfo) -> bytes:
    """A numpy array up to its bytes, as numpy pickles one: `_reconstruct(ndarray, (0,), b"b")`, and of its state
    (1, shape, dtype, False, bytes) all but the end. Numbers and short texts are lines of text."""
    shape = "".join(f"L{n}L\n" for n in entry.shape)
    order = "|" if entry.dtype.itemsize == 1 else "<"
    opcodes = (
        "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
        f"(I1\n({shape}tcnumpy\ndtype\n(V{_NUMPY[entry.dtype]}\nI00\nI01\ntR"
        f"(I3\nV{order}\nNNNI-1\nI-1\nI0\ntbI00\n"
    )
    return opcodes.encode("ascii") + b"\x8e" + struct.pack("<Q", entry.nbytes)


_STORAGES = {dtype: name for name, dtype in torch_files.STORAGES.items()}
_ROOT = "archive"
_ALIGNMENT = 64  # of the values in the file, so that torch can map it


def write_torch(file: BinaryIO, info: Mapping[str, TensorInfo], read: Read) -> None:
    """Write what torch.save({"model": state_dict}, path) writes: LAVIS's checkpoints are such files.

    Raises CheckpointError for a dtype that torch's storages do not have.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_member(archive, "data.pkl", [_state_dict(info)])
        _write_member(archive, "byteorder", [sys.byteorder.encode()])
        for i, (name, entry) in enumerate(info.items()):
            _write_member(archive, f"data/{i}", (_bytes(block) for block in read(name)), entry.nbytes)
        _write_member(archive, "version", [b"3\n"])


class _StatePickler(pickle.Pickler):
    """Pickles tensors as torch does: each a call that is given a storage of its own, which is outside the pickle."""

    storages = 0

    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        key, kind = str(self.storages), getattr(torch, _STORAGES[value.dtype])
        self.storages += 1
        storage = ("storage", kind, key, "cpu", value.numel())
        hooks: OrderedDict[str, Any] = OrderedDict()  # none
        shape, strides = tuple(value.shape), value.stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, strides, False, hooks)


def _state_dict(info: Mapping[str, TensorInfo]) -> bytes:
    """The pickle of {"model": {name: tensor}}."""
    for name, entry in info.items():
        if entry.dtype not in _STORAGES:
            raise CheckpointError(f"{name} is {entry.dtype}, which a torch file of this kind cannot hold")
    out = io.BytesIO()
    tensors = {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in info.items()}
    _StatePickler(out, protocol=2).dump({"model": tensors})
    return out.getvalue()


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


@dataclass(frozen=True)
class FileKind:
    """How a layout stores tensors: the writer, and the name of the file where it is one."""

    write: Writer
    file: str


SAFETENSORS = FileKind(write_safetensors, "model.safetensors")
PDPARAMS = FileKind(write_pdparams, "model_state.pdparams")
TORCH = FileKind(write_torch, "model.pth")


def _bytes(block: Tensor) -> memoryview:
    data: memoryview = block.contiguous().view(torch.uint8).numpy().data
    return data


def _write_values(file: BinaryIO, blocks: Iterable[Tensor], entry: TensorInfo) -> None:
    written = 0
    for block in blocks:
        assert block.dtype == entry.dtype
        written += file.write(_bytes(block))
    assert written == entry.nbytes, (written, entry)
