"""Image files before they are decoded: what costs too much is refused, what decides no pixel can be left out."""

from __future__ import annotations

from collections.abc import Callable

from blip2.imagefiles.avif import check_avif
from blip2.imagefiles.bmp import bare_bmp, check_bmp
from blip2.imagefiles.cost import Cost
from blip2.imagefiles.gif import bare_gif, check_gif
from blip2.imagefiles.jpeg import bare_jpeg, check_jpeg
from blip2.imagefiles.png import bare_png, check_png
from blip2.imagefiles.pnm import bare_pnm, check_pnm
from blip2.imagefiles.tiff import bare_tiff, check_tiff
from blip2.imagefiles.webp import bare_webp, check_webp

Bare = tuple[bytes, int | None]

_FORMATS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], Cost], Callable[[bytes], Bare]], ...] = (
    ((b"\xff\xd8\xff",), check_jpeg, bare_jpeg),
    ((b"\x89PNG\r\n\x1a\n",), check_png, bare_png),
    ((b"RIFF",), check_webp, bare_webp),
    ((b"GIF8",), check_gif, bare_gif),
    ((b"II*\0", b"II+\0", b"II\0*", b"MM\0*", b"MM\0+", b"MM*\0"), check_tiff, bare_tiff),
    ((b"P",), check_pnm, bare_pnm),
    ((b"BM", *(bytes((size, 0, 0, 0)) for size in (40, 52, 56, 64, 108, 124))), check_bmp, bare_bmp),
)


def check_file(content: bytes) -> Cost:
    """What decoding a file takes, by its headers; anything for files that are damaged, and for formats not known here.

    Raises:
        ValueError: far more than a picture of its size needs; the message says what is odd.
    """
    if content[4:8] == b"ftyp":
        return check_avif(content)
    return next((check(content) for starts, check, _ in _FORMATS if content.startswith(starts)), Cost())


def bare_file(content: bytes) -> Bare:
    """A file that gives the same pixels without what is stored beside them, for which decoders refuse whole files.

    Its second value is the EXIF orientation that was left out, None where the decoder still finds it.

    Raises:
        ValueError: as `check_file`.
    """
    return next(
        (bare(content) for starts, _, bare in _FORMATS if content.startswith(starts)), (content, None)
    )
