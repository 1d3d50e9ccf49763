"""The one decoder: path, bytes, file, PIL image or array -> RGB.

Every caller decodes here, so a file gives the same pixels everywhere and a hostile one gives an `ImageError`. Unlike
transformers, grey images of 16 bits are scaled to 8 instead of being clipped, and EXIF orientation is honoured.
"""

from __future__ import annotations

import contextlib
import stat
import traceback
import zlib
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from blip2.imagefiles.advice import missing_hint, unreadable_suffix
from blip2.imagefiles.checks import bare_file, check_file
from blip2.imagefiles.cost import MAX_PIXELS as MAX_PIXELS
from blip2.imagefiles.errors import FinalImageError
from blip2.imagefiles.errors import ImageError as ImageError
from blip2.imagefiles.jpeg import next_restart
from blip2.imagefiles.names import is_url
from blip2.imagefiles.pixels import decode_image, read_content, strips
from blip2.imagefiles.warned import naming

MAX_BYTES = 512 * 2**20  # of one image file
MOST_PIXELS = 178_956_970  # that the limit can be raised to: Pillow itself decodes no more


class ImageReader(Protocol):
    """An image file that is open for reading bytes, or opened when it is read."""

    def read(self) -> bytes:
        """The bytes of the file."""
        ...


ImageSource = str | Path | bytes | ImageReader | Image.Image | npt.NDArray[np.uint8]


def load_image(source: ImageSource, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image as RGB: the first frame, turned upright, transparency laid on white.

    Args:
        source: a path, the bytes of a file, a file open for reading, a PIL image, or an array uint8 [H, W, 3].
        exif: turn the image as its EXIF orientation says; False leaves it as Pillow decodes it, as transformers does
            (Pillow turns TIFF files either way).
        max_pixels: refuse an image with more pixels than this, before decoding it; a JPEG is decoded at reduced scale.

    Raises:
        ImageError: the message names the source, what arrived and what to do.
    """
    check_max_pixels(max_pixels)
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(f"the array has shape {source.shape}, expected [height, width, 3]")
        if source.dtype != np.uint8:
            raise ImageError(f"the array holds {source.dtype}, expected uint8 from 0 to 255")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        called = f"the {source.mode} image"
        with naming(called):
            return decode_image(source, name=called, exif=exif, max_pixels=max_pixels, keep=True)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(bytes(source), f"an image of {len(source):,} bytes", exif, max_pixels)
    if isinstance(source, str | Path):
        if is_url(str(source)):
            raise ImageError(f"{source}: no such file{missing_hint(str(source))}")
        return _open_path(Path(source), exif, max_pixels)
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        content = source.read()
        if not isinstance(content, bytes):
            raise ImageError(
                f"an image file must be open for reading bytes (mode 'rb'); it gives {type(content).__name__}"
            )
        shown = name if isinstance(name, str) else "the open file"
        return _open(content, shown, exif, max_pixels)
    raise ImageError(
        f"cannot read an image from a {type(source).__name__}; "
        "pass a path, bytes, an open file, a PIL image or a uint8 array [H, W, 3]"
    )


def _open_path(path: Path, exif: bool, max_pixels: int) -> Image.Image:
    try:
        # A pipe or a device would make reading wait, or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImageError(f"{path} is no regular file; pass the path of an image file")
        check_size(path.stat().st_size, str(path))
        return _open(path.read_bytes(), str(path), exif, max_pixels)
    except ImageError as error:
        if advice := unreadable_suffix(path.name, str(error)):
            raise ImageError(f"{error}{advice}") from error
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file{missing_hint(str(path))}") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or 'input/output error'})") from error
    except ValueError as error:  # a NUL character in it
        raise ImageError(f"{str(path)!r} is no valid path") from error


def check_max_pixels(max_pixels: int) -> int:
    """The same. Raises ImageError where this is no limit of pixels."""
    if type(max_pixels) is not int or not 1 <= max_pixels <= MOST_PIXELS:
        raise ImageError(f"max_pixels is {max_pixels!r}, expected a whole number from 1 to {MOST_PIXELS:,}")
    return max_pixels


def check_size(size: int, name: str) -> None:
    """Raises ImageError where an image file is too large to be read."""
    if size > MAX_BYTES:
        raise ImageError(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")


def _open(content: bytes, name: str, exif: bool, max_pixels: int) -> Image.Image:
    if not content:
        raise ImageError(f"{name}: the file is empty")
    check_size(len(content), name)
    try:
        cost = check_file(content)
        bare, orientation = bare_file(content) if cost.rewrite else (content, None)
    except ValueError as error:
        raise ImageError(f"{name}: {error} is not decoded; save the image anew") from error
    way = read_content if cost.ends else _read_endless
    read = partial(way, name=name, exif=exif, max_pixels=max_pixels, memory=cost.memory)
    with naming(name):
        try:
            return read(bare, orientation)
        except FinalImageError:
            raise
        except ImageError as error:
            for failed in (error, error.__cause__):
                if failed is not None:
                    traceback.clear_frames(failed.__traceback__)  # they hold the image
            # Sound pixels are read whatever is stored beside them.
            with contextlib.suppress(ValueError):
                bare, orientation = bare_file(content)
                if bare != content and not cost.rewrite:
                    return read(bare, orientation)
            raise


def _read_endless(
    content: bytes, orientation: int | None, *, name: str, exif: bool, max_pixels: int, memory: int
) -> Image.Image:
    """A JPEG that lacks its end marker, as `read_content`. One that lacks pixels too raises ImageError."""

    def read(filling: bytes) -> Image.Image:
        ended = b"".join([content.rstrip(b"\xff"), filling, next_restart(content), filling, b"\xff\xd9"])
        return read_content(ended, orientation, name=name, exif=exif, max_pixels=max_pixels, memory=memory)

    # Missing pixels would be made of what follows.
    checksum = _checksum(read(b""))
    if checksum != _checksum(read(b"\x55" * 1024)) or checksum != _checksum(image := read(b"\xaa" * 1024)):
        raise FinalImageError(f"{name}: the image is truncated")
    return image


def _checksum(image: Image.Image) -> int:
    """Of the pixels, without another copy of them."""
    checksum = 0
    for _, strip in strips(image):
        checksum = zlib.crc32(strip.tobytes(), checksum)
    return checksum
