"""RGB images -> pixels [B, 3, S, S], bit for bit as transformers prepares them; where the settings name a stem, what
that makes of them. Decoding is in `imagefiles.decode`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.imagefiles.decode import MAX_PIXELS as MAX_PIXELS
from blip2.imagefiles.decode import MOST_PIXELS as MOST_PIXELS
from blip2.imagefiles.decode import ImageError as ImageError
from blip2.imagefiles.decode import ImageSource as ImageSource
from blip2.imagefiles.decode import check_max_pixels as check_max_pixels
from blip2.imagefiles.decode import load_image as load_image
from blip2.imagefiles.names import SUFFIXES as SUFFIXES
from blip2.modeling.config import MAX_IMAGE_PX, StemFacts
from blip2.modeling.stem import PATCH, STRIDE, folded_px
from blip2.stemfiles import StemFile, examine_stem, load_stem, stem_path
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.strict_json import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RGB = tuple[float, float, float]

# transformers has no such class, so that it refuses to make pixels that the model would misread
STEM_PROCESSOR = "Blip2StemImageProcessor"
_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")  # what BLIP-2 does to every image


@dataclass(frozen=True)
class ImageProcessor:
    """How an RGB image becomes what the image encoder takes.

    size: pixels on each side; images are squashed to a square.
    mean, std: of each channel, on a scale where white is 1.
    resample: the filter, as Pillow numbers them (3 is bicubic).
    rescale_factor: what a channel's value 0..255 is multiplied by.
    stem: the network that turns these pixels into what the image encoder takes, as the last step.
    """

    size: int = 224
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    stem: StemFile | None = None

    @property
    def pixels_size(self) -> int:
        """The side of what `to_pixels` gives: of the image that the image encoder takes."""
        return self.size if self.stem is None else folded_px(self.size)

    @classmethod
    def load(cls, folder: str | Path, image_size: int, device: str | torch.device = "cpu") -> ImageProcessor:
        """Read a checkpoint's settings; what they leave open is as in BLIP-2, the size `image_size`.

        They are in processor_config.json under `image_processor` (newer files), else in preprocessor_config.json.

        Args:
            device: where a stem runs.

        Raises:
            ImageError: unreadable settings, or a preparation that BLIP-2's square images do not have.
            CheckpointError, ConfigError: a stem that is missing or damaged, or takes no images of this size.
        """
        raw = read_image_settings(folder)
        if "stem" not in raw:
            return cls.from_dict(raw, image_size)
        plain = cls.from_dict(raw, image_size // PATCH * STRIDE)
        folded_px(plain.size)  # raises for a size that it does not take
        return replace(plain, stem=load_stem(*stem_path(Path(folder), raw["stem"]), device))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], image_size: int) -> ImageProcessor:
        """Settings as preprocessor_config.json holds them, all but a stem; see `load`."""
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
        """preprocessor_config.json as transformers opens it; with a stem, as it refuses to."""
        stem = {} if self.stem is None else {"stem": self.stem.settings()}
        return {
            "image_processor_type": STEM_PROCESSOR if stem else "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            **dict.fromkeys(_STEPS, True),
            "size": {"height": self.size, "width": self.size},
            "resample": self.resample,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            **stem,
        }

    def files(self) -> dict[str, Path]:
        """The files beside preprocessor_config.json, by name, that a model's folder holds for it."""
        return {} if self.stem is None else self.stem.files()

    def fold(self, pixels: Tensor) -> Tensor:
        """The last step: what `normalized_pixels` gives, [B, 3, S, S], through the stem; without one as it is."""
        if self.stem is None:
            return pixels
        folded: Tensor = self.stem.network(pixels.to(self.stem.device))
        return folded


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """An image with what an image processor makes of it: computed once, it serves every model with the same processor.

    pixels: float32 [3, S, S].
    """

    image: Image.Image
    image_processor: ImageProcessor
    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.image.size


def process(images: Sequence[Image.Image], image_processor: ImageProcessor) -> list[ProcessedImage]:
    """RGB images, each with its pixels. Errors: as `to_pixels`."""
    pixels = to_pixels(images, image_processor)
    return [ProcessedImage(image, image_processor, row) for image, row in zip(images, pixels, strict=True)]


def to_pixels(images: Sequence[Image.Image | ProcessedImage], image_processor: ImageProcessor) -> Tensor:
    """RGB images -> what the image encoder takes, float32 [B, 3, S, S].

    Without a stem bit for bit what transformers' image processor gives, on the CPU; with one what it makes of that, on
    its device.

    Raises:
        ImageError: no images, or one that is not RGB.
    """
    ready = [
        image.pixels
        for image in images
        if isinstance(image, ProcessedImage) and image.image_processor == image_processor
    ]
    if images and len(ready) == len(images):
        return torch.stack(ready)
    plain = [image.image if isinstance(image, ProcessedImage) else image for image in images]
    return image_processor.fold(normalized_pixels(plain, image_processor))


def normalized_pixels(images: Sequence[Image.Image], image_processor: ImageProcessor) -> Tensor:
    """RGB images -> float32 [B, 3, S, S], bit for bit what transformers' image processor gives: before any stem.

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


def read_image_settings(folder: str | Path) -> Mapping[str, Any]:
    """How a checkpoint's folder says that images are prepared; empty where it says nothing.

    Raises:
        ImageError: unreadable settings, or a stem that does not go with the kind of image processor they name.
    """
    raw = _read_json(Path(folder) / "processor_config.json").get("image_processor")
    if not isinstance(raw, Mapping):
        raw = _read_json(Path(folder) / "preprocessor_config.json")
    if ("stem" in raw) != (raw.get("image_processor_type") == STEM_PROCESSOR):
        raise ImageError(
            f'{folder}: the image settings must name both or neither of "image_processor_type": "{STEM_PROCESSOR}" '
            'and "stem"; get all files of one model'
        )
    return raw


def stored_stem(folder: str | Path, image_size: int) -> StemFacts | None:
    """The stem of a checkpoint's folder, None without one; no value is read. Errors: as `ImageProcessor.load`."""
    raw = read_image_settings(folder)
    if "stem" not in raw:
        return None
    size = ImageProcessor.from_dict(raw, image_size // PATCH * STRIDE).size
    return examine_stem(*stem_path(Path(folder), raw["stem"]), size)


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
