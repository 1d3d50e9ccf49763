"""Costly files are refused at once, sound pixels are read whatever is beside them, and only pictures are listed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from blip2.bulk.sources import Inputs
from blip2.data.sources import read_samples
from blip2.imagefiles.names import HAS_HEIF
from blip2.images import SUFFIXES, ImageError, load_image

EXIF = Image.Exif()
EXIF[0x0112] = 6


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (47, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"", wrong: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def tiff(tags: dict[int, int | list[int]], data: bytes = b"", order: str = "<", big: bool = False) -> bytes:
    """A TIFF file: data at 8 (16 if `big`), then one directory; integers are LONG, lists of them beside it."""
    word, head = ("Q", 16) if big else ("L", 8)
    entries, beside = b"", b""
    at = head + len(data) + (8 if big else 2) + len(tags) * (20 if big else 12) + struct.calcsize(f"={word}")
    for number, value in sorted(tags.items()):
        count = len(value) if isinstance(value, list) else 1
        values = struct.pack(f"{order}{count}L", *(value if isinstance(value, list) else [value]))
        if len(values) > struct.calcsize(f"={word}"):
            values, beside = struct.pack(order + word, at + len(beside)), beside + values
        entries += struct.pack(f"{order}HH{word}{8 if big else 4}s", number, 4, count, values)
    name = b"II" if order == "<" else b"MM"
    start = struct.pack(
        f"{order}2sHHHQ" if big else f"{order}2sHL",
        *([name, 43, 8, 0] if big else [name, 42]),
        head + len(data),
    )
    return (
        start
        + data
        + struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
        + entries
        + bytes(8 if big else 4)
        + beside
    )


def grey_tiff(data: bytes = zlib.compress(bytes(100)), **more: object) -> bytes:
    """10x10 px in one strip; `t322=...` sets tag 322."""
    order, big = more.pop("order", "<"), more.pop("big", False)
    strip = {273: 16 if big else 8, 278: 10, 279: len(data)}
    own = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1} | strip
    return tiff(own | {int(name[1:]): value for name, value in more.items()}, data, order, big)  # type: ignore[misc, arg-type]


def bmp_runs(width: int, height: int, runs: bytes, bits: int = 8) -> bytes:
    palette = b"".join(bytes((7 * i % 256, 13 * i % 256, i, 0)) for i in range(1 << bits))
    header = struct.pack(
        "<LllHHLLllLL", 40, width, height, 1, bits, 1 if bits == 8 else 2, len(runs), 0, 0, 0, 0
    )
    return b"BM" + struct.pack("<LLL", 0, 0, 54 + len(palette)) + header + palette + runs


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", 8 + len(data)) + kind + data


def avif_items(count: int, properties: int = 0) -> bytes:
    """An AVIF's file type and metadata: so many items, of which libavif compares each with all others."""
    items = b"".join(
        box(b"infe", b"\3\0\0\0" + struct.pack(">L6s2s", i, b"\0\0av01", b"")) for i in range(count)
    )
    parts = box(b"iinf", b"\1\0\0\0" + struct.pack(">L", count) + items)
    parts += box(b"iprp", box(b"ipco", box(b"free", b"") * properties))
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4) + parts)


def jpeg_segment(kind: int, data: bytes) -> bytes:
    return bytes((0xFF, kind)) + struct.pack(">H", len(data) + 2) + data


def jpeg_strips(side: int, scans: int, strips: int) -> bytes:
    """A TIFF whose strips are all the same progressive JPEG."""
    data = flat("RGB", "JPEG", side, side, progressive=True, subsampling=0)
    last = data.rindex(b"\xff\xda")
    data = data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + b"\xff\xd9"
    own = {256: side, 257: side * strips, 258: [8, 8, 8], 259: 7, 262: 6, 277: 3, 278: side}
    return tiff(own | {273: [8] * strips, 279: [len(data)] * strips}, data)


def flat(mode: str, kind: str, width: int, height: int, **options: object) -> bytes:
    Image.new(mode, (width, height)).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


PNG, JPEG, GIF = encoded("PNG"), encoded("JPEG"), encoded("GIF", "P")
SCAN = bytes.fromhex("ffda0008010100013f1000000000")
TABLES = jpeg_segment(0xDB, (b"\0" + b"\1" * 64) * 1_000)


