"""Files of torch.save: today's zip archives, and the older files without an archive.

Both hold a pickle in which a tensor is a call of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`,
and each storage, a row of values that several tensors may share, is outside the pickle: in an archive as a record,
in an older file after the pickle. Layout as torch/serialization.py writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from blip2.tensorfiles.errors import quoted
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.pickles import ORDERED_DICT, Call, Global, Reference, find_tensors, read_pickle
from blip2.tensorfiles.tensors import StoredTensor, StoredTensors, TensorInfo, checked_shape
from blip2.tensorfiles.zips import ZipRecord, read_records

# The first pickle of an older file: one large number. Protocols 0 and 1 write it as text.
_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_MAGIC_LINE = f"L{_MAGIC}L\n.".encode()
_PROTOCOL = 1001

STORAGES: Mapping[str, torch.dtype] = {  # torch's classes
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_STORAGES = {Global("torch", name): dtype for name, dtype in STORAGES.items()} | {
    Global("torch.storage", "UntypedStorage"): torch.uint8
}
# Newer dtypes have no storage class; their tensors name the dtype themselves.
_DTYPES: Mapping[Global, torch.dtype] = {
    Global("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
}
# Functions that make a tensor -> how many arguments they have; the third names the dtype.
_TENSOR_3 = Global("torch._utils", "_rebuild_tensor_v3")
_TENSORS: Mapping[Global, tuple[int, ...]] = {
    Global("torch._utils", "_rebuild_tensor"): (4,),
    Global("torch._utils", "_rebuild_tensor_v2"): (6, 7),
    _TENSOR_3: (7, 8),
}
_PARAMETERS = {Global("torch._utils", n) for n in ("_rebuild_parameter", "_rebuild_parameter_with_state")}
ALLOWED = frozenset({*_STORAGES, *_DTYPES, *_TENSORS, *_PARAMETERS, ORDERED_DICT})


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so is torch's older kind."""
    return _MAGIC_BYTES in start[:40] or start.startswith(_MAGIC_LINE)


def open_archive(file: FileBytes) -> StoredTensors:
    """Open a zip archive of torch.save (torch 1.6 and later); errors as `read_pickle`'s and `read_records`'s."""
    records = read_records(file)
    mains = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    roots = [name.removesuffix("/data.pkl") for name in mains]
    if len(roots) != 1 or f"{roots[0]}/constants.pkl" in records:
        what = (
            "a TorchScript program" if roots else "a zip archive, but none of torch.save (it has no data.pkl)"
        )
        raise file.unsupported(f"{what}; give a file of torch.save(model.state_dict()) or safetensors")
    root, main = roots[0], records[mains[0]]
    end = main.start + main.length
    pickle = read_pickle(file, main.start, end, ALLOWED, references=True)
    if pickle.end != end:
        raise file.broken("data.pkl goes on after its end")
    order = b"little"
    if place := records.get(f"{root}/byteorder"):
        order = file.read(place.start, min(place.length, 16), "the byte order")
        if order not in (b"little", b"big"):
            raise file.broken(f"the byte order is {quoted(order)}, not little or big")
    storages = {}
    for key, (dtype, count) in _announced(pickle.references, 5, file).items():
        record = records.get(f"{root}/data/{key}")
        if record is None or record.length != count * dtype.itemsize:
            raise file.broken(
                f"storage {quoted(key)} should have {count * dtype.itemsize:,} bytes, the archive has "
                f"{'none' if record is None else format(record.length, ',')}"
            )
        storages[key] = record
    return _tensors(file, pickle.value, storages, big_endian=order == b"big")


