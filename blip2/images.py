"""The one way in for images: path, bytes, file, PIL image or array -> RGB -> pixels [B, 3, S, S].

Every caller decodes here, so a file gives the same pixels everywhere and a hostile one gives an `ImageError`. Unlike
transformers, grey images of 16 bits are scaled to 8 instead of being clipped, and EXIF orientation is honoured.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from blip2.imagefiles import bare_file, check_file
from blip2.modeling.config import MAX_IMAGE_PX
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.strict_json import read_json

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")  # JPEG reads MPO too
# Files that are taken for images when a folder is given; what they really are is read from their content.
_ENDINGS = "jpg jpeg jpe jif jfif jfi mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm avif avifs"
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
MAX_BYTES = 512 * 2**20  # of one image file
MAX_PIXELS = 89_000_000  # a third of a GiB once decoded; Pillow itself warns from 89,478,485 on
# What Windows, macOS and network storage put beside pictures; whatever begins with a dot is theirs too.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RGB = tuple[float, float, float]
ImageSource = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[np.uint8]

_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")  # what BLIP-2 does to every image
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


def is_image_name(path: str) -> bool:
    """Whether a file is one of the user's pictures, by its path within a folder or an archive."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a file or folder, by its path within a folder or an archive, is hidden or the system's own."""
    parts = set(path.replace(os.sep, "/").split("/")) - {".", ".."}
    return any(part.startswith(".") or part.lower() in _SYSTEM_FOLDERS for part in parts)


# --- any source -> RGB ---------------------------------------------------------------------------------------------


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
        url = str(path).startswith(("http:", "https:"))
        hint = "; URLs are not fetched here, download it first" if url else ""
        raise ImageError(f"{path}: no such file{hint}") from None
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
        raise ImageError(
            f"{name}: no image this package can read (it begins with {content[:8]!r}); "
            f"supported are {', '.join(FORMATS)}"
        ) from error
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


# --- RGB -> pixels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageProcessor:
    """How an RGB image becomes what the image encoder takes.

    size: pixels on each side; images are squashed to a square.
    mean, std: of each channel, on a scale where white is 1.
    resample: the filter, as Pillow numbers them (3 is bicubic).
    rescale_factor: what a channel's value 0..255 is multiplied by.
    """

    size: int = 224
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255

    @classmethod
    def load(cls, folder: str | Path, image_size: int) -> ImageProcessor:
        """Read a checkpoint's settings; what they leave open is as in BLIP-2, the size `image_size`.

        They are in processor_config.json under `image_processor` (newer files), else in preprocessor_config.json.

        Raises:
            ImageError: unreadable settings, or a preparation that BLIP-2's square images do not have.
        """
        raw = _read_json(Path(folder) / "processor_config.json").get("image_processor")
        if not isinstance(raw, Mapping):
            raw = _read_json(Path(folder) / "preprocessor_config.json")
        return cls.from_dict(raw, image_size)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], image_size: int) -> ImageProcessor:
        """Settings as preprocessor_config.json holds them; see `load`."""
        for step in _STEPS:
            if raw.get(step) is False:
                raise ImageError(f"the image settings say {step}: false; BLIP-2 does it, set it to true")
        for step in ("do_center_crop", "do_pad"):
            if raw.get(step):
                raise ImageError(f"the image settings say {step}: true; BLIP-2 does not, set it to false")
        size = raw.get("size") or image_size
        if isinstance(size, Mapping):
            height, width = size.get("height"), size.get("width")
            if height != width or height is None:
                raise ImageError(
                    f"the image settings ask for size {str(dict(size))[:100]}; BLIP-2 takes equal height and width"
                )
            size = height
        resample = raw.get("resample", cls.resample)
        if type(size) is not int or not 1 <= size <= MAX_IMAGE_PX:
            raise ImageError(f"the image settings ask for size {quoted(size)}, expected 1 to {MAX_IMAGE_PX}")
        if type(resample) is not int or resample not in set(Image.Resampling):
            raise ImageError(
                f"the image settings ask for resample {quoted(resample)}, expected 0 to 5 (3 is bicubic)"
            )
        factor = _number("rescale_factor", raw.get("rescale_factor", cls.rescale_factor), 1e-6, 1)
        mean = _channels(raw, "image_mean", CLIP_MEAN, -255, 255)
        std = _channels(raw, "image_std", CLIP_STD, 1e-3, 255)
        return cls(size, mean, std, int(resample), factor)

    def to_dict(self) -> dict[str, Any]:
        """preprocessor_config.json as transformers opens it."""
        return {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            **dict.fromkeys(_STEPS, True),
            "size": {"height": self.size, "width": self.size},
            "resample": self.resample,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def to_pixels(images: Sequence[Image.Image], image_processor: ImageProcessor) -> Tensor:
    """RGB images -> float32 [B, 3, S, S], bit for bit what transformers' image processor gives.

    Raises:
        ImageError: no images, or one that is not RGB.
    """
    if not images:
        raise ImageError("no images given")
    # A channel has only 256 values, so all of the arithmetic is a table: float64 product rounded to float32, then
    # float32 differences and quotients.
    size, resample = image_processor.size, Image.Resampling(image_processor.resample)
    levels = (np.arange(256, dtype=np.float64) * image_processor.rescale_factor).astype(np.float32)
    mean, std = np.array(image_processor.mean, np.float32), np.array(image_processor.std, np.float32)
    table = ((levels[:, None] - mean) / std).astype(np.float32)  # [256, 3]
    pixels = np.empty((len(images), 3, size, size), np.float32)  # [B, 3, S, S]
    for image, out in zip(images, pixels, strict=True):
        if image.mode != "RGB":
            raise ImageError(
                f"an image of mode {image.mode!r} arrived, expected RGB; read images with load_image"
            )
        resized = np.asarray(image.resize((size, size), resample))
        for channel in range(3):
            np.take(table[:, channel], resized[..., channel], out=out[channel])
    return torch.from_numpy(pixels)


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, *, scale: tuple[float, float] = (0.5, 1.0)
) -> Image.Image:
    """Training's view of an image: a random part, squashed to size x size, mirrored half of the time.

    BLIP-2's training transform, torchvision's RandomResizedCrop (bicubic, aspect ratio 3/4 to 4/3) and flip.

    Args:
        rng: where the randomness comes from; the same state gives the same view.
        scale: least and greatest part of the image's area.
    """
    width, height = image.size
    left, top, crop_width, crop_height = _random_box(width, height, rng, scale)
    part = image.crop((left, top, left + crop_width, top + crop_height))
    view = part.resize((size, size), Image.Resampling.BICUBIC)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


def _random_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    # An extreme shape: the middle, as much of it as the ratio allows.
    w = min(width, max(1, round(height * wide)))
    h = min(height, max(1, round(width / narrow)))
    return (width - w) // 2, (height - h) // 2, w, h


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        return read_json(path, optional=True)
    except CheckpointError as error:
        raise ImageError(str(error)) from error


def _channels(raw: Mapping[str, Any], name: str, default: RGB, least: float, most: float) -> RGB:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3:
        raise ImageError(f"the image settings say {name} {str(value)[:100]}, expected three numbers")
    red, green, blue = (_number(name, channel, least, most) for channel in value)
    return red, green, blue


def _number(name: str, value: Any, least: float, most: float) -> float:
    """A number of the settings; beyond these bounds pixels would lose their differences, or overflow."""
    if type(value) not in (int, float) or not least <= value <= most:
        nothing = " (none may be 0)" if value == 0 else ""
        raise ImageError(
            f"the image settings say {name} {quoted(value)}{nothing}, expected a number from {least:g} to {most:g}"
        )
    return float(value)
