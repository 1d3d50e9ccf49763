"""BMP: run lengths, which Pillow decodes byte by byte and pixel by pixel, are rewritten as plain pixels."""

from __future__ import annotations

import re
import struct

import numpy as np

from blip2.imagefiles.cost import MAX_PIXELS, Cost

MAX_RUN_BYTES = 2**23  # of a file with run lengths

_HEADER = struct.Struct("<LllHHLLLLLL")  # a BITMAPINFOHEADER, with which all later headers begin
_RLE8, _RLE4 = 1, 2
_RUNS = re.compile(rb"(?:[^\0].)*+", re.DOTALL)
_HALVES = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))
_GREYS = b"".join(
    bytes((level, level, level, 0)) for level in range(256)
)  # Pillow's where a palette has no color


def check_bmp(content: bytes) -> Cost:
    """What decoding a BMP, or a DIB without its file header, takes. Raises ValueError where it is too much."""
    runs = _run_header(content) is not None
    if runs and len(content) > MAX_RUN_BYTES:
        raise ValueError(f"a BMP with {len(content):,} bytes of run lengths")
    return Cost(rewrite=runs)


def bare_bmp(content: bytes) -> tuple[bytes, int]:
    """A BMP without run lengths, with eight bits a pixel; one too large to be decoded as it is."""
    header = _run_header(content)
    if header is None:
        return content, 1
    size, width, height, _, bits, compression, _, dots_x, dots_y, colors, _ = header
    colors = colors or 1 << bits
    start = 14 if content.startswith(b"BM") else 0
    palette = content[start + size : start + size + 4 * colors]
    palette += _GREYS[len(palette) :]
    data = int.from_bytes(content[10:14], "little") if start else 0
    if data in (0, start + size):
        data = start + size + 4 * colors
    row = width + -width % 4
    if not 0 < row * abs(height) <= MAX_PIXELS:
        return content, 1
    pixels = _expand(content, data, width, width * abs(height), compression == _RLE4)
    if pixels is None:
        return content[:data], 1  # the decoder says that it is truncated
    before = 14 + _HEADER.size + len(palette)
    parts = [
        struct.pack("<2sLLL", b"BM", before, 0, before),
        _HEADER.pack(_HEADER.size, width, height, 1, 8, 0, 0, dots_x, dots_y, 256, 0),
        palette,
    ]
    if row > width:
        rows = np.zeros((abs(height), row), np.uint8)
        rows[:, :width] = np.frombuffer(pixels, np.uint8).reshape(-1, width)
        return b"".join([*parts, rows.data]), 1
    return b"".join([*parts, pixels]), 1


def _run_header(content: bytes) -> tuple[int, ...] | None:
    """The header of a BMP with run lengths, None for other files."""
    start = 14 if content.startswith(b"BM") else 0
    if len(content) < start + _HEADER.size:
        return None
    header = _HEADER.unpack_from(content, start)
    known = header[0] in (40, 52, 56, 64, 108, 124) and header[4] in (4, 8) and header[9] <= 256
    return header if known and header[5] in (_RLE8, _RLE4) else None


def _expand(content: bytes, place: int, width: int, count: int, four_bits: bool) -> bytes | bytearray | None:
    """The pixels that run lengths from `place` on stand for, a byte each; None where they are too few.

    What a run has beyond the end of its row is dropped, and skipped pixels are 0, as Pillow has it.
    """
    pixels, at, x = bytearray(count), 0, 0
    last = len(content) - 1
    while at < count and place < last:
        number, value = content[place], content[place + 1]
        place += 2
        if number:  # a run
            number = min(number, width - x)
            if number <= 0:
                place = _RUNS.match(content, place).end()  # type: ignore[union-attr]
            else:
                run = bytes((value >> 4, value & 15)) if four_bits else content[place - 1 : place]
                pixels[at : at + number] = (run * number)[:number]
                at, x = at + number, x + number
        elif value == 0:  # the end of a row
            at, x = at + -at % width, 0
        elif value == 1:  # the end of the image
            break
        elif value == 2:  # pixels are skipped
            if place >= last:
                break
            at = min(count, at + content[place] + content[place + 1] * width)
            place, x = place + 2, at % width
        else:  # pixels as they are, padded to an even place
            size = (value + 1) // 2 if four_bits else value
            some = content[place : place + size]
            some = some.hex().encode().translate(_HALVES)[:value] if four_bits else some
            pixels[at : at + len(some)] = some
            at, x, place = at + len(some), x + value, place + size + (place + size) % 2
    del pixels[count:]
    return pixels if at >= count else None