@pytest.mark.parametrize(
    ("content", "message"),
    {
        "segments": (JPEG[:20] + b"\xff\xe5\0\x02" * 500_000 + JPEG[20:], "JPEG of more than 100,000 segments"),
        "scans": (encoded("JPEG", progressive=True)[:-2] + SCAN * 4_000, "JPEG of 101 scans"),
        "large scans": (JPEG[:-2].replace(b"\0\x2f\0\x3d", b"\x20\0\x20\0") + SCAN * 20, "JPEG of 17 scans"),
        "tables": (JPEG[:20] + TABLES * 100 + JPEG[20:], "JPEG with 6,500,334 bytes of tables"),
        "chunks": (PNG[:33] + chunk(b"tEXt") * 150_000 + PNG[33:], "PNG of more than 100,000 chunks"),
        "blocks": (GIF[:781] + b"!\xfe" + b"\1a" * 600_000 + b"\0" + GIF[781:], "GIF of more than 500,000 blocks"),
        "extensions": (GIF[:781] + b"!\xff\1a\0" * 600_000 + GIF[781:], "GIF of more than 500,000 blocks"),
        "tiles": (grey_tiff(t322=25_000, t323=25_000, t324=8, t325=9), "TIFF of 10x10 px in tiles of 25000x25000 px"),
        "wide tiles": (grey_tiff(t322=2**31, t323=16, t324=8, t325=9), "TIFF of 10x10 px in tiles"),
        "signed tiles": (grey_tiff(t322=9_000, t323=9_000).replace(b"\x42\1\4\0", b"\x42\1\x09\0"), "TIFF of 10x10"),
        "big-endian tiles": (grey_tiff(order=">", t322=9_000, t323=9_000), "TIFF of 10x10 px in tiles"),
        "strips": (grey_tiff(t257=200_000, t278=1, t273=[8] * 200_000), "TIFF with 200,000 values of tag 273"),
        "strip sizes": (grey_tiff(t279=[9] * 300_000), "TIFF with 300,000 values of tag 279"),
        "samples": (grey_tiff(t258=[8] * 101_000), "TIFF with 101,000 values of tag 258"),
        "tags": (tiff(dict.fromkeys(range(1_000, 3_000), 1)), "TIFF of more than 1,000 tags"),
        "overlap": (grey_tiff(t278=1, t273=[8] * 10, t279=[2**20] * 10), "TIFF whose parts are .* larger than"),
        "run lengths": (bmp_runs(4_000, 4_000, b"\1\7" * 5_000_000), "BMP with 10,001,078 bytes of run lengths"),
        "comments": (b"P3\n9 9\n255\n" + b"#\n" * 500_000, "PNM of more than 100,000 comments"),
        "words": (b"P2\n9 9\n255\n" + b"one " * 81, "PNM with something else than numbers"),
        "too bright": (b"P2\n9 9\n25\n" + b"26 " * 81, "PNM whose pixels are not from 0 to 25"),
        "own kinds": (b"PyRGBA\n900 900\n3\n" + bytes(3_240_000), "PNM of a kind other than P1 to P6"),
        "items": (avif_items(12_000), "AVIF of more items than pictures have"),
        "properties": (avif_items(0, 150_000), "AVIF of more items than pictures have"),
        "components": (JPEG[:20] + jpeg_segment(0xC0, b"\x08\0\x10\0\x10\3" + b"\1\x11\0" * 21_000) * 300 + JPEG[20:],
            "JPEG with a frame header of 63,008 bytes"),
        "scans of strips": (jpeg_strips(400, 60, 120), "TIFF with 7,200 scans of JPEG"),
        "chunks of WebP": (b"RIFF\0\0\0\0WEBP" + b"ICCP\0\0\0\0" * 150_000, "WebP of more than 100,000 chunks"),
    }.values(),
)  # fmt: skip
def test_costly_files_are_refused(content: bytes, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(ImageError, match=rf"bytes: an? {message}.* is not decoded; save the image anew"):
        load_image(content)
    assert time.process_time() - begun < 2


def test_large_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "film.jpg").touch()
    os.truncate(tmp_path / "film.jpg", 600 << 20)
    with pytest.raises(ImageError, match=r"film.jpg: the file is larger than 512 MiB"):
        load_image(tmp_path / "film.jpg")


PROFILE = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**20)))


def exif_segments() -> bytes:
    """Pillow joins them, one after the other."""
    return jpeg_segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 50 + jpeg_segment(0xE1, b"Exif\0\0a") * 50_000


