"""A checkpoint of any layout -> a folder with quantized weights, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from blip2.checkpoint.convert import Progress, new_checkpoint, normalize
from blip2.checkpoint.key_mapping import to_hugging_face
from blip2.checkpoint.save import SHARD_BYTES
from blip2.checkpoint.source import open_checkpoint
from blip2.checkpoint.weights import check_weights
from blip2.modeling.config import MODES, Mode
from blip2.quantization.apply import quantized_layers
from blip2.quantization.formats import QuantizedWeight, parts_of, stored_mode
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import TensorInfo, Tensors, blocks
from blip2.tensorfiles.writers import Read


@dataclass(frozen=True)
class Quantization:
    """What was written: the folder, how many layers were quantized, and the bytes before and after."""

    folder: Path
    layers: int
    read_bytes: int
    written_bytes: int


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    mode: Mode,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Write a checkpoint with its linear layers' weights in 8 or 4 bits; `load_model` opens it as any other.

    Args:
        source: what `load_model` takes.
        target: a new folder.
        mode: "int8" or "int4", see `blip2.quantization.apply`.
        vision, language: the parts that LAVIS's checkpoints leave out, as `load_model` takes them.

    Raises:
        ValueError: an unknown mode.
        CheckpointError: a source that is broken, not finite or quantized already, a target that exists, a full disk.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    report = progress or (lambda what, done, total: None)
    with open_checkpoint(source, vision=vision, language=language) as checkpoint:
        if before := stored_mode(checkpoint.tensors):
            raise CheckpointError(
                f"{source} is quantized to {before} already; start from the original weights"
            )
        original = normalize(checkpoint)
        tensors = original.tensors
        check_weights(tensors)
        # a head that is the word embeddings' weight is not stored: it is quantized when it is loaded
        layers = quantized_layers(original.model, mode)
        kinds = {to_hugging_face(f"{name}.weight"): kind for name, _, kind in layers}
        weights = {name: kind for name, kind in kinds.items() if name in tensors}
        parts = {name: parts_of(name, tensors.info(name).shape, kind) for name, kind in weights.items()}
        info: dict[str, TensorInfo] = {}
        for name in tensors:
            info |= parts.get(name, {name: tensors.info(name)})
        total = tensors.nbytes
        read = _reader(tensors, weights, parts, lambda size: report("write", size, total))
        with new_checkpoint(Path(target), original, "hf", info, read, SHARD_BYTES):
            pass
    return Quantization(Path(target), len(weights), total, sum(entry.nbytes for entry in info.values()))


def _reader(
    tensors: Tensors,
    weights: Mapping[str, type[QuantizedWeight]],
    parts: Mapping[str, Mapping[str, TensorInfo]],
    report: Callable[[int], None],
) -> Read:
    """What gives a writer the tensors, and of the weights the parts that are stored, one after another."""
    owners = {part: name for name, infos in parts.items() for part in infos}

    @lru_cache(maxsize=1)  # the parts of a weight are read one after another
    def quantized_parts(name: str) -> dict[str, Tensor]:
        weight = weights[name].of(tensors.copy(name))
        report(tensors.info(name).nbytes)
        return dict(zip(parts[name], weight.parts, strict=True))

    def read(name: str) -> Iterator[Tensor]:
        if name in owners:
            yield from blocks(quantized_parts(owners[name])[name])
        else:
            for block in tensors.blocks(name):
                yield block
                report(block.nbytes)

    return read
