"""Image files before they are decoded: what costs too much is refused, what decides no pixel can be left out."""

from __future__ import annotations

from collections.abc import Callable

from blip2.imagefiles.bmp import check_bmp
from blip2.imagefiles.cost import Cost
from blip2.imagefiles.gif import bare_gif, check_gif
from blip2.imagefiles.jpeg import bare_jpeg, check_jpeg
from blip2.imagefiles.png import bare_png, check_png
from blip2.imagefiles.pnm import bare_pnm, check_pnm
from blip2.imagefiles.tiff import bare_tiff, check_tiff
from blip2.imagefiles.webp import bare_webp, check_webp

_CHECKS: tuple[tuple[bytes, Callable[[bytes], Cost]], ...] = (
    (b"\xff\xd8\xff", check_jpeg),
    (b"\x89PNG\r\n\x1a\n", check_png),
    (b"GIF8", check_gif),
    (b"RIFF", check_webp),
    (b"II", check_tiff),
    (b"MM", check_tiff),
    (b"P", check_pnm),
    (b"BM", check_bmp),
    (b"(\0\0\0", check_bmp),
    (b"\x6c\0\0\0", check_bmp),
    (b"\x7c\0\0\0", check_bmp),
)


def check_file(content: bytes) -> Cost:
    """What decoding a file takes, by its headers; for files that are damaged this may be anything.

    Raises:
        ValueError: far more than a picture of its size needs; the message says what is odd.
    """
    return next((check(content) for start, check in _CHECKS if content.startswith(start)), Cost())


def bare_file(content: bytes, max_pixels: int) -> tuple[bytes, int | None]:
    """A file that gives the same pixels without what is stored beside them, for which decoders refuse whole files.

    Its second value is the EXIF orientation that was left out, None where the decoder still finds it.

    Raises:
        ValueError: as `check_file`.
    """
    if content.startswith(b"P"):
        return bare_pnm(content, max_pixels)
    for start, bare in (
        (b"\xff\xd8\xff", bare_jpeg),
        (b"\x89PNG\r\n\x1a\n", bare_png),
        (b"GIF8", bare_gif),
        (b"RIFF", bare_webp),
        (b"II", bare_tiff),
        (b"MM", bare_tiff),
    ):
        if content.startswith(start):
            return bare(content)
    return content, None
