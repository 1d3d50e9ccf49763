"""BMP: run lengths are bounded, since Pillow decodes them in Python."""

from __future__ import annotations

import struct

from blip2.imagefiles.cost import Cost

MAX_RUN_PIXELS = 2**24
MAX_RUN_BYTES = 2**23


def check_bmp(content: bytes) -> Cost:
    """What decoding a BMP, or a DIB without its file header, takes. Raises ValueError where it is too much."""
    start = 14 if content.startswith(b"BM") else 0
    if len(content) >= start + 40 and int.from_bytes(content[start : start + 4], "little") >= 40:
        width, height, _, compression = struct.unpack_from("<lllL", content, start + 4)
        pixels = abs(width * height)
        if compression in (1, 2) and (pixels > MAX_RUN_PIXELS or len(content) > MAX_RUN_BYTES):
            raise ValueError(f"a BMP of {len(content):,} bytes with run lengths for {pixels:,} pixels")
    return Cost()
