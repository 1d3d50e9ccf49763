"""A loaded checkpoint with what prepares its images and texts, and the device it is on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from blip2.calibration import Calibration
from blip2.checkpoint import load_processors, resolve_path
from blip2.checkpoint.load import load_checkpoint, parse_dtype
from blip2.checkpoint.source import folder_of, open_checkpoint
from blip2.checkpoint.weights import model_digest
from blip2.images import ImageProcessor
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig, Mode
from blip2.quantization.linear import Int4Linear, Int8Linear
from blip2.registry import default_dtype, resolve_alias
from blip2.results import Caption, GeneratedText
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.scan import join_digests
from blip2.text import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A loaded checkpoint: the model and how its images and texts are prepared.

    file_digest: the digest of its files' weights; empty where the model was made in memory.
    calibration: how likely its captions are right; None where that is not known.
    """

    model: Blip2 | Blip2Matcher
    image_processor: ImageProcessor
    tokenizer: Tokenizer
    file_digest: str = ""
    calibration: Calibration | None = None

    @cached_property
    def digest(self) -> str:
        """What tells the weights, as they were loaded, from all others: one value changed anywhere gives another."""
        weights, stem = self.file_digest or model_digest(self.model), self.image_processor.stem
        return weights if stem is None else join_digests(map(bytes.fromhex, (weights, stem.digest)))

    def judge(self, texts: Sequence[GeneratedText]) -> None:
        """Note in each caption how likely it is right, where that is known."""
        for text in texts:
            if self.calibration is not None and isinstance(text, Caption):
                text.probability_right = self.calibration.probability_right(text.token_logprobs)
                text.warnings = self.calibration.warnings([text.probability_right])

    @property
    def precision(self) -> str:
        """What the weights are stored in: "int4", "int8", "bf16", ..."""
        kinds = {type(module) for module in self.model.modules()}
        if not kinds.isdisjoint((Int4Linear, Int8Linear)):
            return "int4" if Int4Linear in kinds else "int8"
        dtype = str(next(self.model.parameters()).dtype)  # torch.bfloat16
        return dtype.removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def load_components(
    name: str | Path,
    device: torch.device,
    dtype: str | torch.dtype | None,
    revision: str | None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    quantize: Mode | None = None,
) -> LoadedModel:
    """Load what a name or a folder holds; arguments as for `predict.load`."""
    files = resolve_path(resolve_alias(name) if isinstance(name, str) else name, revision)
    with open_checkpoint(files, vision=vision, language=language) as checkpoint:
        if dtype is None and quantize is None:
            dtype = default_dtype(checkpoint.tensors.numel)
            if dtype == "bf16" and device.type == "cuda":
                dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        image_processor, tokenizer = load_processors(files, vision=vision, language=language, device=device)
        calibration = None if checkpoint.is_matcher else Calibration.load(folder_of(files))
        model, weights = load_checkpoint(checkpoint, parse_dtype(dtype), device, quantize, prepack=True)
        _check_fit(model.config, image_processor, tokenizer)
    return LoadedModel(model, image_processor, tokenizer, weights, calibration)


def _check_fit(
    config: Blip2Config | MatcherConfig, image_processor: ImageProcessor, tokenizer: Tokenizer
) -> None:
    """Refuse images of a size, and ids of words, that the model does not take."""
    size, words = config.vision.image_size, _vocabulary(config)
    problem = ""
    if image_processor.pixels_size != size:
        problem = f"images are made {image_processor.pixels_size} px, but the image encoder takes {size}"
    elif (largest := tokenizer.largest_id()) >= words:
        problem = f"the tokenizer gives ids up to {largest:,}, but the model knows {words:,} words"
    if problem:
        raise CheckpointError(f"{problem}: they do not belong together; get all files of one model")


def _vocabulary(config: Blip2Config | MatcherConfig) -> int:
    return (config.language if isinstance(config, Blip2Config) else config.qformer).vocab_size


def device_of(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" takes a GPU where there is one. Raises ValueError where there is no such device."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known; choose auto, cpu, cuda or mps") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r}: torch finds no NVIDIA GPU here; use 'cpu', or see `blip2 doctor`"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {str(device)!r}: torch finds no Apple GPU here; use 'cpu'")
    return chosen
