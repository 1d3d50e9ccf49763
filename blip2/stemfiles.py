"""The stem's file beside a model's weights: found, read strictly, loaded once for all models that use it.

preprocessor_config.json names it under "stem": `{"file": "stem.safetensors", "origin": "..."}`. A model that shares the
stem of another in a folder beside it names that: `{"file": "../NAME/stem.safetensors"}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakValueDictionary

import torch

from blip2.modeling.config import ConfigError, StemFacts
from blip2.modeling.stem import Stem
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.open import open_tensors
from blip2.tensorfiles.scan import scan_file
from blip2.tensorfiles.tensors import TensorInfo

STEM_FILE = "stem.safetensors"
STEM_LICENSE = "LICENSE-efficientnet-lite"
STEM_FILES = (STEM_FILE, STEM_LICENSE)  # what travels with a model
MAX_ORIGIN = 200  # characters

_networks: WeakValueDictionary[tuple[str, str], Stem] = WeakValueDictionary()  # by digest and device


@dataclass(frozen=True)
class StemFile:
    """A stem's file and the network in it. Two are equal where they hold the same weights on the same device.

    origin: the network and its licence in words, as the settings say it.
    """

    path: Path = field(compare=False)
    origin: str = field(compare=False)
    digest: str
    device: str
    network: Stem = field(compare=False, repr=False)

    def __reduce__(self) -> Any:
        return load_stem, (self.path, self.origin, self.device)  # another process reads it anew

    def files(self) -> dict[str, Path]:
        """What is copied with a model, by name: the stem, and its licence where that is beside it."""
        found = {name: self.path.with_name(name) for name in STEM_FILES}
        return {name: path for name, path in found.items() if name == STEM_FILE or path.is_file()}

    def settings(self) -> dict[str, str]:
        """What preprocessor_config.json says of it in a folder that holds it."""
        return {
            "file": STEM_FILE,
            "origin": self.origin,
            "note": "pixel_values are what this network makes of an image, folded to patches; transformers has no such "
            "image processor: make them with blip2 (blip2.images.to_pixels)",
        }


def stem_path(folder: Path, settings: object) -> tuple[Path, str]:
    """Where the stem's file is, and its origin, by the settings of a model in `folder`. It may not be there.

    Raises:
        CheckpointError: settings of another kind, or a file elsewhere than in this folder or one beside it.
    """
    settings = settings if isinstance(settings, Mapping) else {}
    name, origin = settings.get("file"), settings.get("origin", "")
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    beside = (
        len(parts) == 3 and parts[0] == ".." and parts[1] != ".." and not {"\\", ":", "\0"} & set(parts[1])
    )
    if not (parts == (STEM_FILE,) or (beside and parts[2] == STEM_FILE)):
        raise CheckpointError(
            f"{folder}: the image settings name the stem {quoted(name)}, expected {STEM_FILE!r}, or "
            f"'../NAME/{STEM_FILE}' for that of a folder beside this one"
        )
    if not isinstance(origin, str) or len(origin) > MAX_ORIGIN or not origin.isprintable():
        raise CheckpointError(
            f"{folder}: the stem's origin in the image settings is {quoted(origin)}, expected a line of text"
        )
    home = folder.resolve()
    return (home / STEM_FILE if len(parts) == 1 else home.parent / parts[1] / STEM_FILE), origin


def examine_stem(path: Path, origin: str, image_px: int) -> StemFacts:
    """What a stem's file holds; no value is read.

    Raises:
        CheckpointError: no such file, or one that holds no stem.
    """
    _check_there(path)
    with open_tensors(path) as tensors:
        _empty(path, {name: tensors.info(name) for name in tensors})
        return StemFacts(origin, image_px, len(tensors), tensors.numel, path.stat().st_size)


def load_stem(path: Path, origin: str = "", device: str | torch.device = "cpu") -> StemFile:
    """Load a stem; the same weights on the same device are loaded once, whatever files they come from.

    Raises:
        CheckpointError: no such file, a damaged one, or one that holds no stem.
    """
    _check_there(path)
    device = str(device)
    with open_tensors(path) as tensors:
        network = _empty(path, {name: tensors.info(name) for name in tensors})
        scan = scan_file(tensors.file(next(iter(tensors))))
        if broken := [name for name, largest in scan.large.items() if math.isinf(largest)]:
            raise CheckpointError(
                f"{path}: tensor {quoted(broken[0])} holds values that are not finite (NaN or infinite); "
                "get the file again"
            )
        key = (scan.digest, device)
        loaded = _networks.get(key)
        if loaded is None:
            values = {name: tensors.copy(name).to(device, torch.float32) for name in tensors}
            network.load_state_dict(values, assign=True)
            loaded = network.requires_grad_(False).eval()
            if device == "cpu":
                loaded.pack()
            loaded = _networks.setdefault(key, loaded)
    return StemFile(path, origin, scan.digest, device, loaded)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is not there, and the model reads images through it; get all files of one model"
        )


def _empty(path: Path, info: Mapping[str, TensorInfo]) -> Stem:
    """The network of a file's tensors, without values."""
    try:
        for name, entry in info.items():
            if entry.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise ConfigError(
                    f"the stem's tensor {quoted(name)} is {entry.dtype}, no float of 16 or 32 bits"
                )
        with torch.device("meta"):
            return Stem({name: entry.shape for name, entry in info.items()})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; get the file again") from error