@pytest.mark.parametrize(
    ("content", "other"),
    {
        "fill bytes": (JPEG[:20] + b"\xff" * 5_000_000 + JPEG[20:], JPEG),
        "junk": (JPEG[:20] + bytes(5_000_000) + JPEG[20:], JPEG),
        "Exif": (JPEG[:20] + exif_segments() + JPEG[20:], JPEG),
        "Photoshop": (
            JPEG[:20] + jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4" + bytes(6)) * 90_000 + JPEG[20:],
            JPEG,
        ),
        "profiles": (PNG[:33] + PROFILE * 4_000 + PNG[33:], PNG),
        "profiles behind": (PNG[:-12] + PROFILE * 4_000 + PNG[-12:], PNG),
        "comment": (GIF[:781] + b"!\xfe" + b"\1a" * 300_000 + b"\0" + GIF[781:], GIF),
        "tags": (
            grey_tiff(**{f"t{number}": [0] * 400_000 for number in range(40_000, 40_005)}),
            grey_tiff(),
        ),
    }.values(),
)  # fmt: skip
def test_what_costs_too_much_beside_the_pixels_is_left_out(content: bytes, other: bytes) -> None:
    begun = time.process_time()
    assert load_image(content).tobytes() == load_image(other).tobytes()
    assert time.process_time() - begun < 3


# --- what is beside the pixels, and broken ------------------------------------------------------------------------


