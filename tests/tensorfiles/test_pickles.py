"""Pickles as data: what Python writes is read alike, long strings stay in the file, and names stay words."""

from __future__ import annotations

import pickle
import textwrap
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blip2.tensorfiles.errors import BrokenFileError, UnsafeFileError
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.pickles import ORDERED_DICT, SHORT, Call, Global, Pickle, Stored, as_dict, read_pickle

PROTOCOLS = range(6)


def read(content: bytes, folder: Path, *allowed: Global, references: bool = False) -> Pickle:
    (folder / "file").write_bytes(content)
    with ExitStack() as stack:
        file = FileBytes(folder / "file", stack)
        return read_pickle(file, 0, file.size, frozenset(allowed), references=references)


def plain(value: Any) -> Any:
    """What we read, as Python would have read it."""
    if as_dict(value) is not None:
        return {key: plain(entry) for key, entry in as_dict(value).items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_python_writes(protocol: int, tmp_path: Path) -> None:
    shared = ["a shared list"]
    theirs = {
        "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**63, -(2**63), 2**100, 0.0, -1.5, 1e300],
        "constants": (None, True, False),
        "texts": ["", "a", "é", "日本語", "x" * SHORT],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "empty": [[], {}, ()],
        "nested": {"a": {"b": {3: [shared, shared]}}},
        "long list": list(range(3000)),
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
    }
    if protocol == 0:
        # other characters are written with escapes, which are refused
        theirs["texts"] = ["", "a", "é", "word"]
    content = pickle.dumps(theirs, protocol)
    ours = read(content, tmp_path, ORDERED_DICT)
    assert ours.end == len(content)
    assert plain(ours.value) == theirs
    assert list(as_dict(ours.value["ordered"])) == ["z", "a"]
    nested = ours.value["nested"]["a"]["b"][3]
    assert nested[0] is nested[1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_sets_and_bytes(protocol: int, tmp_path: Path) -> None:
    value = [b"short", b"x" * SHORT, bytearray(b"array") if protocol == 5 else b"", {1, 2}, frozenset({3})]
    if protocol < 4:
        value = value[:3]
    ours = read(pickle.dumps(value, protocol), tmp_path).value
    assert [sorted(item) if isinstance(item, list) else item for item in ours] == [
        sorted(item) if isinstance(item, (set, frozenset)) else item for item in value
    ]


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_long_strings_stay_in_the_file(protocol: int, tmp_path: Path) -> None:
    text, row = "é" * SHORT, b"\xff\x00" * SHORT
    value = {"text": text, "row": row if protocol >= 3 else 0, "last": 1}
    content = pickle.dumps(value, protocol)
    ours = read(content, tmp_path).value
    place = ours["text"]
    assert place == Stored(content.index(text.encode()), 2 * SHORT, text=True)
    if protocol >= 3:
        assert ours["row"] == Stored(content.index(row), 2 * SHORT, text=False)
    assert ours["last"] == 1


def test_payload_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"\x80\x04](")
        for _ in range(100):  # holes: no disk is used
            file.write(b"\x8e" + (1 << 30).to_bytes(8, "little"))
            file.seek(1 << 30, 1)
        file.write(b"e.")
    counted = []
    original = FileBytes.read
    monkeypatch.setattr(FileBytes, "read", lambda *args: counted.append(args[2]) or original(*args))
    with ExitStack() as stack:
        opened = FileBytes(path, stack)
        ours = read_pickle(opened, 0, opened.size, frozenset())
    assert [item.length for item in ours.value] == [1 << 30] * 100
    assert sum(counted) < 2 << 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_stay_words(protocol: int, tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return textwrap.dedent, ("a pickle was run",), {"state": 1}

    content = pickle.dumps({"a": Exploit()}, protocol)
    with pytest.raises(
        UnsafeFileError, match=r"asks for 'textwrap\.dedent', which no tensor needs"
    ) as caught:
        read(content, tmp_path)
    assert caught.value.requested == "textwrap.dedent"
    made = read(content, tmp_path, Global("textwrap", "dedent")).value["a"]
    assert isinstance(made, Call)
    assert (str(made.function), made.arguments, made.state) == (
        "textwrap.dedent",
        ("a pickle was run",),
        {"state": 1},
    )


def test_references(tmp_path: Path) -> None:
    content = b"\x80\x02(K\x01K\x02tQ."
    with pytest.raises(UnsafeFileError, match="refers to something outside"):
        read(content, tmp_path)
    ours = read(content, tmp_path, references=True)
    assert ours.value.id == (1, 2)
    assert ours.references == (ours.value,)


def test_the_rest_of_a_file_is_left_alone(tmp_path: Path) -> None:
    assert read(b"\x80\x02K\x05.and more", tmp_path).end == 5
    for length in range(5):
        with pytest.raises(BrokenFileError, match="ends in the middle"):
            read(b"\x80\x02K\x05."[:length], tmp_path)
