"""Files of paddle.save: one pickle of numpy arrays, protocol 2, 3 or 4.

What Paddle adds to a pickle, as python/paddle/framework/io.py writes it: a table of names, tensors outside a state dict
as pairs (name, array), arrays of over a gigabyte in slices (protocols 2 and 3), and bfloat16 as uint16, a dtype that
Paddle itself does not have.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping
from typing import Any

import torch

from blip2.tensorfiles.errors import BrokenFileError, UnsafeFileError, quoted
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.pickles import ORDERED_DICT, Call, Global, Stored, as_dict, find_tensors, read_pickle
from blip2.tensorfiles.tensors import StoredTensor, StoredTensors, TensorInfo, checked_shape

SPLIT_TABLE = "UnpackBigParamInfor@@"
_CHUNK = 1 << 20

_RECONSTRUCT = frozenset(Global(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core"))
_ARRAY, _DTYPE = Global("numpy", "ndarray"), Global("numpy", "dtype")
_ENCODE = Global("_codecs", "encode")
_BYTES, _TUPLE = (
    frozenset({Global("__builtin__", name), Global("builtins", name)}) for name in ("bytes", "tuple")
)
ALLOWED = _RECONSTRUCT | _BYTES | _TUPLE | {_ARRAY, _DTYPE, _ENCODE, ORDERED_DICT}

# numpy's names of dtypes. Paddle's bfloat16 is numpy's uint16, see above.
DTYPES: Mapping[str, torch.dtype] = {
    "b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32,
    "i8": torch.int64, "u2": torch.bfloat16, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64,
    "c8": torch.complex64, "c16": torch.complex128,
}  # fmt: skip


_Array = tuple[StoredTensor, Stored | bytes]  # its description and its values


def open_paddle(file: FileBytes) -> PaddleFile:
    """Open a .pdparams file; errors as `read_pickle`'s."""
    try:
        pickle = read_pickle(file, 0, file.size, ALLOWED)
    except UnsafeFileError as error:
        if error.requested not in ("builtins.eval", "__builtin__.eval"):
            raise
        raise UnsafeFileError(
            f"{file.path}: refused: it calls Python's eval, as Paddle does when it saves C++ tensors (and an attacker "
            "could). Nothing was run. In Paddle, save a layer's state_dict() with paddle.save",
            error.requested,
        ) from error
    if pickle.end != file.size:
        raise file.broken(f"{file.size - pickle.end:,} bytes follow the end of its pickle")
    return PaddleFile(file, pickle.value)


