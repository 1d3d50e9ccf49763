"""The one decoder: path, bytes, file, PIL image or array -> RGB.

Every caller decodes here, so a file gives the same pixels everywhere and a hostile one gives an `ImageError`. Unlike
transformers, grey images of 16 bits are scaled to 8 instead of being clipped, and EXIF orientation is honoured.
"""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from blip2.imagefiles.advice import missing_hint, unreadable_kind
from blip2.imagefiles.checks import bare_file, check_file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")  # JPEG reads MPO too
MAX_BYTES = 512 * 2**20  # of one image file
MAX_PIXELS = 89_000_000  # a third of a GiB once decoded; Pillow itself warns from 89,478,485 on


class ImageReader(Protocol):
    """An image file that is open for reading bytes, or opened when it is read."""

    def read(self) -> bytes:
        """The bytes of the file."""
        ...


ImageSource = str | Path | bytes | ImageReader | Image.Image | npt.NDArray[np.uint8]

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


class ImageError(ValueError):
    """An image that cannot be read, or settings for images that cannot be followed."""


def load_image(source: ImageSource, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read one image as RGB: the first frame, turned upright, transparency laid on white.

    Args:
        source: a path, the bytes of a file, a file open for reading, a PIL image, or an array uint8 [H, W, 3].
        exif: turn the image as its EXIF orientation says; False leaves it as Pillow decodes it, as transformers does
            (Pillow turns TIFF files either way).
        max_pixels: refuse an image with more pixels than this, before decoding it.

    Raises:
        ImageError: the message names the source, what arrived and what to do.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(f"the array has shape {source.shape}, expected [height, width, 3]")
        if source.dtype != np.uint8:
            raise ImageError(f"the array holds {source.dtype}, expected uint8 from 0 to 255")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, f"the {source.mode} image", exif, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(bytes(source), f"an image of {len(source):,} bytes", exif, max_pixels)
    if isinstance(source, str | Path):
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
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file{missing_hint(str(path))}") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or 'input/output error'})") from error
    except ValueError as error:  # a NUL character in it
        raise ImageError(f"{str(path)!r} is no valid path") from error


def check_size(size: int, name: str) -> None:
    """Raises ImageError where an image file is too large to be read."""
    if size > MAX_BYTES:
        raise ImageError(f"{name}: the file is larger than {MAX_BYTES >> 20} MiB")


def _open(content: bytes, name: str, exif: bool, max_pixels: int) -> Image.Image:
    if not content:
        raise ImageError(f"{name}: the file is empty")
    check_size(len(content), name)
    try:
        check_file(content)
    except ValueError as error:
        raise ImageError(f"{name}: {error} is not decoded; save the image anew") from error
    try:
        return _open_content(content, name, exif, max_pixels)
    except ImageError:
        # Sound pixels are read whatever is stored beside them.
        if len(bare := bare_file(content)) < len(content):
            with contextlib.suppress(ImageError):
                return _open_content(bare, name, exif, max_pixels)
        raise


def _open_content(content: bytes, name: str, exif: bool, max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _decode(image, name, exif, max_pixels)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: too many pixels to decode (the limit is {max_pixels:,}); make it smaller"
        ) from error
    except (UnidentifiedImageError, KeyError) as error:
        unknown = f"no image this package can read (it begins with {content[:8]!r})"
        kinds = f"{unknown}; supported are {', '.join(FORMATS)}"
        raise ImageError(f"{name}: {unreadable_kind(content) or kinds}") from error
    except Exception as error:  # decoders raise whatever a broken header leads them to
        raise ImageError(f"{name}: the image is damaged; its header cannot be read") from error


def _decode(image: Image.Image, name: str, exif: bool, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is empty ({width}x{height} px)")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} px is {width * height:,} pixels, the limit is {max_pixels:,}; make it smaller"
        )
    try:
        image.load()
    except Exception as error:  # decoders raise whatever broken data leads them to
        raise ImageError(
            f"{name}: the image is truncated or damaged ({width}x{height} px announced)"
        ) from error
    turn = _TURNS.get(_orientation(image)) if exif else None
    try:
        rgb = _to_rgb(image)
        rgb.info = {}  # with its EXIF the image would be turned again when it is read again
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:
        reason = f" ({error})" if image.mode in ("F", "I") else ""
        raise ImageError(
            f"{name}: pixels of mode {image.mode!r} are not supported; save it as RGB, 8 bit{reason}"
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read: no reason to lose the image."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # The high byte, as Pillow takes it for colour images of 16 bits. It reads "I" from files of 16 bits too.
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"integers from {low} to {high} have no agreed range; 16 bits have")
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if "A" in image.getbands() or "a" in image.getbands() or transparent is not None:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
