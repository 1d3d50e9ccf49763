"""JPEG: segments and scans are counted, what is beside the pixels can be left out, a lost end marker is mended."""

from __future__ import annotations

import re
from collections.abc import Iterator

from blip2.imagefiles.cost import MAX_METADATA, MAX_PARTS, MAX_SCANNED_PIXELS, Cost
from blip2.imagefiles.tiff import exif_orientation

MAX_SCANS = 100  # of a progressive JPEG: encoders write 6 to 14, and each costs as much as the whole picture

_SEGMENT = re.compile(rb"\xff([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in a scan's data: no stuffed byte and no restart
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES, _SCAN, _END, _APP, _COMMENT = 0xDB, 0xDA, 0xD9, range(0xE0, 0xF0), 0xFE
_ALONE = frozenset((0x01, *range(0xD0, 0xDA)))  # without a length
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)

Segment = tuple[int, int, int, int]  # marker, where it begins, its parameters, what follows it


def check_jpeg(content: bytes) -> Cost:
    """What decoding a JPEG takes. Raises ValueError where it is far more than its picture needs."""
    scans = pixels = memory = 0
    progressive = ends = False
    wanted, seen = set[tuple[int, int]](), set[tuple[int, int]]()  # components and their coefficients
    for kind, _, start, end in _segments(content):
        ends |= kind == _END
        if kind not in _FRAMES and kind != _SCAN:
            continue
        data = content[start:end]
        if kind == _SCAN:
            scans += 1
            if scans > MAX_SCANS or (scans > 16 and scans * pixels > MAX_SCANNED_PIXELS):
                raise ValueError(f"a JPEG of {scans} scans or more, each of which costs as much as a picture")
            if 6 <= len(data) <= 14 and data[-1] & 15 == 0:  # to the last bit
                seen |= {(part, k) for part in data[3:-3:2] for k in range(data[-3], min(data[-2], 63) + 1)}
        elif len(data) > 20:  # Pillow reads all of them
            raise ValueError(f"a JPEG with a frame header of {len(data):,} bytes")
        else:
            size = int.from_bytes(data[3:5], "big") * int.from_bytes(data[5:7], "big")
            sampling = [(both >> 4) * (both & 15) for both in data[9::3]]
            memory = max(memory, 2 * size * sum(sampling) // max([1, *sampling]))  # of all coefficients
            pixels, progressive = max(pixels, size), progressive or kind in _PROGRESSIVE
            wanted = wanted or {(part, k) for part in data[8::3] for k in range(64)}
    return Cost(
        rewrite=_is_costly_before_scans(content),
        memory=memory if progressive or scans > 1 else 0,
        ends=ends or not wanted or not wanted <= seen,
    )


def _is_costly_before_scans(content: bytes) -> bool:
    """Whether Pillow, which reads what comes before the first scan in Python, takes long over it."""
    fill = beside = tables = exif = count = 0
    last = 2
    for kind, begin, start, end in _segments(content):
        if kind == _SCAN:
            break
        count, fill, last = count + 1, fill + begin - last, end
        tables += end - start if kind == _TABLES else 0
        beside += end - start if kind in _APP or kind == _COMMENT else 0
        exif += content[start + 2 : start + 6] == b"Exif"
    if tables > MAX_METADATA:
        raise ValueError(f"a JPEG with {tables:,} bytes of tables")
    return fill > MAX_METADATA // 16 or beside > 8 * MAX_METADATA or count > 1_000 or exif > 8


def bare_jpeg(content: bytes) -> tuple[bytes, int]:
    """A JPEG without what decides no pixel before its first scan, and its orientation."""
    kept, orientation = [content[:2]], 1
    for kind, begin, start, end in _segments(content):
        if kind == _SCAN:
            return b"".join([*kept, content[begin:]]), orientation
        data = content[start + 2 : end]
        if kind == 0xE1 and data.startswith(b"Exif\0\0") and orientation == 1:
            orientation = exif_orientation(data)
        whole = (kind == 0xE0 and data[:5] == b"JFIF\0" and len(data) >= 14) or (
            kind == 0xEE and data[:5] == b"Adobe" and len(data) >= 12
        )
        if whole or (kind not in _APP and kind != _COMMENT):
            kept.append(content[begin:end])
    return content, orientation


def next_restart(content: bytes) -> bytes:
    """The restart marker that comes next where a JPEG ends within its last scan; decoders ignore one too many."""
    scan = content.rfind(bytes((0xFF, _SCAN)))
    last = max((content.rfind(bytes((0xFF, kind)), max(scan, 0)), kind) for kind in range(0xD0, 0xD8))
    return bytes((0xFF, 0xD0 if last[0] < 0 else 0xD0 + (last[1] + 1) % 8))


def _segments(content: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its end marker, as far as it is sound."""
    place, pattern = 2, _SEGMENT
    for _ in range(MAX_PARTS):
        marker = pattern.search(content, place)
        if marker is None:
            return
        kind, start = marker[1][0], marker.end()
        place = start + (0 if kind in _ALONE else max(2, int.from_bytes(content[start : start + 2], "big")))
        if kind == _SCAN:
            pattern = _SCAN_END
        yield kind, marker.start(), start, place
        if kind == _END:
            return
    raise ValueError(f"a JPEG of more than {MAX_PARTS:,} segments")
