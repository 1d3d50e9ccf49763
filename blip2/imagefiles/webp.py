"""WebP: its parts are counted, and what decides no pixel can be left out."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from blip2.imagefiles.cost import MAX_METADATA, MAX_PARTS, Cost
from blip2.imagefiles.tiff import exif_orientation

_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_KEPT_FLAGS = 0x12  # of VP8X: transparency and animation


def check_webp(content: bytes) -> Cost:
    """What decoding a WebP takes. Raises ValueError where it is far more than its picture needs."""
    beside = sum(end - start for kind, start, end in _chunks(content) if kind not in _PIXELS)
    return Cost(rewrite=beside > MAX_METADATA)


def bare_webp(content: bytes) -> tuple[bytes, int]:
    """A WebP without what decides no pixel, such as a color profile, and its EXIF orientation."""
    kept, orientation = [b"WEBP"], 1
    for kind, start, end in _chunks(content):
        if kind == b"EXIF":
            orientation = exif_orientation(content[start + 8 : end])
        elif kind == b"VP8X" and end > start + 8:
            flags = content[start + 8] & _KEPT_FLAGS
            kept.append(content[start : start + 8] + bytes([flags]) + content[start + 9 : end])
        elif kind in _PIXELS:
            kept.append(content[start:end])
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<L", len(body)) + body, orientation


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a WebP, as far as it is sound: kind, start and end."""
    place = 12 if content[8:12] == b"WEBP" else len(content)  # another RIFF file
    for _ in range(MAX_PARTS):
        if place + 8 > len(content):
            return
        kind, length = struct.unpack_from("<4sL", content, place)
        start, place = place, place + 8 + length + length % 2
        if place > len(content):
            return
        yield kind, start, place
    raise ValueError(f"a WebP of more than {MAX_PARTS:,} chunks")
