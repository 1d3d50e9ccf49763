"""Image files before they are decoded: what costs too much is refused, what decides no pixel can be left out."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

MAX_PARTS = 100_000  # chunks of a PNG, segments of a JPEG
MAX_SCANS = 100  # of a progressive JPEG: encoders write 6 to 14, and each costs as much as the whole picture
MAX_SCANNED_PIXELS = 1_000_000_000  # scans x pixels

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_SEGMENT = re.compile(rb"\xff([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in a scan's data: no stuffed byte and no restart
_SOF, _SOS, _EOI = re.compile(rb"[\xc0-\xcf](?<![\xc4\xc8\xcc])"), b"\xda", b"\xd9"
_ALONE = re.compile(rb"[\x01\xd0-\xd9]")  # without a length


def check_file(content: bytes) -> None:
    """Refuse a PNG or JPEG whose decoding takes far more than a picture of its size needs.

    Raises:
        ValueError: the message says what is odd. Files that are damaged otherwise are left to the decoder.
    """
    if content.startswith(_PNG):
        list(_chunks(content))
    if not content.startswith(_JPEG):
        return
    scans = pixels = 0
    place, pattern = 2, _SEGMENT
    for _ in range(MAX_PARTS):
        marker = pattern.search(content, place)
        if marker is None or marker[1] == _EOI:
            return
        kind, place = marker[1], marker.end()
        if _SOF.match(kind):
            height, width = content[place + 3 : place + 5], content[place + 5 : place + 7]
            pixels = max(pixels, int.from_bytes(width, "big") * int.from_bytes(height, "big"))
        elif kind == _SOS:
            scans, pattern = scans + 1, _SCAN_END
            if scans > MAX_SCANS or (scans > 16 and scans * pixels > MAX_SCANNED_PIXELS):
                raise ValueError(f"a JPEG of {scans} scans or more, each of which costs as much as a picture")
        if not _ALONE.match(kind):
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    raise ValueError(f"a JPEG of more than {MAX_PARTS:,} segments")


def bare_file(content: bytes) -> bytes:
    """A PNG without what decides no pixel, such as text and color profiles; other files as they are.

    Decoders refuse a whole file for one of these that is broken. The EXIF orientation is kept.
    """
    kept, place = [content[:8]], 8
    for kind, start, place in _chunks(content) if content.startswith(_PNG) else ():
        sound = zlib.crc32(content[start + 4 : place - 4]).to_bytes(4, "big") == content[place - 4 : place]
        if kind == b"tRNS" or (kind == b"eXIf" and sound) or not kind[:1].islower():
            kept.append(content[start:place])
    return b"".join([*kept, content[place:]])


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
