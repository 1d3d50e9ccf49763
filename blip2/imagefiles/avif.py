"""AVIF: its items are bounded, and what decoding takes beside the picture is read from its properties."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from blip2.imagefiles.cost import MAX_PARTS, Cost

MAX_ITEM_BYTES = 2**18  # of lists of items: libavif looks up each among all others

_CONTAINERS = {b"moov": 0, b"trak": 0, b"meta": 4, b"iprp": 0, b"ipco": 0}  # and bytes before their boxes
_ITEMS = (b"iinf", b"iloc", b"iref", b"ipma")


def check_avif(content: bytes) -> Cost:
    """What decoding an AVIF takes: frames of AV1 and the colors made of them.

    Raises:
        ValueError: far more boxes or items than a picture has.
    """
    pixels = items = codings = 0
    samples = 0.0  # bytes of a pixel, of its colors and its transparency
    for count, (kind, start, end) in enumerate(_boxes(content, 0, len(content))):
        items += end - start if kind in _ITEMS else 0
        if count == MAX_PARTS or items > MAX_ITEM_BYTES:
            raise ValueError("an AVIF of more items than pictures have")
        if kind == b"ispe" and end - start >= 12:
            width, height = struct.unpack_from(">LL", content, start + 4)
            pixels = max(pixels, width * height)
        elif kind == b"av1C" and end - start >= 4:
            flags, codings = content[start + 2], codings + 1
            halved = (flags >> 3 & 1) + (flags >> 2 & 1)
            samples += (1 + (flags >> 6 & 1)) * (1 if flags & 16 else 1 + 2 / 2**halved)
    return Cost(memory=int(pixels * (2 * samples + 4 * codings)))


def _boxes(content: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of a file, those within others too, as far as they are sound: kind, start and end of what they hold."""
    while place + 8 <= end:
        length, kind = struct.unpack_from(">L4s", content, place)
        start = place + 8
        if length == 1 and place + 16 <= end:
            (length,), start = struct.unpack_from(">Q", content, start), place + 16
        place = end if length == 0 else place + length
        if not start <= place <= end:
            return
        yield kind, start, place
        if kind in _CONTAINERS:
            yield from _boxes(content, start + _CONTAINERS[kind], place)
