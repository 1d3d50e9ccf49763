"""Pickles put together opcode by opcode, and the tensor files around them: sound ones, and any that lie."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

# --- an assembler of pickles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """GLOBAL."""

    module: str
    name: str


@dataclass(frozen=True)
class Made:
    """REDUCE, and BUILD where there is a state."""

    function: Name
    arguments: Any
    state: Any = None


@dataclass(frozen=True)
class Outside:
    """BINPERSID."""

    id: Any


@dataclass(frozen=True)
class Code:
    """Opcodes as they are."""

    opcodes: bytes


def assemble(value: Any, protocol: int) -> bytes:
    """The opcodes that build a value. A list of pairs under the type `Pairs` is a dict, names may stand twice."""
    match value:
        case Code():
            return value.opcodes
        case None:
            return b"N"
        case bool():
            return (b"\x89", b"\x88")[value] if protocol >= 2 else (b"I00\n", b"I01\n")[value]
        case int():
            if protocol and -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            if protocol < 2:
                return b"L%dL\n" % value
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(content)]) + content
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8")
            return b"X" + struct.pack("<I", len(text)) + text
        case bytes():
            if protocol >= 3:
                return b"B" + struct.pack("<I", len(value)) + value
            return assemble(Made(Name("_codecs", "encode"), (value.decode("latin-1"), "latin1")), protocol)
        case tuple():
            return b"(" + b"".join(assemble(item, protocol) for item in value) + b"t"
        case list():
            return b"(" + b"".join(assemble(item, protocol) for item in value) + b"l"
        case dict():
            return b"(" + b"".join(assemble(part, protocol) for item in value.items() for part in item) + b"d"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Made():
            code = assemble(value.function, protocol) + assemble(value.arguments, protocol) + b"R"
            return code if value.state is None else code + assemble(value.state, protocol) + b"b"
        case Outside():
            return assemble(value.id, protocol) + b"Q"
    raise TypeError(value)


def pickled(value: Any, protocol: int) -> bytes:
    mark = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
    return mark + assemble(value, protocol) + b"."


# --- files around a pickle ----------------------------------------------------------------------------------------


def archive(pickle: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file of today."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in [("data.pkl", pickle), ("version", b"3\n")]:
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), content, compression)
        for key, content in storages.items():
            file.writestr(zipfile.ZipInfo(f"archive/data/{key}"), content, compression)
    return out.getvalue()


def legacy(pickle: bytes, storages: dict[str, bytes], width: int = 4, protocol: int = 2) -> bytes:
    """A torch file from before version 1.6."""
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    heads = [pickled(value, protocol) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    rows = [struct.pack("<q", len(content) // width) + content for content in storages.values()]
    return b"".join([*heads, pickle, pickled(list(storages), protocol), *rows])


ROW = struct.pack("<6f", *range(1, 7))
FLOAT = Name("torch", "FloatStorage")


def torch_tensor(
    *,
    container: str,
    storage: Any = FLOAT,
    key: Any = "0",
    count: Any = 6,
    offset: Any = 0,
    size: Any = (2, 3),
    stride: Any = (3, 1),
    rest: tuple[Any, ...] = (False, Made(Name("collections", "OrderedDict"), ())),
) -> Made:
    more = (None,) if container == "legacy" else ()
    reference = Outside(("storage", storage, key, "cpu", count, *more))
    return Made(Name("torch._utils", "_rebuild_tensor_v2"), (reference, offset, size, stride, *rest))


def numpy_array(
    *,
    size: Any = (2, 3),
    dtype: Any = "f4",
    order: Any = "<",
    columns: Any = False,
    data: Any = ROW,
    arguments: Any = (Name("numpy", "ndarray"), (0,), b"b"),
) -> Made:
    kind = Made(Name("numpy", "dtype"), (dtype, False, True), (3, order, None, None, None, -1, -1, 0))
    function = Name("numpy.core.multiarray", "_reconstruct")
    return Made(function, arguments, (1, size, kind, columns, data))


CONTAINERS = ("paddle", "archive", "legacy")


def wrapped(value: Any, container: str, protocol: int = 2) -> bytes:
    """A whole file whose pickle holds `value`, beside a good tensor where it is not the whole."""
    if container == "paddle":
        return pickled(value, protocol)
    build = archive if container == "archive" else legacy
    return build(pickled(value, protocol), {"0": ROW})


def good_tensor(container: str) -> Made:
    return numpy_array() if container == "paddle" else torch_tensor(container=container)


def safetensors_file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def good_files() -> dict[str, bytes]:
    """Small sound files, one of each kind."""
    split = {
        "UnpackBigParamInfor@@": {"a": {"OriginShape": (2, 3), "slices": ["a@@.0", "a@@.1"]}},
        "a@@.0": numpy_array(size=(3,), data=ROW[:12]),
        "a@@.1": numpy_array(size=(3,), data=ROW[12:]),
    }
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    files = {"safetensors": safetensors_file(header, ROW), "split": pickled(split, 4)}
    for container in CONTAINERS:
        for protocol in (2, 3, 4):
            value = {
                "a": good_tensor(container),
                "more": {"epoch": 3, "best": 0.5, "none": None, "list": [True]},
            }
            files[f"{container}, protocol {protocol}"] = wrapped(value, container, protocol)
    return files
