"""AVIF: what decoding it takes beside the picture."""

from __future__ import annotations

import re

from blip2.imagefiles.cost import Cost

_SIZE = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)
_CODING = re.compile(rb"av1C\x81.(.)", re.DOTALL)
_BOXES = 2**20  # bytes within which the properties of its images are


def check_avif(content: bytes) -> Cost:
    """What decoding an AVIF takes: frames of AV1 and the colors made of them."""
    head = content[:_BOXES]
    sizes = [
        int.from_bytes(width, "big") * int.from_bytes(height, "big") for width, height in _SIZE.findall(head)
    ]
    codings = [flags[0] for flags in _CODING.findall(head)]  # of colors, and of transparency
    samples = 0.0  # bytes of a pixel
    for flags in codings:
        depth, is_grey, halved = 1 + (flags >> 6 & 1), flags >> 4 & 1, (flags >> 3 & 1) + (flags >> 2 & 1)
        samples += depth * (1 if is_grey else 1 + 2 / 2**halved)
    return Cost(memory=int(max(sizes, default=0) * (2 * samples + 4 * len(codings))))
