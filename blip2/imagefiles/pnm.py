"""PNM (PBM, PGM, PPM): what Pillow reads value by value in Python is rewritten as a file that it reads at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from blip2.imagefiles.cost import MAX_PARTS, Cost

_MAX_HEADER = 2**16
_BLOCK = 2**20  # characters whose numbers are held at a time
_SPACE = b" \t\n\v\f\r"
_BREAK = re.compile(rb"[ \t\n\v\f\r]")
_GAP = rb"(?:[ \t\n\v\f\r]++|#[^\r\n]*+[\r\n])++"
_SIZE = re.compile(rb"P([1-6])%b([0-9]{1,10})%b([0-9]{1,10})" % (_GAP, _GAP))
_OTHER = re.compile(rb"P(?:f|0CMYK|yP|yRGBA|yCMYK)[ \t\n\v\f\r#]")
_MAXIMUM = re.compile(rb"%b([0-9]{1,10})" % _GAP)
_COMMENT = re.compile(rb"#[^\r\n]*+")


def check_pnm(content: bytes) -> Cost:
    """What decoding a PNM takes. Raises ValueError for Pillow's own kinds, and for floating-point pixels."""
    if _OTHER.match(content):
        raise ValueError("a PNM of a kind other than P1 to P6")
    return Cost(rewrite=content[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6"))


def bare_pnm(content: bytes) -> tuple[bytes, int]:
    """A PBM, PGM or PPM as a binary one with values up to 255 or 65,535; what is damaged as it is.

    Raises:
        ValueError: what a text of numbers must not hold.
    """
    size = _SIZE.match(content, 0, _MAX_HEADER)
    if size is None:
        return content[:_MAX_HEADER], 1
    kind, width, height = (int(group) for group in size.groups())
    maximum = None if kind in (1, 4) else _MAXIMUM.match(content, size.end(), _MAX_HEADER)
    start = (maximum or size).end()
    top = int(maximum[1]) if maximum else 1
    if not 0 < top < 2**16 or (maximum is None and kind not in (1, 4)):
        return content[:_MAX_HEADER], 1
    if kind == 4 or (kind > 3 and top in ((255, 65_535) if kind == 5 else (255,))):
        return content, 1  # read at once as it is

    last = 65_535 if kind in (2, 5) and top > 255 else 255
    count = width * height * (3 if kind in (3, 6) else 1)
    # As Pillow scales them: grey of more than 8 bits to 16, colors to 8. In a PBM 1 is black.
    scale = np.minimum(np.rint(np.arange(2**16) / top * last), last).astype(">u2" if last > 255 else np.uint8)
    if kind == 1:
        scale = scale[:2][::-1]
    blocks = (
        _numbers(content, start, count, top, kind) if kind < 4 else _bytes(content, start + 1, count, top)
    )
    head = b"P%d %d %d %d\n" % (6 if kind in (3, 6) else 5, width, height, last)
    return b"".join([head, *(scale[block].tobytes() for block in blocks)]), 1


def _bytes(content: bytes, start: int, count: int, top: int) -> Iterator[npt.NDArray[np.integer]]:
    kind = np.dtype(">u2" if top > 255 else np.uint8)
    whole = min(count, (len(content) - start) // kind.itemsize)
    for at in range(0, whole, _BLOCK):
        yield np.frombuffer(content, kind, min(_BLOCK, whole - at), start + at * kind.itemsize)


def _numbers(
    content: bytes, start: int, count: int, top: int, kind: int
) -> Iterator[npt.NDArray[np.integer]]:
    if content.count(b"#", start) > MAX_PARTS:
        raise ValueError(f"a PNM of more than {MAX_PARTS:,} comments")
    text = _COMMENT.sub(b" ", content[start:])
    place = 0
    while count > 0 and place < len(text):
        gap = _BREAK.search(text, place + _BLOCK)
        end = gap.start() if gap else len(text)
        block, place = text[place:end], end
        if kind == 1:  # its digits need no spaces between them
            block = block.translate(None, _SPACE)[:count]
            values: npt.NDArray[np.integer] = np.frombuffer(block, np.uint8) - np.uint8(ord("0"))
        else:
            if block.translate(None, b"0123456789" + _SPACE):
                raise ValueError("a PNM with something else than numbers for pixels")
            values = np.fromstring(block, np.int64, sep=" ")[:count]
        if values.size and values.max() > top:
            raise ValueError(f"a PNM whose pixels are not from 0 to {top}")
        count -= len(values)
        yield values
