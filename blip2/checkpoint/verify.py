"""Whether two checkpoints are the same model: every value, and what comes out for an image."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.key_mapping import HF_HEAD, HF_OPT_EMBEDDINGS
from blip2.checkpoint.load import build_model, match_state_dict, our_names
from blip2.checkpoint.remap import aligned_blocks, equal_values, same_bits
from blip2.checkpoint.source import Checkpoint
from blip2.images import ImageProcessor
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import Tensors

_TOLERANCE = 1e-4  # of the largest output: two layouts may be added up in another order


def compare_tensors(
    expected: Tensors, actual: Tensors, dtype: torch.dtype | None, report: Callable[[str, int, int], None]
) -> int:
    """Compare all tensors, both under Hugging Face's names, bit by bit; gives how many there are.

    Args:
        dtype: what the expected ones are rounded to first; None compares values, whatever dtypes they are stored in.

    Raises:
        CheckpointError: one is missing, there is one more, or a value differs.
    """
    spare = set(actual) - set(expected)
    if spare == {HF_HEAD} and HF_OPT_EMBEDDINGS in expected:  # a head that is no longer tied
        if not equal_values(actual.blocks(HF_HEAD), actual.blocks(HF_OPT_EMBEDDINGS)):
            raise CheckpointError(f"the result is wrong: {HF_HEAD} is not {HF_OPT_EMBEDDINGS}")
        spare = set()
    if spare or set(expected) - set(actual):
        odd = ", ".join(sorted(spare | (set(expected) - set(actual)))[:5])
        raise CheckpointError(f"the result is wrong: missing or spare tensors, {odd}")
    total = expected.nbytes
    for name in expected:
        old, new = expected.info(name), actual.info(name)
        equal = old.shape == new.shape
        target = dtype if dtype is not None and old.dtype.is_floating_point else None
        if equal:
            for a, b in aligned_blocks(expected.blocks(name), actual.blocks(name)):
                equal = equal and same_bits(a if target is None else a.to(target), b)
                report("verify", a.nbytes, total)
        if not equal:
            raise CheckpointError(f"the result is wrong: {name} differs from the source's")
    return len(expected)


def compare_stems(expected: Checkpoint, actual: Checkpoint) -> str:
    """Compare the stems of two checkpoints; gives the result in words, "" where they have none.

    Raises:
        CheckpointError: they differ.
    """
    stems = [
        ImageProcessor.load(checkpoint.folder, checkpoint.required().vision.image_size).stem
        for checkpoint in (expected, actual)
    ]
    if stems[0] != stems[1]:
        raise CheckpointError("the result is wrong: its stem differs from the source's")
    return "" if stems[0] is None else "; stem equal"


def compare_logits(expected: Checkpoint, actual: Checkpoint, dtype: torch.dtype | None) -> str:
    """Compare the outputs of two checkpoints for a probe image, each with its own settings; gives the result in words.

    Both are computed in `dtype` (None: fp32), one after the other, where this machine has the memory for one.

    Raises:
        CheckpointError: outputs differ.
    """
    compute_dtype = dtype or torch.float32
    needed = expected.tensors.numel * compute_dtype.itemsize * 5 // 4
    free = _free_memory()
    if free is not None and needed > free:
        return f"outputs not compared, which takes {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free"
    outputs = (_outputs(checkpoint, compute_dtype) for checkpoint in (expected, actual))
    for a, b in zip(*outputs, strict=True):
        if a.shape != b.shape or not bool((a - b).abs().max() <= _TOLERANCE * a.abs().max().clamp(min=1)):
            raise CheckpointError("the result is wrong: it gives other outputs for an image than the source")
    return "outputs for a probe image equal"


@torch.inference_mode()
def _outputs(checkpoint: Checkpoint, dtype: torch.dtype) -> list[Tensor]:
    tensors = checkpoint.tensors
    matched = match_state_dict(checkpoint.required(), tensors, our_names(tensors))
    model = build_model(matched, tensors, dtype, torch.device("cpu"))
    return [output.float() for output in _probe(model)]


def _probe(model: Blip2 | Blip2Matcher) -> list[Tensor]:
    """Outputs for a pattern of pixels and a few tokens."""
    size = model.config.vision.image_size
    pixels = torch.arange(3 * size * size, dtype=torch.float32).mul(0.37).sin().view(1, 3, size, size) * 2
    ids, mask = torch.tensor([[2, 5, 9, 4]]), torch.ones(1, 4, dtype=torch.int64)
    if isinstance(model, Blip2):
        return [model(pixels, ids, mask, ids if model.config.language.is_encoder_decoder else None)]
    features = model.vision(pixels)
    embeddings = [model.image_embeddings(features), model.text_embeddings(ids, mask)]
    return [*embeddings, model.itm_logits(features, ids, mask)]


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not report them."""
    try:
        facts = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^MemAvailable: +(\d+) kB", facts, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