class PaddleFile(StoredTensors):
    """The tensors of one .pdparams file."""

    def __init__(self, file: FileBytes, value: Any) -> None:
        self._file = file
        entries = find_tensors(value, _is_tensor, file)
        arrays = {name: self._read_array(name, entry) for name, entry in entries.items()}
        split = (as_dict(value) or {}).get(SPLIT_TABLE, {})
        if not isinstance(split, dict):
            raise file.broken(f"{SPLIT_TABLE} is no dict")
        tensors: dict[str, StoredTensor] = {}
        self._slices: dict[str, list[_Array]] = {}  # one of them is the whole tensor
        for name, entry in split.items():
            tensors[name], self._slices[name] = self._take_slices(name, entry, arrays)
        tensors |= {name: tensor for name, (tensor, _) in arrays.items()}
        self._slices |= {name: [array] for name, array in arrays.items()}
        super().__init__(file, "paddle", tensors)

    def _read(self, name: str, out: memoryview) -> None:
        start = 0
        for tensor, data in self._slices[name]:
            end = start + tensor.info.nbytes
            self._read_into(data, out[start:end], f"tensor {quoted(name)}")
            start = end

    def _read_into(self, data: Stored | bytes, out: memoryview, what: str) -> None:
        if isinstance(data, bytes):
            out[:] = data
        elif not data.text:
            self._file.read_into(data.start, out, what)
        else:  # protocol 2 has no bytes: they are the characters of a text
            decoder = codecs.getincrementaldecoder("utf-8")()
            done = 0
            for start in range(0, data.length, _CHUNK):
                length = min(_CHUNK, data.length - start)
                try:
                    characters = decoder.decode(
                        self._file.read(data.start + start, length, what), final=start + length == data.length
                    )
                    values = characters.encode("latin-1")
                except UnicodeError as error:
                    raise self._file.broken(f"{what} holds no bytes as text") from error
                if done + len(values) <= len(out):
                    out[done : done + len(values)] = values
                done += len(values)
            if done != len(out):
                raise self._file.broken(f"{what} has {done:,} bytes of values instead of {len(out):,}")

    # --- the pickle's description of an array ---

    def _wrong(self, name: str, why: str) -> BrokenFileError:
        return self._file.broken(f"tensor {quoted(name)} {why}")

    def _read_array(self, name: str, value: Any) -> _Array:
        call = _array_call(value)
        state = call.state if call else None
        if call is None or call.arguments[:1] != (_ARRAY,) or not isinstance(state, tuple) or len(state) != 5:
            raise self._wrong(name, "is not described as numpy describes an array")
        _, sizes, kind, columns_first, data = state
        dtype, big_endian = self._read_dtype(name, kind)
        shape = checked_shape(sizes)
        if shape is None:
            raise self._wrong(name, "has no valid shape")
        if columns_first not in (0, 1):
            raise self._wrong(name, "has no valid order of values")
        info = TensorInfo(shape, dtype)
        data = self._read_data(name, data)
        if isinstance(data, Stored) and data.text:
            fits = data.length // 2 <= info.nbytes <= data.length  # a byte takes one or two
        else:
            length = data.length if isinstance(data, Stored) else len(data)
            fits = length == info.nbytes
        if not fits:
            raise self._wrong(name, f"of shape {list(shape)} has another number of bytes than that")
        strides = None
        if columns_first and len(shape) > 1:  # Fortran's order
            strides = tuple(math.prod(shape[:i]) for i in range(len(shape)))
        start = data.start if isinstance(data, Stored) and not data.text else None
        return StoredTensor(info, start, strides, big_endian), data

    def _read_dtype(self, name: str, value: Any) -> tuple[torch.dtype, bool]:
        """A dtype, and whether its byte order is big-endian."""
        if isinstance(value, Call) and value.function == _DTYPE and value.arguments:
            code, state = value.arguments[0], value.state
            order = state[1] if isinstance(state, tuple) and len(state) >= 2 else None
            if type(code) is str and type(order) is str and code in DTYPES and order in ("<", ">", "|"):
                return DTYPES[code], order == ">"
            if type(code) is str and code not in DTYPES:
                raise self._file.unsupported(
                    f"tensor {quoted(name)} has numpy's dtype {quoted(code)}; known are "
                    f"{', '.join(DTYPES)} (u2 is Paddle's bfloat16)"
                )
        raise self._wrong(name, "has no valid dtype")

    def _read_data(self, name: str, value: Any) -> Stored | bytes:
        if isinstance(value, Call) and value.function == _ENCODE and len(value.arguments) == 2:
            text, encoding = value.arguments
            if type(encoding) is str and encoding == "latin1" and isinstance(text, (str, Stored)):
                value = text
        elif isinstance(value, Call) and value.function in _BYTES and not value.arguments:
            value = b""
        if isinstance(value, str):
            try:
                return value.encode("latin-1")
            except UnicodeEncodeError:
                raise self._wrong(name, "holds no bytes as text") from None
        if not isinstance(value, (bytes, Stored)):
            raise self._wrong(name, "has values that are no bytes")
        return value

    def _take_slices(
        self, name: Any, entry: Any, arrays: dict[str, _Array]
    ) -> tuple[StoredTensor, list[_Array]]:
        """Remove a split tensor's slices from `arrays`. They are called name@@.0, name@@.1, ..."""
        names = entry.get("slices") if isinstance(entry, dict) else None
        if type(name) is not str or name in arrays or not isinstance(names, list) or not names:
            raise self._wrong(name, f"has no valid entry in {SPLIT_TABLE}")
        slices = []
        for i, part in enumerate(names):
            if type(part) is not str or part != f"{name}@@.{i}" or part not in arrays:
                raise self._wrong(name, f"lacks its slice {i}")
            slices.append(arrays.pop(part))
        dtype, big_endian = slices[0][0].info.dtype, slices[0][0].big_endian
        if any((t.info.dtype, t.big_endian, t.strides) != (dtype, big_endian, None) for t, _ in slices):
            raise self._wrong(name, "has slices that differ in dtype or order")
        shape = checked_shape(entry.get("OriginShape"))
        if shape is None or math.prod(shape) != sum(tensor.info.numel for tensor, _ in slices):
            raise self._wrong(name, "has slices that do not make up its shape")
        return StoredTensor(TensorInfo(shape, dtype), None, None, big_endian), slices


def _array_call(value: Any) -> Call | None:
    """The call that makes an array: `value` itself, or the second of a pair (name, array)."""
    if isinstance(value, Call) and value.function in _TUPLE and len(value.arguments) == 1:
        value = value.arguments[0]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if isinstance(value, Call) and value.function in _RECONSTRUCT:
        return value
    return None


def _is_tensor(value: Any) -> bool:
    return _array_call(value) is not None