def turned(kind: str, mode: str = "RGB", **options: object) -> bytes:
    return encoded(kind, mode, exif=EXIF, **options)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_what_is_beside_the_pixels_of_a_png_does_not_lose_them(mode: str) -> None:
    content = turned("PNG", mode)
    for extra in (
        chunk(b"tEXt", b"a\0" + b"x" * 80_000_000),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10_000_000)), wrong=1),
        chunk(b"zTXt", b"q\0\0" + zlib.compress(bytes(10_000_000))),
        *(chunk(kind, b"12", wrong=1) for kind in (b"pHYs", b"eXIf", b"tEXt")),
        *(chunk(kind, b"1") for kind in (b"gAMA", b"cHRM", b"sRGB", b"tIME", b"acTL", b"fcTL")),
    ):
        loaded = load_image(content[:33] + extra + content[33:])
        assert (loaded.size, loaded.tobytes()) == ((47, 61), load_image(content).tobytes())  # turned by EXIF


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_is_beside_the_pixels_of_a_jpeg_does_not_lose_them(mode: str) -> None:
    content = turned("JPEG", mode)
    for kind, data in (
        (0xE0, b"JFIF"),
        (0xEE, b"Adobe"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\4\4\xff"),
        (0xE1, b"Exif\0\0II*\0\xff\xff"),
        (0xFE, b""),
    ):
        at = content.index(b"\xff\xdb")
        loaded = load_image(content[:at] + jpeg_segment(kind, data) + content[at:])
        assert (loaded.size, loaded.tobytes()) == ((47, 61), load_image(content).tobytes()), data


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_what_is_beside_the_pixels_of_other_files_does_not_lose_them() -> None:
    webp = turned("WEBP", icc_profile=bytes(100), xmp=b"<x/>")
    assert load_image(webp[:-3]).tobytes() == load_image(webp).tobytes()  # its last chunk is XMP
    gif = GIF[:781] + b"!\xfe\3abc\0!\xff\x0bNETSCAPE2.0\3\1\0\0\0!\x01\1a\0" + GIF[781:]
    assert load_image(gif).tobytes() == load_image(GIF).tobytes()
    for kind, size in ((34_675, 2**31), (700, 2**30), (34_665, 7)):  # a profile, XMP, Exif
        assert (
            load_image(grey_tiff(**{f"t{kind}": [size] * 2})).tobytes() == load_image(grey_tiff()).tobytes()
        )


def test_big_endian_bigtiff() -> None:
    """Pillow takes it for a classic TIFF."""
    data = zlib.compress(bytes(range(100)))
    expected = bytes(value for value in range(100) for _ in range(3))
    for order in "<>":
        for big in (False, True):
            assert load_image(grey_tiff(data, order=order, big=big)).tobytes() == expected


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"progressive": True}, {"quality": 100}, {"restart_marker_rows": 1}),
        *({"restart_marker_blocks": 7}, {"restart_marker_blocks": 1}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_is_read_and_a_truncated_one_refused(
    mode: str, options: dict[str, object]
) -> None:
    content = turned("JPEG", mode, **options)
    for cut in (1, 2):
        loaded = load_image(content[:-cut])
        assert (loaded.size, loaded.tobytes()) == ((47, 61), load_image(content).tobytes())
    assert load_image(content + b"garbage").tobytes() == load_image(content).tobytes()
    scan = content.rindex(b"\xff\xda")
    for end in (*range(len(content) - 40, len(content) - 20), (scan + len(content)) // 2, scan, scan - 1):
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            load_image(content[:end])


@pytest.mark.parametrize(
    "content",
    [
        *(JPEG, PNG, GIF, encoded("GIF", "P", transparency=1), turned("WEBP", "RGBA"), encoded("TIFF")),
        *(grey_tiff(big=True), b"P2 9 9 999\n" + b"789 " * 81, bmp_runs(9, 9, b"\3\5\0\6abcdef\0\0" * 9)),
        *(b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0", b"GIF89a" + bytes(7) + b"!\xf9\4", avif_items(3, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_file_that_ends_anywhere_is_read_or_refused(content: bytes) -> None:
    for end in range(1, min(len(content), 900) + 1):
        with contextlib.suppress(ImageError):
            load_image(content[:end])


def test_a_webp_of_many_frames_is_refused_soon() -> None:
    frames = b"ANMF\xbe\0\0\0" + bytes(190)
    begun = time.process_time()
    with pytest.raises(ImageError, match="its header cannot be read"):
        load_image(b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\2" + bytes(9) + frames * 99_000)
    assert time.process_time() - begun < 2


# --- the same pixels where a file is rewritten ---------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 9, 100, 255, 256, 1_000, 65_535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_pnm_values_are_scaled_as_pillow_scales_them(kind: str, top: int) -> None:
    shape = (5, 7) if kind in ("P2", "P5") else (5, 7, 3)
    values = np.random.default_rng(top).integers(0, top + 1, shape)
    head = f"{kind} # one\n#two\r7\t5\n{top}\n".encode()
    plain = b"\n".join(b"%d #three" % value for value in values.ravel())
    content = head + (
        plain if kind in ("P2", "P3") else values.astype(">u2" if top > 255 else "u1").tobytes()
    )
    with Image.open(
        io.BytesIO(head + b" ".join(b"%d" % v for v in values.ravel()) if kind < "P4" else content)
    ) as image:
        assert load_image(content).tobytes() == load_image(image).tobytes()
    for part in (0.2, 0.8):
        with pytest.raises(ImageError):
            load_image(content[: int(len(content) * part)])


def test_plain_pbm() -> None:
    for data in (b"011 0", b"0 1 1 0", b"0110 # end", b"01\n10\n"):
        loaded = load_image(b"P1\n2 2\n" + data)
        assert np.asarray(loaded)[..., 0].tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize(
    ("bits", "runs", "rows"),
    [
        (8, b"\3\x05\1\x06\0\0\0\4abcd\0\1", ["abcd", "\5\5\5\6"]),
        (8, b"\xff\x05\0\0\xff\x06\0\1", ["\6\6\6\6", "\5\5\5\5"]),  # longer than a row
        (8, b"\1\x05\0\2\2\1\1\x06", ["\0\0\0\6", "\5\0\0\0"]),  # skipped
        (4, b"\4\x12\0\0\0\4\x34\x56\0\1", ["\3\4\5\6", "\1\2\1\2"]),
        (4, b"\1\x10\0\3\x23\x40\0\0\4\x99\0\1", ["\t\t\t\t", "\1\2\3\4"]),
    ],
)
def test_bmp_with_run_lengths(bits: int, runs: bytes, rows: list[str]) -> None:
    content = bmp_runs(4, 2, runs, bits)
    expected = [[[value, 13 * value % 256, 7 * value % 256] for value in map(ord, row)] for row in rows]
    assert np.asarray(load_image(content)).tolist() == expected
    assert load_image(content[14:]).tobytes() == load_image(content).tobytes()  # a DIB
    with Image.open(io.BytesIO(content)) as image:
        assert load_image(image).tobytes() == load_image(content).tobytes()
    with pytest.raises(ImageError, match="truncated"):
        load_image(bmp_runs(4, 2, runs[:2], bits))


# --- limits ---------------------------------------------------------------------------------------------------------


def peak_mb(content: bytes, folder: Path) -> tuple[float, str]:
    """Memory that decoding takes, in a new process, and what came of it."""
    (folder / "image").write_bytes(content)
    script = (
        "import sys; from PIL import Image; Image.init(); from blip2.imagefiles.decode import *\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1000\n"
        "load_image(b'P5 1 1 255 a'); before = peak()\n"
        "try: result = str(load_image(sys.argv[1]).size)\n"
        "except ImageError as error: result = str(error)\n"
        "print(peak() - before, result)"
    )
    command = [sys.executable, "-c", script, str(folder / "image")]
    mb, result = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(" ", 1)
    )
    return float(mb), result


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel tells no peak of memory here")
@pytest.mark.parametrize(
    ("mode", "kind", "options", "expected"),
    [
        ("RGB", "JPEG", {}, "(9000, 9000)"),
        ("RGB", "JPEG", {"exif": EXIF}, "(4500, 4500)"),
        ("RGB", "JPEG", {"progressive": True}, "(4500, 4500)"),
        ("P", "GIF", {"transparency": 0, "disposal": 2}, "(9000, 9000)"),
        ("RGBA", "PNG", {}, "618 MiB of memory, the limit is 480"),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}, "(9000, 9000)"),
        ("1", "TIFF", {"compression": "group4"}, "(9000, 9000)"),
        ("RGB", "WEBP", {"lossless": True, "method": 0}, "1,236 MiB of memory, the limit is 480"),
    ],
)
def test_memory_is_bounded(
    mode: str, kind: str, options: dict[str, object], expected: str, tmp_path: Path
) -> None:
    mb, result = peak_mb(flat(mode, kind, 9_000, 9_000, **options), tmp_path)
    assert expected in result
    assert mb < 512


def png_of(width: int, height: int, color: int, bits: int = 8) -> bytes:
    """A black PNG that is to be turned, of any size."""
    size = (1 + (width * bits * {0: 1, 4: 2, 6: 4}[color] + 7) // 8) * height
    packer = zlib.compressobj(1)
    data = [packer.compress(bytes(min(2**24, size - at))) for at in range(0, size, 2**24)]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    pixels = b"".join(data) + packer.flush()
    chunks = ((b"IHDR", header), (b"eXIf", EXIF.tobytes()[6:]), (b"IDAT", pixels), (b"IEND", b""))
    return PNG[:8] + b"".join(chunk(kind, content) for kind, content in chunks)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel tells no peak of memory here")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: png_of(7_900, 7_900, 6), "(7900, 7900)"),
        (lambda: png_of(8_900, 8_900, 0, 16), "(8900, 8900)"),
        (lambda: png_of(1, 80_000_000, 0, 1), "decoded in 1,831 MiB of memory"),
        (lambda: png_of(80_000_000, 1, 0, 1), "decoded in 1,831 MiB of memory"),
        (lambda: grey_tiff(zlib.compress(bytes(10**6)), t256=1, t257=5 * 10**7, t278=10**6), "MiB of memory"),
        (lambda: bmp_runs(1, 80_000_000, b"\0\2\0\xff" * 320_000), "decoded in 1,831 MiB of memory"),
        (lambda: bmp_runs(5, 6_000_000, b"\0\2\0\xff" * 24_000), "(5, 6000000)"),
    ],
)  # fmt: skip
def test_memory_of_turned_and_narrow_images_is_bounded(
    make: Callable[[], bytes], expected: str, tmp_path: Path
) -> None:
    mb, result = peak_mb(make(), tmp_path)
    assert expected in result
    assert mb < 512


def test_a_row_of_a_fax_needs_memory() -> None:
    content = grey_tiff(bytes(999), t256=88_000_000, t257=1, t258=1, t259=4, t278=1)
    with pytest.raises(
        ImageError, match=r"88000000x1 px is .* decoded in 1,510 MiB of memory, the limit is 480"
    ):
        load_image(content)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_beyond_the_limit_is_decoded_at_reduced_scale(progressive: bool) -> None:
    small = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    whole = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
    whole.save(file := io.BytesIO(), "JPEG", quality=95, progressive=progressive, exif=EXIF)
    content = file.getvalue()
    assert load_image(content, max_pixels=120_000).size == (300, 400)
    expected = np.asarray(load_image(content)).astype(int)
    for limit, size in ((119_999, (150, 200)), (30_000, (150, 200)), (29_999, (75, 100)), (7_499, (38, 50))):
        loaded = load_image(content, max_pixels=limit)
        assert loaded.size == size
        assert np.abs(np.asarray(loaded.resize((300, 400))) - expected).mean() < 4
    with pytest.raises(ImageError, match="400x300 px is 120,000 pixels, the limit is 1,000"):
        load_image(content, max_pixels=1_000)
    with Image.open(io.BytesIO(content)) as image, pytest.raises(ImageError, match="the limit is 100,000"):
        load_image(image, max_pixels=100_000)  # the caller's image stays as it is


def test_jpegs_of_phones() -> None:
    assert load_image(flat("L", "JPEG", 12_000, 9_000)).size == (6_000, 4_500)
    assert load_image(flat("L", "JPEG", 16_320, 12_240)).size == (8_160, 6_120)
    for progressive, size, says in ((False, 20_000, "any JPEG"), (True, 15_000, "a progressive JPEG")):
        content = flat("RGB", "JPEG", 64, 64, progressive=progressive, subsampling=0)
        old, new = struct.pack(">HH", 64, 64), struct.pack(">HH", size, size)
        with pytest.raises(ImageError, match=f"is more than can be decoded of {says}, at reduced scale too"):
            load_image(content.replace(b"\0\x11\x08" + old, b"\0\x11\x08" + new))


@pytest.mark.parametrize("value", [0, -1, 178_956_971, 1e6, "1000", True, None])
def test_limits_of_pixels_that_are_none(value: object) -> None:
    with pytest.raises(ImageError, match=r"max_pixels is .*, expected a whole number from 1 to 178,956,970"):
        load_image(PNG, max_pixels=value)  # type: ignore[arg-type]


def test_heic_is_read_where_its_plug_in_is_installed() -> None:
    """Without it the error says what the file is."""
    if not HAS_HEIF:
        assert ".heic" not in SUFFIXES
        with pytest.raises(ImageError, match=r"this is HEIC, which is read where pillow-heif is installed"):
            load_image(box(b"ftyp", b"heic\0\0\0\0mif1heic") + bytes(100))
        return
    plugin = pytest.importorskip("pillow_heif.as_plugin")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    picture = picture.resize((120, 80), Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.encoderinfo = {"quality": 95, "exif": exif.tobytes()}  # type: ignore[attr-defined]
        plugin._save_heif(picture, file := io.BytesIO(), "")
        picture.save(other := io.BytesIO(), "PNG", exif=exif)
        loaded, expected = load_image(file.getvalue()), load_image(other.getvalue())
        assert loaded.size == expected.size
        assert np.abs(np.asarray(loaded).astype(int) - np.asarray(expected)).mean() < 4
        with pytest.raises(ImageError, match="is 9,600 pixels, the limit is 9,599"):
            load_image(file.getvalue(), max_pixels=9_599)
    assert "HEIF" not in Image.OPEN
    assert {".heic", ".heif", ".hif"} < SUFFIXES


def test_mutated_files_of_odd_kinds_are_read_or_refused() -> None:
    rng = random.Random(1)
    originals = [
        *(turned("JPEG", mode, progressive=True) for mode in ("L", "RGB", "CMYK")),
        *(turned("PNG", mode) for mode in ("1", "P", "LA", "RGBA")),
        *(encoded("TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "packbits", "tiff_deflate")),
        *(turned("TIFF", big_tiff=True), encoded("TIFF", "1", compression="group4"), grey_tiff(order=">", big=True)),
        *(encoded("GIF", "P", transparency=1, comment=b"c" * 600), turned("WEBP", "RGBA"), turned("MPO")),
        *(b"P1 9 9\n" + b"01 " * 41, b"P2 9 9 999\n" + b"789 " * 81, b"P6 9 9 99\n" + bytes(range(243))),
        *(bmp_runs(9, 9, b"\3\5\0\6abcdef\0\0" * 9), bmp_runs(9, 9, b"\x09\x35\0\0" * 9, 4)),
        *([encoded("AVIF", "RGBA")] if features.check("avif") else []),
    ]  # fmt: skip
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(5_000):
            content = bytearray(originals[number % len(originals)])
            for _ in range(rng.choice((1, 2, 8))):
                at = rng.randrange(len(content) if rng.random() < 0.5 else min(300, len(content)))
                content[at : at + rng.choice((0, 1, 1, 4))] = rng.choice(
                    (
                        bytes([rng.randrange(256)]),
                        b"\xff\xff\xff\xff",
                        b"\0\0\0\1",
                        content[at : at + 40] * rng.randrange(9),
                    )
                )
            begun = time.process_time()
            try:
                read += load_image(bytes(content), max_pixels=1_000_000).mode == "RGB"
            except ImageError as error:
                assert not any(part in str(error) for part in ("\n", "PIL", "b'"))
            assert time.process_time() - begun < 5
    assert 300 < read < 4_700


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
