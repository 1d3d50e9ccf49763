"""A checkpoint of any layout -> a folder with rounded weights, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.convert import Progress, normalize, write_settings
from blip2.checkpoint.folder import new_folder, write_json
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.key_mapping import to_hugging_face
from blip2.checkpoint.load import has_tokenizer, SkipInit
from blip2.checkpoint.remap import blocks, read_blocks
from blip2.checkpoint.save import SHARD_BYTES
from blip2.checkpoint.source import open_checkpoint
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import MODES, Blip2Config, Mode
from blip2.quantization.apply import quantized_layers
from blip2.quantization.formats import QuantizedWeight, parts_of, stored_mode
from blip2.tensorfiles.tensors import CheckpointError, TensorInfo, Tensors
from blip2.tensorfiles.writers import SAFETENSORS, write_files


@dataclass(frozen=True)
class Quantization:
    """What was written: the folder, how many layers were rounded, and the bytes before and after."""

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
        mode: "int8" or "int4", see `blip2.quantize`.
        vision, language: the parts that LAVIS's checkpoints leave out, as `load_model` takes them.

    Raises:
        ValueError: an unknown mode.
        CheckpointError: a source that is broken or rounded already, a target that exists, a full disk.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    report = progress or (lambda what, done, total: None)
    parts = [None if part is None else resolve(part) for part in (vision, language)]
    with open_checkpoint(resolve(source), vision=parts[0], language=parts[1]) as found:
        if before := stored_mode(found.tensors):
            raise CheckpointError(f"{source} is rounded to {before} already; start from the original weights")
        config, tensors, tied = normalize(found)
        with torch.device("meta"), SkipInit():
            model = Blip2(config) if isinstance(config, Blip2Config) else Blip2Matcher(config)
        # a head that is the word embeddings' weight is not stored: it is rounded when it is loaded
        kinds = {to_hugging_face(f"{name}.weight"): kind for name, _, kind in quantized_layers(model, mode)}
        weights = {name: kind for name, kind in kinds.items() if name in tensors}
        info: dict[str, TensorInfo] = {}
        for name in tensors:
            entry = tensors.info(name)
            info |= parts_of(name, entry.shape, weights[name]) if name in weights else {name: entry}
        total = sum(tensors.info(name).nbytes for name in tensors)
        words = next(
            (each for each in (found.folder, parts[1]) if each is not None and has_tokenizer(each)), None
        )
        folder = Path(target)
        with new_folder(folder) as beside:
            rounding = _Rounding(tensors, weights, lambda size: report("write", size, total))
            index = write_files(beside, SAFETENSORS, info, rounding.read, SHARD_BYTES)
            if index is not None:
                write_json(beside / SAFETENSORS.index, index)
            write_settings(beside, folder, "hf", found, config, info, tied, words, {})
    return Quantization(folder, len(weights), total, sum(entry.nbytes for entry in info.values()))


class _Rounding:
    """Gives tensors to a writer, who asks for the parts of a weight one after another."""

    def __init__(
        self, tensors: Tensors, weights: Mapping[str, type[QuantizedWeight]], report: Callable[[int], None]
    ) -> None:
        self._tensors, self._weights, self._report = tensors, weights, report
        self._owner = {
            part: name
            for name, kind in weights.items()
            for part in parts_of(name, tensors.info(name).shape, kind)
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> Iterator[Tensor]:
        owner = self._owner.get(name)
        if owner is None:
            for block in read_blocks(self._tensors, name):
                yield block
                self._report(block.nbytes)
            return
        if self._last[0] != owner:
            made = self._weights[owner].of(self._tensors.copy(owner))
            names = parts_of(owner, self._tensors.info(owner).shape, type(made))
            self._last = owner, dict(zip(names, made.parts, strict=True))
            self._report(self._tensors.info(owner).nbytes)
        yield from blocks(self._last[1][name])
