"""PNG: chunks are counted, and what decides no pixel can be left out."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from blip2.imagefiles.cost import MAX_PARTS, Cost
from blip2.imagefiles.tiff import exif_orientation

MAX_COMPRESSED = 100  # texts and profiles, each of which may expand to a MiB


def check_png(content: bytes) -> Cost:
    """What decoding a PNG takes. Raises ValueError where it is far more than its picture needs."""
    kinds = [kind for kind, _, _ in _chunks(content)]
    return Cost(rewrite=sum(kind in (b"iCCP", b"zTXt", b"iTXt") for kind in kinds) > MAX_COMPRESSED)


def bare_png(content: bytes) -> tuple[bytes, int]:
    """A PNG without what decides no pixel, such as text and color profiles, and its EXIF orientation."""
    kept, place, orientation = [content[:8]], 8, 1
    for kind, start, place in _chunks(content):
        data = content[start + 8 : place - 4]
        if kind == b"tRNS" or not kind[:1].islower():
            kept.append(content[start:place])
        elif kind == b"eXIf" and zlib.crc32(kind + data).to_bytes(4, "big") == content[place - 4 : place]:
            orientation = exif_orientation(data)
    return b"".join([*kept, content[place:]]), orientation


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG, as far as it is sound: kind, start and end."""
    place = 8
    for _ in range(MAX_PARTS):
        if place + 12 > len(content):
            return
        length, kind = struct.unpack_from(">I4s", content, place)
        start, place = place, place + 12 + length
        if place > len(content) or not kind.isalpha():
            return
        yield kind, start, place
    raise ValueError(f"a PNG of more than {MAX_PARTS:,} chunks")
