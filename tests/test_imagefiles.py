"""Costly files are refused at once, sound pixels are read whatever is beside them, and only pictures are listed."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.bulk.sources import Inputs
from blip2.data.sources import read_samples
from blip2.images import SUFFIXES, ImageError, load_image

EXIF = Image.Exif()
EXIF[0x0112] = 6


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"", wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def test_costly_files_are_refused(tmp_path: Path) -> None:
    png, jpeg, scan = encoded("PNG"), encoded("JPEG"), bytes.fromhex("ffda0008010100013f1000000000")
    for message, content in {
        "JPEG of more than 100,000 segments": jpeg[:20] + b"\xff\xe5\0\x02" * 500_000 + jpeg[20:],
        "JPEG of 101 scans": encoded("JPEG", progressive=True)[:-2] + scan * 4_000,
        "JPEG of 17 scans": jpeg[:-2].replace(b"\0\x2f\0\x3d", b"\x20\0\x20\0") + scan * 20,
        "PNG of more than 100,000 chunks": png[:33] + chunk(b"tEXt") * 150_000 + png[33:],
    }.items():
        with pytest.raises(ImageError, match=rf"bytes: a {message}.* is not decoded; save the image anew"):
            load_image(content)
    (tmp_path / "film.jpg").touch()
    os.truncate(tmp_path / "film.jpg", 600 << 20)
    with pytest.raises(ImageError, match=r"film.jpg: the file is larger than 512 MiB"):
        load_image(tmp_path / "film.jpg")


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_what_is_beside_the_pixels_of_a_png_does_not_lose_them(mode: str) -> None:
    content = encoded("PNG", mode, exif=EXIF)
    for extra in (
        chunk(b"tEXt", b"a\0" + b"x" * 80_000_000),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10_000_000)), wrong=1),
        chunk(b"zTXt", b"q\0\0" + zlib.compress(bytes(10_000_000))),
        *(chunk(kind, b"12", wrong=1) for kind in (b"pHYs", b"eXIf", b"tEXt")),
    ):
        loaded = load_image(content[:33] + extra + content[33:])
        assert (loaded.size, loaded.tobytes()) == ((47, 61), load_image(content).tobytes())  # turned by EXIF


def test_integers_of_32_bits_are_refused() -> None:
    with pytest.raises(ImageError, match=r"'I' are not supported; .* from -1 to 65536 have"):
        load_image(Image.fromarray(np.array([[-1, 65_536]], np.int32)))
    assert load_image(Image.fromarray(np.array([[65_535]], np.int32))).getpixel((0, 0)) == (255, 255, 255)


def test_only_the_users_pictures_are_listed(tmp_path: Path) -> None:
    assert {".jfif", ".jpe", ".jif", ".dib", ".pnm", ".apng", ".mpo", ".avifs"} < SUFFIXES
    top, outside, tar = tmp_path / "top", tmp_path / "outside", str(tmp_path / "all.tar")
    wanted = ["a.JFIF", "b/c.mpo", "b/d..e/f.pnm", "g h/i.dib"]
    others = ("._a.jpg", ".Trash-1/a.jpg", "b/@eaDir/a.jpg/b.jpg", "__MACOSX/a.png", "#recycle/a.gif")
    for path in (*(top / name for name in (*wanted, *others)), outside / "deep" / "z.jpe"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text("a rose")
    with tarfile.open(tar, "w") as archive:
        archive.add(top, ".")
    assert sorted(sample.id for sample in read_samples(top)) == wanted
    assert sorted(item.name.partition("all.tar/./")[2] for item in Inputs(sources=[tar])) == wanted

    for name, target in (("b/up", top), ("a link", outside), ("other", outside / "deep"), ("b2", top / "b")):
        os.symlink(target, top / name)
    os.symlink(top, outside / "back")
    names = sorted(os.path.relpath(item.name, top) for item in Inputs(sources=[str(top)]))
    assert names == ["a link/deep/z.jpe", *wanted]
