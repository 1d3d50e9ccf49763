"""A published model at its full size with random weights, written to disk tensor by tensor.

    python -m benchmarks.full_size opt-6.7b-coco FOLDER --to paddle --dtype fp32

The architecture is the real one, every parameter is visibly non-zero, and the same name gives the same values whatever
the layout and the dtype (but for rounding). Its tokenizer is the default model's: what it says means nothing.
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.convert import KINDS, Format
from blip2.checkpoint.formats.paddle import PADDLENLP, to_paddle_config
from blip2.checkpoint.key_mapping import to_hugging_face
from blip2.checkpoint.layouts import HUGGING_FACE
from blip2.checkpoint.load import parse_dtype
from blip2.checkpoint.remap import from_hf_layout
from blip2.checkpoint.save import SHARD_BYTES, new_model_folder, settings, tokenizer_files
from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import Blip2Config
from blip2.registry import DEFAULT_FOLDER, PUBLISHED
from blip2.storage import Content
from blip2.tensorfiles.tensors import TensorFile, TensorInfo, Tensors

SCALE = 0.02  # the standard deviation of every parameter; norms' weights stand around 1
NORM = re.compile(r"norm\d?\.weight$", re.IGNORECASE)
HEAD = "language_model.lm_head.weight"


class RandomTensors(TensorFile):
    """A file of tensors that is nowhere: every tensor is drawn when it is read."""

    format = "random"

    def __init__(self, info: Mapping[str, TensorInfo]) -> None:
        self.info = info

    def copied(self, name: str) -> Tensor:
        """float32, always the same values for a name."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(self.info[name].shape).normal_(0, SCALE, generator=generator)
        return drawn.add_(1) if NORM.search(name) else drawn


def write_full_size(name: str, folder: Path, to: Format = "hf", dtype: str = "bf16") -> Path:
    """Write a published generating model, by its alias, with random weights. The folder must be new."""
    config = next(model.config for model in PUBLISHED if model.alias == name)
    if not isinstance(config, Blip2Config) or to == "lavis":
        raise ValueError("only generating models, and only in the layouts of Hugging Face and PaddleNLP")
    with torch.device("meta"):
        shapes = {to_hugging_face(n): tuple(t.shape) for n, t in Blip2(config).state_dict().items()}
    shapes.pop(HEAD, None)  # OPT's head is its word embeddings' weight
    info = {n: TensorInfo(shape, torch.float32) for n, shape in shapes.items()}
    tensors = from_hf_layout(Tensors(dict.fromkeys(info, RandomTensors(info))), LAYOUTS[to])
    wanted = parse_dtype(dtype) or torch.float32
    stored = {n: TensorInfo(tensors.info(n).shape, wanted) for n in tensors}
    files: dict[str, Content] = {**settings(config, stored, True, DEFAULT_FOLDER, None)}
    if to == "paddle":
        files["config.json"] = to_paddle_config(config, str(wanted).removeprefix("torch."))
    files |= tokenizer_files(DEFAULT_FOLDER)

    def read(name: str) -> Iterator[Tensor]:
        return (block.to(wanted) for block in tensors.blocks(name))

    with new_model_folder(folder, files, KINDS[to], stored, read, SHARD_BYTES if to == "hf" else None):
        pass
    return folder


LAYOUTS = {"hf": HUGGING_FACE, "paddle": PADDLENLP}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[m.alias for m in PUBLISHED if isinstance(m.config, Blip2Config)])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", choices=sorted(LAYOUTS), default="hf")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    arguments = parser.parse_args()
    write_full_size(arguments.model, arguments.folder, arguments.to, arguments.dtype)


if __name__ == "__main__":
    main()
