"""Reading Qt's resource files, on small ones made by hand."""

from __future__ import annotations

import struct
import zlib

import pytest

from default_model.qtresources import FOLDER, ZLIB, ZSTD, read_resource

TEXT = b"pixels " * 20


def resource_file(files: list[tuple[str, int, bytes]], version: int) -> bytes:
    """A root folder that holds one folder "a", which holds the files: name, flags, stored bytes."""
    names, data = b"", b""

    def name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    def entry(at: int, flags: int, first: int, second: int) -> bytes:
        return struct.pack(">IHII", at, flags, first, second) + bytes(8 if version > 1 else 0)

    tree = entry(0, FOLDER, 1, 1) + entry(name("a"), FOLDER, len(files), 2)
    for text, flags, stored in files:
        tree += struct.pack(">IHHHI", name(text), flags, 0, 0, len(data)) + bytes(8 if version > 1 else 0)
        data += struct.pack(">I", len(stored)) + stored
    header = 20
    offsets = (header, header + len(tree), header + len(tree) + len(data))
    return b"qres" + struct.pack(">4I", version, *offsets) + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_are_found_by_path_and_unpacked(version: int) -> None:
    packed = struct.pack(">I", len(TEXT)) + zlib.compress(TEXT)
    content = resource_file([("ä.txt", 0, b"plain"), ("z.webp", ZLIB, packed), ("empty", 0, b"")], version)
    assert read_resource(content, "/a/ä.txt") == b"plain"
    assert read_resource(content, "a/z.webp") == TEXT
    assert read_resource(content, "/a/empty") == b""


def test_zstd_is_unpacked() -> None:
    zstandard = pytest.importorskip("zstandard")
    content = resource_file([("z", ZSTD, zstandard.ZstdCompressor().compress(TEXT))], version=3)
    assert read_resource(content, "/a/z") == TEXT


@pytest.mark.parametrize("path", ["/b", "/a/b", "/a/x/b", "/a"])
def test_a_path_without_a_file_is_named(path: str) -> None:
    content = resource_file([("x", 0, b"1")], version=2)
    with pytest.raises(FileNotFoundError, match=path):
        read_resource(content, path)


def test_other_files_and_damaged_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="PNG"):
        read_resource(b"\x89PNG" + bytes(40), "/a")
    content = resource_file([("x", 0, b"1")], version=2)
    with pytest.raises(ValueError, match="cut off at 30 bytes"):
        read_resource(content[:30], "/a/x")
