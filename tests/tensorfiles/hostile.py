"""Files that attack and files that lie, over every reader: what each is, and the error it must be refused with."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from assemble import (
    CONTAINERS,
    FLOAT,
    ROW,
    Code,
    Made,
    Name,
    Outside,
    archive,
    good_files,
    good_tensor,
    legacy,
    numpy_array,
    pickled,
    safetensors_file,
    torch_tensor,
    wrapped,
)

from blip2.checkpoint import BrokenFileError, CheckpointError, UnsafeFileError, UnsupportedFileError


@dataclass(frozen=True)
class Case:
    """Files to write, the first of which (or an index among them) is opened, and how it must be refused."""

    label: str
    files: dict[str, bytes]
    error: type[CheckpointError] | tuple[type[CheckpointError], ...]


# --- attacks ------------------------------------------------------------------------------------------------------

GADGETS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.getattr",
    "builtins.open",
    "__builtin__.eval",
    "importlib.import_module",
    "runpy.run_path",
    "socket.create_connection",
    "ctypes.CDLL",
    "marshal.loads",
    "operator.methodcaller",
    "functools.partial",
    "pickle.loads",
    "torch.load",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_sparse_tensor",
    "numpy.load",
    "collections.OrderedDict.update",
    "torch._utils._rebuild_tensor_v2.__globals__",
    "builtins.bytes.fromhex",
    "Builtins.eval",
    "collections.Counter",
]


def _ways(module: str, name: str) -> Iterator[tuple[str, bytes]]:
    """How a pickle gets hold of a name, and uses it."""
    get = f"c{module}\n{name}\n".encode()
    texts = [bytes([0x8C, len(text)]) + text.encode() for text in (module, name)]
    arguments = b"(X\x02\x00\x00\x00idt"
    yield "GLOBAL", get
    yield "REDUCE", get + arguments + b"R"
    yield "BUILD", get + b"(X\x01\x00\x00\x00aI1\ndb"
    yield "INST", b"(X\x02\x00\x00\x00id" + f"i{module}\n{name}\n".encode()
    yield "OBJ", b"(" + get + b"X\x02\x00\x00\x00ido"
    yield "NEWOBJ", get + arguments + b"\x81"
    yield "NEWOBJ_EX", get + arguments + b"}\x92"
    yield "STACK_GLOBAL", texts[0] + texts[1] + b"\x93" + arguments + b"R"
    yield (
        "STACK_GLOBAL from the memo",
        (b"(" + texts[0] + b"q\x07" + texts[1] + b"r\x08\x00\x00\x00" + b"lh\x07j\x08\x00\x00\x00\x93"),
    )
    yield "hidden by POP", get + arguments + b"R0N"
    yield "in a reference", get + arguments + b"RQ"
    yield "a frame around it", b"\x95" + struct.pack("<Q", len(get)) + get
    yield "memo written twice", b"Nq\x00Nq\x00" + get


_ODD_WAYS = {
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x02",
    "EXT4": b"\x84\x01\x02\x03\x04",
    "PERSID": b"Pos\n",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "DUP": b"N2",
    "call of a dict": b"})R",
    "call of a text": b"X\x02\x00\x00\x00id)R",
    "state of a dict": b"}}b",
    "state of a text": b"X\x02\x00\x00\x00id}b",
    "STACK_GLOBAL of numbers": b"K\x01K\x02\x93",
    "STACK_GLOBAL of long texts": (b"X\xd0\x07\x00\x00" + b"a" * 2000) * 2 + b"\x93",
    "state set twice": b"ccollections\nOrderedDict\n)R}b}b",
    "arguments that are no tuple": b"ccollections\nOrderedDict\n]R",
}


def _places(code: Code, container: str) -> dict[str, Any]:
    """The places in a file where the attack can be."""
    tensor = good_tensor(container)
    return {
        "alone": code,
        "beside a tensor": {"a": tensor, "b": code},
        "within a wrapper": {"model": {"a": tensor}, "args": [code]},
    }


def attacks() -> Iterator[Case]:
    """Names that are not allowed and opcodes that make objects: every one is `UnsafeFileError`."""
    number = 0
    for gadget in GADGETS:
        for way, opcodes in _ways(*gadget.rsplit(".", 1)):
            for protocol in range(6):
                for container in CONTAINERS:
                    number += 1
                    places = _places(Code(opcodes), container)
                    place = list(places)[number % len(places)]
                    if protocol < 2 and container == "paddle" and place == "alone":
                        place = "beside a tensor"  # a text alone would not be recognised as a pickle
                    label = f"{gadget} by {way}, protocol {protocol}, {place}, {container}"
                    error = BrokenFileError if way == "memo written twice" else UnsafeFileError
                    yield Case(label, {"model": wrapped(places[place], container, protocol)}, error)
    for way, opcodes in _ODD_WAYS.items():
        for container in CONTAINERS:
            for place, value in _places(Code(opcodes), container).items():
                if container == "archive" or way not in ("PERSID",):
                    yield Case(
                        f"{way}, {place}, {container}", {"model": wrapped(value, container)}, UnsafeFileError
                    )


# --- lies ---------------------------------------------------------------------------------------------------------

LIES = (BrokenFileError, UnsupportedFileError)
NO_SIZES: tuple[Any, ...] = (
    (-2, -3),
    (2, -3),
    (2**62, 1),
    (2**31, 2**31),
    (2**63,),
    (2**200,),
    ("2", 3),
    (2.0, 3.0),
    (None,),
    (True, 3),
    ((2, 3),),
    (1,) * 65,
    6,
    None,
    "23",
    {"a": 1},
    (2, 3, 2),
    (7,),
    (4, 3),
    (0, 2**63),
)
NO_NUMBERS: tuple[Any, ...] = (-1, 2**31, 2**40, 2**63, 2**64 - 1, 2**200, "0", None, 1.0, (0,))


def torch_lies() -> Iterator[Case]:
    for container in ("archive", "legacy"):
        changes: list[dict[str, Any]] = [{"size": size} for size in NO_SIZES]
        changes += [{"offset": offset} for offset in (1, 6, *NO_NUMBERS)]
        changes += [{"count": count} for count in (0, 5, 7, *NO_NUMBERS)]
        changes += [
            {"stride": stride}
            for stride in (
                (-3, 1),
                (3, -1),
                (3,),
                (3, 1, 1),
                (6, 1),
                (3, 2),
                (0, 1),
                (0, 0),
                (2**40, 1),
                (2**62, 2**62),
                ("3", 1),
                (3.0, 1),
                None,
                1,
            )
        ]
        changes += [{"key": key} for key in ("1", "../0", "", "0/", "/0", 0, None, ("0",), 0.0)]
        changes += [
            {"storage": storage}
            for storage in (
                Name("torch", "DoubleStorage"),
                Name("torch", "HalfStorage"),
                "FloatStorage",
                None,
                4,
                Name("torch", "uint16"),
                Name("collections", "OrderedDict"),
            )
        ]
        changes += [{"rest": rest} for rest in ((), (False,), (1, 2, 3, 4))]
        for change in changes:
            for second in (False, True):
                value = {"a": torch_tensor(container=container, **change)}
                if second:
                    value = {"z": torch_tensor(container=container), **value}
                yield Case(
                    f"torch, {change}, {second}, {container}", {"model": wrapped(value, container)}, LIES
                )
        tensor = torch_tensor(container=container)
        function = tensor.function
        other = torch_tensor(container=container, storage=Name("torch", "IntStorage"))
        for label, value in {
            "no storage": Made(function, (1, 0, (2, 3), (3, 1), False, {})),
            "no arguments": Made(function, ()),
            "another reference": Made(
                function, (Outside(("module", FLOAT, "0", "cpu", 6)), 0, (1,), (1,), 0, 0)
            ),
            "a short reference": Made(function, (Outside(("storage",)), 0, (1,), (1,), False, {})),
            "a text as reference": Made(function, (Outside("0"), 0, (1,), (1,), False, {})),
            "parameter of nothing": Made(Name("torch._utils", "_rebuild_parameter"), (1, False, {})),
            "parameter within a parameter": Made(
                Name("torch._utils", "_rebuild_parameter"),
                (Made(Name("torch._utils", "_rebuild_parameter"), (tensor, False, {})), False, {}),
            ),
            "no dtype": Made(Name("torch._utils", "_rebuild_tensor_v3"), (*tensor.arguments, 4)),
            "storage of two dtypes": [tensor, other],
        }.items():
            whole = {"a": value, "b": other} if label == "storage of two dtypes" else {"a": value}
            if label == "storage of two dtypes":
                whole = {"a": tensor, "b": other}
            yield Case(f"torch, {label}, {container}", {"model": wrapped(whole, container)}, LIES)
        for label, value in {
            "a list": [tensor],
            "a tensor alone": tensor,
            "a number": 3,
            "nothing": None,
            "deeper": {"a": {"b": {"c": tensor}}},
            "two wrappers": {"model": {"a": tensor}, "state_dict": {"b": tensor}},
            "inside and outside": {"a": tensor, "model": {"b": tensor}},
            "a number as name": {3: tensor},
        }.items():
            yield Case(f"layout, {label}, {container}", {"model": wrapped(value, container)}, LIES)
    pickle = pickled({"a": torch_tensor(container="legacy")}, 2)
    good = legacy(pickle, {"0": ROW})
    heads = len(good) - len(pickle) - len(pickled(["0"], 2)) - 8 - len(ROW)
    for label, content in {
        "other version": good.replace(struct.pack("<i", 1001), struct.pack("<i", 1002)),
        "big-endian": good.replace(b"little_endian\x88", b"little_endian\x89"),
        "no keys": good[: heads + len(pickle)] + pickled([], 2) + good[-32:],
        "keys twice": good[: heads + len(pickle)] + pickled(["0", "0"], 2) + good[-32:] * 2,
        "keys as numbers": good[: heads + len(pickle)] + pickled([0], 2) + good[-32:],
        "more keys": good[: heads + len(pickle)] + pickled(["0", "1"], 2) + good[-32:] * 2,
        "no list": good[: heads + len(pickle)] + pickled({"0": 1}, 2) + good[-32:],
    }.items():
        assert content != good
        yield Case(f"legacy, {label}", {"model": content}, LIES)
    for count in (0, 1, 5, 7, 2**31, 2**62, 2**64 - 1):
        yield Case(f"legacy, {count} values", {"model": good[:-32] + struct.pack("<Q", count) + ROW}, LIES)


def zip_lies() -> Iterator[Case]:
    pickle = pickled({"a": torch_tensor(container="archive")}, 2)
    good = archive(pickle, {"0": ROW})
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        begins = [info.header_offset for info in file.infolist()]
        directory = file.start_dir
    entries = [directory]
    while good[entries[-1] : entries[-1] + 4] == b"PK\x01\x02":
        entries.append(entries[-1] + 46 + sum(struct.unpack_from("<3H", good, entries[-1] + 28)))
    end = entries.pop()
    # Places of fields that count: (first byte, width).
    fields = [
        (begin + at, width)
        for begin in begins
        for at, width in ((0, 4), (6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2), (30, 1), (34, 1))
    ]
    fields += [
        (begin + at, width)
        for begin in entries
        for at, width in (
            (0, 4),
            (8, 2),
            (10, 2),
            (20, 4),
            (24, 4),
            (28, 2),
            (30, 2),
            (32, 2),
            (34, 2),
            (42, 4),
            (46, 1),
            (50, 1),
        )
    ]
    fields += [
        (end + at, width)
        for at, width in ((0, 4), (4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
    ]
    for place, width in fields:
        old = int.from_bytes(good[place : place + width], "little")
        top = 256**width
        for new in sorted({1, 2, old + 1, old - 1, old ^ 0x40, top // 2 - 1, top - 1, top - 2} - {old}):
            if 0 <= new < top:
                content = good[:place] + new.to_bytes(width, "little") + good[place + width :]
                yield Case(f"zip, {new} instead of {old} at {place}", {"model": content}, LIES)

    def rebuilt(names: list[str], compression: int = zipfile.ZIP_STORED) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as file:
            for name in names:
                content = {"data.pkl": pickle, "0": ROW}.get(name.rsplit("/", 1)[-1], b"3\n")
                file.writestr(zipfile.ZipInfo(name), content, compression)
        return out.getvalue()

    names = ["archive/data.pkl", "archive/data/0"]
    for label, content in {
        "compressed": rebuilt(names, zipfile.ZIP_DEFLATED),
        "bzip2": rebuilt(names, zipfile.ZIP_BZIP2),
        "a bomb": archive(pickle, {"0": ROW, "1": bytes(50 << 20)}, zipfile.ZIP_DEFLATED),
        "upwards": rebuilt([*names, "archive/../../evil"]),
        "absolute": rebuilt([*names, "/etc/passwd"]),
        "backslash": rebuilt([*names, "archive\\evil"]),
        "two pickles": rebuilt([*names, "other/data.pkl"]),
        "no pickle": rebuilt(["archive/data/0"]),
        "no storage": rebuilt(["archive/data.pkl"]),
        "no root": rebuilt(["data.pkl", "data/0"]),
        "TorchScript": rebuilt([*names, "archive/constants.pkl"]),
        "odd byte order": rebuilt([*names, "archive/byteorder"]),
        "many records": rebuilt([*names, *(f"archive/{i}" for i in range(20_001))]),
        "bytes before": b"PK\x03\x04" + good,
        "a comment": good[:-2] + b"\x04\x00text",
        "empty": b"PK\x05\x06" + bytes(18),
        "the beginning alone": b"PK\x03\x04",
        "more after the pickle": archive(pickle + b"N.", {"0": ROW}),
    }.items():
        yield Case(f"zip, {label}", {"model": content}, LIES)
    twice = good.replace(b"archive/version", b"archive/data.pk")  # equal length, then the same name
    yield Case(
        "zip, a name twice", {"model": twice.replace(b"archive/data.pkl", b"archive/data.pk\x00")}, LIES
    )
    # Two entries of the directory for one record: its bytes would count twice.
    first = good[entries[0] : entries[1]]
    tail = bytearray(good[end:])
    tail[8:12] = struct.pack("<2H", len(entries) + 1, len(entries) + 1)
    tail[12:16] = struct.pack("<I", end - directory + len(first))
    for label, extra in {"an entry twice": first, "overlap": first.replace(b"data.pkl", b"data.pk2")}.items():
        yield Case(f"zip, {label}", {"model": good[:end] + extra + bytes(tail)}, LIES)


def paddle_lies() -> Iterator[Case]:
    changes: list[dict[str, Any]] = [{"size": size} for size in NO_SIZES]
    changes += [
        {"dtype": dtype}
        for dtype in ("O8", "f8", "f2", "i1", "V4", "U1", "S4", "M8", "f4,i4", "|f4", "", None, 4, b"f4")
    ]
    changes += [{"order": order} for order in ("=", "x", "", None, 3, ("<",))]
    changes += [{"columns": columns} for columns in (2, -1, "F", None)]
    changes += [
        {"data": data} for data in (ROW[:-1], ROW + b"\0", b"", None, 24, [1.0], (ROW,), {"a": 1}, "Ā" * 24)
    ]
    changes += [
        {"data": Made(Name("_codecs", "encode"), arguments)}
        for arguments in (
            (),
            ("a" * 24,),
            ("a" * 24, "utf-8"),
            ("a" * 24, "hex"),
            ("a" * 24, "zlib"),
            ("a" * 23, "latin1"),
            ("é" * 12 + "a" * 13, "latin1"),
            ("Ā" * 24, "latin1"),
            (24, "latin1"),
            (None, None),
            (ROW, "latin1"),
        )
    ]
    changes += [
        {"arguments": arguments}
        for arguments in ((), (1,), (Name("numpy", "dtype"), (0,), b"b"), (None, (0,), b"b"))
    ]
    for protocol in (2, 3, 4, 5):
        for change in changes:
            yield Case(
                f"paddle, {change}, protocol {protocol}",
                {"model": pickled({"z": numpy_array(), "a": numpy_array(**change)}, protocol)},
                LIES,
            )
    # Long texts are decoded when they are read.
    for label, text in {
        "no UTF-8": b"\xff" * 2000,
        "cut character": b"a" * 1999 + b"\xc3",
        "wide characters": "Ā".encode() * 1000,
        "too few": "é".encode() * 1000,
        "too many": b"a" * 2001,
    }.items():
        long = Made(Name("_codecs", "encode"), (Code(b"X" + struct.pack("<I", len(text)) + text), "latin1"))
        array = numpy_array(size=(2000,), dtype="i1", order="|", data=long)
        yield Case(f"paddle, long text, {label}", {"model": pickled({"a": array}, 2)}, LIES)
    part = numpy_array(size=(3,), data=ROW[:12])
    for label, entry in {
        "no dict": [],
        "no slices": {"OriginShape": (6,)},
        "no shape": {"slices": ["a@@.0", "a@@.1"]},
        "empty": {"OriginShape": (0,), "slices": []},
        "one missing": {"OriginShape": (9,), "slices": ["a@@.0", "a@@.1", "a@@.2"]},
        "one twice": {"OriginShape": (6,), "slices": ["a@@.0", "a@@.0"]},
        "wrong order": {"OriginShape": (6,), "slices": ["a@@.1", "a@@.0"]},
        "larger": {"OriginShape": (7,), "slices": ["a@@.0", "a@@.1"]},
        "smaller": {"OriginShape": (5,), "slices": ["a@@.0", "a@@.1"]},
        "huge": {"OriginShape": (2**62, 2**62), "slices": ["a@@.0", "a@@.1"]},
        "numbers": {"OriginShape": (6,), "slices": [0, 1]},
        "another's": {"OriginShape": (6,), "slices": ["b@@.0", "b@@.1"]},
        "a million": {"OriginShape": (3_000_000,), "slices": ["a@@.0"] * 1000},
    }.items():
        for name in ("a", 3):
            table = {"a@@.0": part, "a@@.1": part, "UnpackBigParamInfor@@": {name: entry}}
            yield Case(f"paddle, split, {label}, {name}", {"model": pickled(table, 4)}, LIES)
    table = {
        "a": part,
        "a@@.0": part,
        "UnpackBigParamInfor@@": {"a": {"OriginShape": (3,), "slices": ["a@@.0"]}},
    }
    yield Case("paddle, split, the whole too", {"model": pickled(table, 4)}, LIES)


def pickle_lies() -> Iterator[Case]:
    """Pickles that cannot be, in every container."""
    texts: dict[str, Callable[[int], bytes]] = {
        "X": lambda n: b"X" + struct.pack("<I", n % 2**32),
        "BINBYTES": lambda n: b"B" + struct.pack("<I", n % 2**32),
        "BINUNICODE8": lambda n: b"\x8d" + struct.pack("<Q", n),
        "BINBYTES8": lambda n: b"\x8e" + struct.pack("<Q", n),
        "BYTEARRAY8": lambda n: b"\x96" + struct.pack("<Q", n),
        "LONG4": lambda n: b"\x8b" + struct.pack("<I", n % 2**32),
        "FRAME": lambda n: b"\x95" + struct.pack("<Q", n),
        "BINSTRING": lambda n: b"T" + struct.pack("<I", n % 2**32),
    }
    codes = {
        f"{opcode} of {n}": make(n)
        for opcode, make in texts.items()
        for n in (2**16, 2**31 - 1, 2**32 - 1, 2**40 + 2**31, 2**63 + 2**20, 2**64 - 1)
    }
    codes |= {
        "GET of nothing": b"h\x09",
        "LONG_BINGET of nothing": b"j\xff\xff\xff\xff",
        "GET of a word": b"gword\n",
        "GET of a negative": b"g-1\n",
        "PUT far away": b"Nr\xff\xff\xff\xff",
        "PUT of a negative": b"Np-1\n",
        "PUT of nothing": b"(q\x00",
        "MEMOIZE of nothing": b"(\x94",
        "no mark": b"t",
        "APPENDS without mark": b"]e",
        "APPEND to a dict": b"}Na",
        "SETITEM of a list": b"]NNs",
        "SETITEMS of half an entry": b"}(X\x01\x00\x00\x00au",
        "a name twice": b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu",
        "a name twice in DICT": b"(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNd",
        "a tuple as name": b"}))s",
        "a list as name": b"}]Ns",
        "a huge number as name": b"}\x8a\x10" + b"\x01" * 16 + b"Ns",
        "a long text as name": b"}X\xd0\x07\x00\x00" + b"a" * 2000 + b"Ns",
        "deep": b"(" * 101,
        "very deep": b"(" * 100_000,
        "an unknown opcode": b"\xfe",
        "a second PROTO": b"\x80\x02",
        "text that is none": b"X\x01\x00\x00\x00\xff",
        "an endless line": b"I" + b"1" * 5000 + b"\n",
        "a number of 4000 digits": b"I" + b"1" * 4000 + b"\n",
        "a number of words": b"Iword\n",
        "a LONG of words": b"Lword\n",
        "a FLOAT of words": b"Fword\n",
        "escapes": b"V\\u0041\n",
        "a string without quotes": b"Sword\n",
        "STOP with more": b"NN.",
        "STOP with nothing": b".",
        "STOP in a container": b"(N.",
        "frames within frames": b"\x95\x0c" + bytes(7) + b"\x95\x01" + bytes(7) + b"N",
        "too many opcodes": b"Nq\x00" + b"h\x00" * 600_000,
        "too many texts": (b"X\x00\x04\x00\x00" + b"a" * 1024) * 17_000,
        "too many lines": (b"V" + b"a" * 4000 + b"\n") * 4300,
    }
    for label, code in codes.items():
        for container in CONTAINERS:
            for place, value in {
                "alone": Code(code),
                "among tensors": {"a": good_tensor(container), "b": Code(code)},
            }.items():
                if not (len(code) > 10_000 and place == "alone"):
                    yield Case(
                        f"pickle, {label}, {place}, {container}", {"model": wrapped(value, container)}, LIES
                    )
    # Tuples within tuples: 60 of them would be 2 ** 60 values to whoever walks or hashes them.
    bomb = b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    for container in CONTAINERS:
        for label, value in {"shape": {"size": Code(bomb)}, "stride": {"stride": Code(bomb)}}.items():
            if container == "paddle":
                tensor = numpy_array(
                    **({"size": Code(bomb)} if label == "shape" else {"columns": Code(bomb)})
                )
            else:
                tensor = torch_tensor(container=container, **value)
            yield Case(
                f"pickle, tuples as {label}, {container}", {"model": wrapped({"a": tensor}, container)}, LIES
            )
        yield Case(
            f"pickle, tuples as a name, {container}",
            {"model": wrapped(Code(b"}" + bomb + b"Ns"), container)},
            LIES,
        )
        yield Case(
            f"pickle, a list in itself, {container}",
            {"model": wrapped(Code(b"]q\x00h\x00a"), container)},
            LIES,
        )


def safetensors_lies() -> Iterator[Case]:
    good = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [i * 24, i * 24 + 24]}
        for i, name in enumerate("abc")
    }
    for name in good:
        changes: list[dict[str, Any]] = [
            {"shape": size if not isinstance(size, tuple) else list(size)}
            for size in NO_SIZES
            if size != (True, 3)
        ]
        changes += [
            {"dtype": dtype} for dtype in ("F64", "F16", "F4", "", None, 4, ["F32"], "f32", "float32")
        ]
        first = good[name]["data_offsets"][0]
        changes += [
            {"data_offsets": [first + a, first + b]}
            for a, b in (
                (-24, 0),
                (0, 23),
                (0, 25),
                (1, 25),
                (24, 0),
                (0, 0),
                (0, 2**40),
                (2**63, 2**63 + 24),
                (0, 48),
                (4, 28),
            )
        ]
        changes += [
            {"data_offsets": place}
            for place in (None, [], [0], [0, 24, 48], "0,24", [0.0, 24.0], ["0", "24"], [None, None])
        ]
        for change in changes:
            header = {**good, name: {**good[name], **change}}
            yield Case(f"safetensors, {name}, {change}", {"model": safetensors_file(header, ROW * 3)}, LIES)
        for wrong in (None, [], 3, "F32", {}):
            yield Case(
                f"safetensors, {name} is {wrong}",
                {"model": safetensors_file({**good, name: wrong}, ROW * 3)},
                LIES,
            )
    text = json.dumps(good).encode()
    for label, content in {
        "bytes uncovered": safetensors_file(good, ROW * 4),
        "metadata of numbers": safetensors_file({"__metadata__": {"a": 1}, **good}, ROW * 3),
        "metadata of nothing": safetensors_file({"__metadata__": [], **good}, ROW * 3),
        "a name twice": safetensors_file(text[:-1] + b"," + text[1:], ROW * 3),
        "deep": safetensors_file(b'{"a":' * 100_000, b""),
        "many objects": safetensors_file(b'{"a":[' + b'{"":0},' * 580_000 + b"0]}", b""),
        "many lists": safetensors_file(b'{"a":[' + b"[]," * 1_300_000 + b"0]}", b""),
        "many names": safetensors_file(b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}", b""),
        "a long number": safetensors_file(b'{"a":' + b"1" * 1_000_000 + b"}", b""),
        "too long": safetensors_file(b"{" + b" " * (4 << 20) + b"}", b""),
        "not a number": safetensors_file(b'{"a":NaN}', b""),
    }.items():
        yield Case(f"safetensors, {label}", {"model": content}, LIES)


def index_lies() -> Iterator[Case]:
    tensors = {
        ".safetensors": safetensors_file({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}, ROW),
        ".bin": wrapped({"a": torch_tensor(container="archive")}, "archive"),
        ".pdparams": pickled({"a": numpy_array()}, 4),
    }
    for suffix, content in tensors.items():
        shard = f"one{suffix}"
        for label, index in {
            "upwards": {"weight_map": {"a": f"../{shard}"}},
            "upwards by a detour": {"weight_map": {"a": f"x/../../{shard}"}},
            "absolute": {"weight_map": {"a": f"/etc/{shard}"}},
            "a folder": {"weight_map": {"a": f"sub/{shard}"}},
            "backslashes": {"weight_map": {"a": f"..\\{shard}"}},
            "a NUL": {"weight_map": {"a": f"one\0{suffix}"}},
            "a dot": {"weight_map": {"a": "."}},
            "nothing": {"weight_map": {"a": ""}},
            "another kind": {"weight_map": {"a": "passwd"}},
            "half a character": {"weight_map": {"a": f"\ud800{suffix}"}},
            "too long a name": {"weight_map": {"a": "x" * 5000 + suffix}},
            "missing file": {"weight_map": {"a": f"two{suffix}"}},
            "missing tensor": {"weight_map": {"a": shard, "b": shard}},
            "spare tensor": {"weight_map": {}},
            "other name": {"weight_map": {"b": shard}},
            "a number": {"weight_map": {"a": 7}},
            "a list": {"weight_map": ["a"]},
            "no map": {},
            "many shards": {"weight_map": {str(i): f"{i}{suffix}" for i in range(1001)}},
            "itself": {"weight_map": {"a": f"model{suffix}.index.json"}},
        }.items():
            if label == "spare tensor":
                index = {"weight_map": {"a": shard}}
                files = {
                    shard: tensors[suffix].replace(b"a", b"b", 1) if suffix == ".safetensors" else content
                }
                index = {"weight_map": {"c": shard}}
            else:
                files = {shard: content}
            yield Case(
                f"index, {label}, {suffix}",
                {f"model{suffix}.index.json": json.dumps(index).encode(), **files},
                CheckpointError,
            )
        twice = f'{{"weight_map": {{"a": "{shard}", "a": "{shard}"}}}}'.encode()
        for label, text in {
            "a name twice": twice,
            "no JSON": b"{",
            "no object": b"[]",
            "deep": b"[" * 100_000,
            "empty": b"",
            "no text": b"\xff\xfe",
            "too long": b" " * (5 << 20),
            "many lists": b'{"a":[' + b"[]," * 1_300_000 + b"0]}",
        }.items():
            yield Case(
                f"index, {label}, {suffix}",
                {f"model{suffix}.index.json": text, shard: content},
                CheckpointError,
            )


def cut_files() -> Iterator[Case]:
    """Sound files that end early, or late."""
    for label, content in good_files().items():
        for length in sorted({round(i * (len(content) - 1) / 99) for i in range(100)}):
            yield Case(f"{label}, cut to {length} bytes", {"model": content[:length]}, LIES)
        for more in (b"\0", b".", b"N.", bytes(22), b"\xff" * 1000, content):
            yield Case(f"{label}, with {len(more)} bytes more", {"model": content + more}, LIES)


def other_files() -> Iterator[Case]:
    for label, content in {
        "empty": b"",
        "text": b"hello, world",
        "html": b"<!DOCTYPE html><html>",
        "lfs": b"version https://git-lfs",
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "GGUF": b"GGUF" + bytes(100),
        "numpy": b"\x93NUMPY\x01\x00" + bytes(100),
        "tar": bytes(257) + b"ustar" + bytes(500),
        "zeros": bytes(5000),
        "pickle protocol 200": b"\x80\xc8N.",
        "json": b'{"a": 1}',
        "ELF": b"\x7fELF" + bytes(60),
    }.items():
        yield Case(f"no tensor file, {label}", {"model": content}, LIES)


def cases() -> Iterator[Case]:
    for kind in (
        attacks,
        torch_lies,
        zip_lies,
        paddle_lies,
        pickle_lies,
        safetensors_lies,
        index_lies,
        cut_files,
        other_files,
    ):
        yield from kind()