def open_legacy(file: FileBytes) -> StoredTensors:
    """Open a file of torch before 1.6, or of `_use_new_zipfile_serialization=False`; errors as `read_pickle`'s."""
    heads = []
    position = 0
    for _ in range(3):  # the magic number, the version, how the writing machine laid out numbers
        pickle = read_pickle(file, position, file.size, frozenset())
        heads.append(pickle.value)
        position = pickle.end
    magic, version, machine = heads
    if magic != _MAGIC or version != _PROTOCOL or not isinstance(machine, dict):
        raise file.unsupported("a torch file of an unknown version")
    if machine.get("little_endian") is not True:
        raise file.unsupported(
            "written on a big-endian machine, in torch's older format; save it anew with today's torch"
        )
    pickle = read_pickle(file, position, file.size, ALLOWED, references=True)
    keys = read_pickle(file, pickle.end, file.size, frozenset())
    announced = _announced(pickle.references, 6, file)
    if not isinstance(keys.value, list) or any(type(key) is not str for key in keys.value):
        raise file.broken("no list of storages after the pickle")
    if len(set(keys.value)) != len(keys.value) or set(keys.value) != announced.keys():
        raise file.broken("the storages that follow are not those its tensors name")
    storages = {}
    position = keys.end
    for key in keys.value:
        dtype, count = announced[key]
        stored_count = int.from_bytes(file.read(position, 8, f"storage {quoted(key)}"), "little")
        record = ZipRecord(position + 8, count * dtype.itemsize)
        position = record.start + record.length
        if stored_count != count or position > file.size:
            raise file.broken(
                f"storage {quoted(key)} should have {count:,} values, its length is {stored_count:,} and "
                f"{max(file.size - record.start, 0):,} bytes are left"
            )
        storages[key] = record
    if position != file.size:
        raise file.broken(f"{file.size - position:,} bytes follow the last storage")
    return _tensors(file, pickle.value, storages)


def _announced(
    references: Iterable[Reference], length: int, file: FileBytes
) -> dict[str, tuple[torch.dtype, int]]:
    """The storages that the pickle names: dtype and number of values by key.

    A reference is ("storage", class, key, device, number of values), in older files with None at the end.
    """
    storages: dict[str, tuple[torch.dtype, int]] = {}
    for reference in references:
        fields = reference.id
        if (
            not isinstance(fields, tuple)
            or len(fields) != length
            or any(type(field) is not kind for field, kind in zip(fields, (str, Global, str)))
            or fields[0] != "storage"
            or fields[1] not in _STORAGES
            or not _all_sizes(fields[4])
            or fields[5:] not in ((), (None,))
        ):
            raise file.unsupported(
                "it refers to something that is no storage of a tensor; save a plain state dict"
            )
        announced = (_STORAGES[fields[1]], fields[4])
        if storages.setdefault(fields[2], announced) != announced:
            raise file.broken(f"storage {quoted(fields[2])} is announced in two ways")
    return storages


def _tensors(
    file: FileBytes, value: Any, storages: Mapping[str, ZipRecord], *, big_endian: bool = False
) -> StoredTensors:
    """The tensors that a pickle describes."""
    calls = find_tensors(value, _is_tensor, file)
    tensors = {name: _read_call(file, name, call, storages, big_endian) for name, call in calls.items()}
    return StoredTensors(file, "torch", tensors)


def _read_call(
    file: FileBytes, name: str, call: Call, storages: Mapping[str, ZipRecord], big_endian: bool
) -> StoredTensor:
    """The tensor or parameter that a call describes."""
    what = f"tensor {quoted(name)}"
    if call.function in _PARAMETERS:
        inner = call.arguments[0] if call.arguments else None
        if not isinstance(inner, Call) or inner.function not in _TENSORS:
            raise file.unsupported(f"{what} is a parameter without values; save a plain state dict")
        call = inner
    if len(call.arguments) not in _TENSORS[call.function] or not isinstance(call.arguments[0], Reference):
        raise file.broken(f"{what} is described by {len(call.arguments)} values")
    storage, offset, sizes, strides = call.arguments[:4]
    _, kind, key, *_ = storage.id
    dtype = _STORAGES[kind]
    if call.function == _TENSOR_3:
        name_of_dtype = call.arguments[6]
        if not isinstance(name_of_dtype, Global) or name_of_dtype not in _DTYPES:
            raise file.unsupported(f"{what} has dtype {quoted(str(name_of_dtype))}")
        dtype = _DTYPES[name_of_dtype]
    shape = checked_shape(sizes)
    if shape is None:
        raise file.broken(f"{what} has no valid shape")
    if not isinstance(strides, tuple) or len(strides) != len(shape) or not _all_sizes(offset, *strides):
        raise file.broken(f"{what} has no valid place in its storage")
    start = storages[key].start + offset * dtype.itemsize
    tensor = StoredTensor(TensorInfo(shape, dtype), start, strides, big_endian)
    if (offset + tensor.span) * dtype.itemsize > storages[key].length:
        raise file.broken(f"{what} reaches beyond its storage")
    if math.prod(shape) > tensor.span:
        raise file.unsupported(
            f"{what} shows the same values several times (strides {strides}); save it as `tensor.contiguous()`"
        )
    return tensor


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Call) and (value.function in _TENSORS or value.function in _PARAMETERS)


def _all_sizes(*numbers: Any) -> bool:
    return all(type(n) is int and 0 <= n < 2**48 for n in numbers)
