"""TIFF: what its tags promise is checked, and a file is reduced to the tags that decide its pixels."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blip2.imagefiles.cost import MAX_METADATA, MAX_PARTS, MAX_SCANNED_PIXELS, Cost

MAX_TAGS = 1_000
MAX_TILE = 2**24  # pixels of one tile, where the picture itself has fewer

_SIZES = dict(enumerate((1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8)))  # of a value, by its type
_INTEGERS = dict(zip((1, 3, 4, 6, 8, 9, 13, 16, 17, 18), "BHLbhlLQqQ", strict=True))
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION, _SAMPLES, _ROWS = 256, 257, 258, 259, 274, 277, 278
_STRIPS, _STRIP_SIZES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 273, 279, 322, 323, 324, 325
_COLORMAP, _JPEG_TABLES = 320, 347
_JPEG = (6, 7)
_FAX = (2, 3, 4)  # compressions whose decoder notes every change of color in a row
# What decides pixels; all else, such as a color profile or other directories, is beside them.
_NEEDED = frozenset(
    (
        *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 318, 319, _COLORMAP),
        *(322, 323, 324, 325, 332, 338, 339, _JPEG_TABLES, *range(512, 522), 529, 530, 531, 532),
    )
)


@dataclass(frozen=True)
class Tag:
    """A tag of a directory: its type, how many values it has, and their bytes as they are in the file."""

    kind: int
    count: int
    data: bytes


@dataclass(frozen=True)
class Directory:
    """The first directory of a TIFF file, or of Exif data; bytes beside those of needed tags are only counted."""

    order: str  # as struct has it
    big: bool
    tags: dict[int, Tag]
    beside: int

    def numbers(self, number: int) -> tuple[int, ...]:
        """The values of a tag; empty where there is none of integers."""
        tag = self.tags.get(number)
        letter = tag and _INTEGERS.get(tag.kind)
        return struct.unpack(f"{self.order}{tag.count}{letter}", tag.data) if tag and letter else ()

    def number(self, number: int, default: int = 0) -> int:
        """The first value of a tag."""
        return next(iter(self.numbers(number)), default)


def read_directory(content: bytes, place: int = 0) -> Directory:
    """The first directory of the TIFF file at `place`; empty where it is damaged.

    Raises:
        ValueError: more tags, or more values of one, than any picture has.
    """
    order, big = ">" if content[place : place + 2] == b"MM" else "<", 43 in content[place + 2 : place + 4]
    entry, pointer = ("HHQ8s", "Q") if big else ("HHL4s", "L")
    size, tags, beside = struct.calcsize(f"={pointer}"), dict[int, Tag](), 0
    try:
        (offset,) = struct.unpack_from(order + pointer, content, place + size)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, place + offset)
        if count > MAX_TAGS:
            raise ValueError(f"a TIFF of more than {MAX_TAGS:,} tags")
        start = place + offset + (8 if big else 2)
        for at in range(start, start + count * struct.calcsize(f"={entry}"), struct.calcsize(f"={entry}")):
            number, kind, values, data = struct.unpack_from(order + entry, content, at)
            length = values * _SIZES.get(kind, 1)
            if number not in _NEEDED:
                beside += length
                continue
            if values > (MAX_METADATA if number in (_COLORMAP, _JPEG_TABLES) else MAX_PARTS):
                raise ValueError(f"a TIFF with {values:,} values of tag {number}")
            if length > size:
                (where,) = struct.unpack(order + pointer, data)
                data = content[place + where : place + where + length]
            if len(data := data[:length]) == length and number not in tags:
                tags[number] = Tag(kind, values, data)
    except (struct.error, OverflowError):  # an offset beyond the file
        pass
    return Directory(order, big, tags, beside)


def check_tiff(content: bytes) -> Cost:
    """What decoding a TIFF file takes. Raises ValueError where it is far more than its picture needs."""
    directory = read_directory(content)
    number, numbers = directory.number, directory.numbers
    width, height = number(_WIDTH), number(_HEIGHT)
    part_width, part_height = number(_TILE_WIDTH), number(_TILE_HEIGHT)
    if part_width * part_height > max(MAX_TILE, width * height * 5 // 4):
        raise ValueError(f"a TIFF of {width}x{height} px in tiles of {part_width}x{part_height} px")
    if number(_COMPRESSION, 1) == 1:
        memory = 0  # read in small pieces
    elif sum(sizes := numbers(_STRIP_SIZES) + numbers(_TILE_SIZES)) > 4 * len(content) + MAX_METADATA:
        raise ValueError("a TIFF whose parts are together larger than the file")
    else:
        pixels = part_width * part_height or width * min(height, number(_ROWS, height))
        memory = pixels * number(_SAMPLES, 1) * max(number(_BITS, 1), 8) // 8
        memory += 16 * max(width, part_width) if number(_COMPRESSION) in _FAX else 0
        if number(_COMPRESSION) in _JPEG:
            starts = numbers(_STRIPS) + numbers(_TILES)
            scans = sum(
                content.count(b"\xff\xda", at, at + size) for at, size in zip(starts, sizes, strict=False)
            )
            if scans > 4 * len(starts) and scans * pixels > MAX_SCANNED_PIXELS:
                raise ValueError(
                    f"a TIFF with {scans:,} scans of JPEG, each of which costs as much as a picture"
                )
    # Pillow misreads big-endian BigTIFF.
    return Cost(directory.beside > MAX_METADATA or (directory.big and directory.order == ">"), memory)


def bare_tiff(content: bytes) -> tuple[bytes, None]:
    """A classic TIFF file of the first picture, with the tags alone that decide its pixels."""
    directory = read_directory(content)
    order = directory.order
    head = content + bytes(len(content) % 2)
    entries, data = [], b""
    at = len(head) + 2 + 12 * len(directory.tags) + 4
    for number, tag in sorted(directory.tags.items()):
        kind, values = tag.kind, tag.data
        if kind in (16, 18):  # 64 bits, which a classic file has none of; offsets in 512 MiB need none
            short = (min(value, 2**32 - 1) for value in directory.numbers(number))
            kind, values = 4, struct.pack(f"{order}{tag.count}L", *short)
        if len(values) > 4:
            data, values = data + values + bytes(len(values) % 2), struct.pack(f"{order}L", at + len(data))
        entries.append(struct.pack(f"{order}HHL4s", number, kind, tag.count, values))
    start = struct.pack(f"{order}2sHL", content[:2], 42, len(head))
    count = struct.pack(f"{order}H", len(entries))
    return b"".join([start, head[8:], count, *entries, bytes(4), data]), None


def exif_orientation(data: bytes) -> int:
    """The orientation in Exif data, which is a TIFF file without a picture; 1 (upright) where there is none."""
    try:
        value = read_directory(data.removeprefix(b"Exif\0\0")).number(_ORIENTATION, 1)
    except ValueError:
        return 1
    return value if 1 <= value <= 8 else 1
