"""The content of one image file, or an opened PIL image -> RGB, within a limit of pixels and of memory."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from blip2.imagefiles.advice import unreadable_kind
from blip2.imagefiles.cost import MAX_PIXELS
from blip2.imagefiles.errors import FinalImageError, ImageError
from blip2.imagefiles.names import HAS_HEIF

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")  # JPEG reads MPO too
MAX_MEMORY = 480 * 2**20  # bytes for the pixels while they are decoded, for as many as MAX_PIXELS
MAX_JPEG_PIXELS = 2**28  # of a JPEG that is decoded at reduced scale

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # of a pixel; else 4
_DECODER_BYTES = {"WEBP": 12, "HEIF": 8}  # of a pixel, beside the image itself
_STRIP = 2**20  # pixels that are converted at a time
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")


def read_content(
    content: bytes, orientation: int | None, *, name: str, exif: bool, max_pixels: int, memory: int
) -> Image.Image:
    """An image file as RGB.

    Args:
        content: the file.
        orientation: its EXIF orientation where that is known; None: as the file has it.
        name: what errors call it.
        exif: turn the image as its EXIF orientation says.
        max_pixels: refuse an image with more pixels, before decoding it; a JPEG is decoded at reduced scale.
        memory: bytes that its decoder needs beside the picture, as its headers say.

    Raises:
        ImageError: the message names the image, what arrived and what to do.
    """
    try:
        with _opened(content, name) as image:
            return decode_image(
                image, name=name, exif=exif, max_pixels=max_pixels, memory=memory, orientation=orientation
            )
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FinalImageError(
            f"{name}: too many pixels to decode (the limit is {max_pixels:,}); make it smaller"
        ) from error
    except (UnidentifiedImageError, KeyError) as error:
        supported = f"supported are {', '.join(FORMATS)}{unreadable_kind(content)}"
        raise ImageError(f"{name}: no image this package can read; {supported}") from error
    except Exception as error:  # decoders raise whatever a broken header leads them to
        raise ImageError(f"{name}: the image is damaged; its header cannot be read") from error


def _opened(content: bytes, name: str) -> Image.Image:
    file = io.BytesIO(content)
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(file)  # `Image.open` refuses large ones, which can be decoded at reduced scale
    if content[4:8] == b"ftyp" and any(brand in content[8:64] for brand in _HEIF):
        if not HAS_HEIF:
            raise ImageError(
                f"{name}: this is HEIC, which is read where pillow-heif is installed (the extra 'heif')"
            )
        # Not registered with Pillow: how the caller's own code opens images is the caller's.
        opened: Image.Image = importlib.import_module("pillow_heif.as_plugin").HeifImageFile(file)
        return opened
    return Image.open(file, formats=FORMATS)


def decode_image(
    image: Image.Image,
    *,
    name: str,
    exif: bool,
    max_pixels: int,
    memory: int = 0,
    orientation: int | None = None,
    keep: bool = False,
) -> Image.Image:
    """An opened image as RGB; as `read_content`, which says more. keep: the image is the caller's, and stays so."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is empty ({width}x{height} px)")
    memory += width * height * _DECODER_BYTES.get(image.format or "", 0)
    limit = _Limit(
        name, max_pixels, 2**63 if keep else MAX_MEMORY * max(MAX_PIXELS, max_pixels) // MAX_PIXELS
    )
    if isinstance(image, JpegImageFile) and not keep:
        turned = exif and (orientation or _orientation(image)) in _TURNS
        if (scale := limit.scale(image, memory, turned)) > 1:
            image.draft(None, (width // scale, height // scale))
    else:
        limit.check(image, memory)
    try:
        image.load()
    except Exception as error:  # decoders raise whatever broken data leads them to
        raise ImageError(
            f"{name}: the image is truncated or damaged ({width}x{height} px announced)"
        ) from error
    turn = _TURNS.get(orientation or _orientation(image)) if exif else None
    limit.check(image, turned=turn is not None)
    try:
        upright = image if turn is None else image.transpose(turn)
        if upright is not image and not keep:
            image.close()  # its memory is needed
        return _to_rgb(upright, copy=upright is image and keep)
    except Exception as error:
        reason = f" ({error})" if image.mode in ("F", "I") else ""
        raise ImageError(
            f"{name}: pixels of mode {image.mode!r} are not supported; save it as RGB, 8 bit{reason}"
        ) from error


# --- limits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limit:
    """What an image may take."""

    name: str
    max_pixels: int
    memory: int

    def check(self, image: Image.Image, memory: int = 0, turned: bool = False) -> None:
        """Raises FinalImageError for an image beyond a limit. memory: bytes that its decoder needs beside it."""
        width, height = image.size
        pixels = width * height
        shown = f"{self.name}: {width}x{height} px is {pixels:,} pixels"
        if pixels > self.max_pixels:
            raise FinalImageError(f"{shown}, the limit is {self.max_pixels:,}; make it smaller")
        if (needed := _needed(image, image.size, memory, turned)) > self.memory:
            takes = f"decoded in {needed >> 20:,} MiB of memory, the limit is {self.memory >> 20:,}"
            raise FinalImageError(f"{shown}, {takes}; make it smaller")

    def scale(self, image: JpegImageFile, memory: int, turned: bool) -> int:
        """1 or, for a JPEG beyond a limit, 2, 4 or 8: its scale reduced by this is within them."""
        width, height = image.size
        if width * height > MAX_JPEG_PIXELS or memory > self.memory:
            raise FinalImageError(
                f"{self.name}: {width}x{height} px is more than can be decoded of "
                f"{'a progressive' if memory else 'any'} JPEG, at reduced scale too; make it smaller"
            )
        for scale in (1, 2, 4, 8):
            size = -(-width // scale), -(-height // scale)
            if size[0] * size[1] <= self.max_pixels and _needed(image, size, memory, turned) <= self.memory:
                return scale
        self.check(image, memory, turned)  # raises
        return 8


def _needed(image: Image.Image, size: tuple[int, int], memory: int, turned: bool) -> int:
    """The most bytes that are held at a time while an image is loaded, turned and converted."""

    def held(pixel: int, width: int, height: int) -> int:
        return height * (
            8 + -(-pixel * width // 4) * 4
        )  # rows have a pointer, and end at a multiple of 4 bytes

    own = _BYTES.get(image.mode, 4)
    loaded, upright = held(own, *size), held(own, *(size[::-1] if turned else size))
    converted = image.mode != "RGB" or "transparency" in image.info
    rgb = held(4, *(size[::-1] if turned else size)) if converted else 0
    return max(loaded + memory, loaded + upright if turned else 0, upright + rgb)


# --- orientation and colors ----------------------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read: no reason to lose the image."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, copy: bool) -> Image.Image:
    """An image as RGB without anything beside its pixels. copy: it must not share memory with the other."""
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "I":
        low, high = np.asarray(image.getextrema())
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"integers from {low} to {high} have no agreed range; 16 bits have")
    if image.mode == "I" or image.mode.startswith("I;16"):
        rgb = _by_strips(image, lambda strip: _grey(strip, transparent))
    elif "A" in image.getbands() or "a" in image.getbands() or transparent is not None:
        rgb = _by_strips(image, _on_white)
    elif image.mode == "RGB" and not copy:
        rgb = image._new(image.im)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # with its EXIF the image would be turned again when it is read again
    return rgb


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of an image, without its memory for the whole of it."""
    if image.width * image.height <= _STRIP:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top, strip in strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def strips(image: Image.Image, pixels: int = _STRIP) -> Iterator[tuple[int, Image.Image]]:
    """The rows of an image, about so many pixels at a time, and where they begin."""
    rows = max(1, pixels // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _grey(image: Image.Image, transparent: object) -> Image.Image:
    """The high byte, as Pillow takes it for color images of 16 bits. It reads "I" from files of 16 bits too."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
