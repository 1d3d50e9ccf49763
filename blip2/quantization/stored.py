"""Folders that hold rounded weights: written a layer at a time, opened at once.

A folder as Hugging Face's, but for the layers that `quantize.layers` names: in place of `weight` it holds
`weight_int8` and `weight_scale`, or `weight_int4`, `weight_scales` and `weight_zeros`. Whoever asks for `weight` gets
the values these stand for, so that inspecting and converting need not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blip2.quantization.formats import GROUP, Int4Weight, Int8Weight, Mode, QuantizedWeight
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import TensorInfo, Tensors

INT8, SCALE = "weight_int8", "weight_scale"
INT4, SCALES, ZEROS = "weight_int4", "weight_scales", "weight_zeros"
PARTS = {Int8Weight: (INT8, SCALE), Int4Weight: (INT4, SCALES, ZEROS)}


def parts_of(name: str, shape: tuple[int, ...], kind: type[QuantizedWeight]) -> dict[str, TensorInfo]:
    """What is stored in the place of a weight [N, K]."""
    rows, inputs = shape
    groups = (rows, -(-inputs // GROUP))
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.int8), ((rows,), torch.float32)]
    if kind is Int4Weight:
        kinds = [((rows, inputs // 2), torch.uint8), (groups, torch.bfloat16), (groups, torch.uint8)]
    layer = name.removesuffix("weight")
    return {layer + part: TensorInfo(*each) for part, each in zip(PARTS[kind], kinds, strict=True)}


class RoundedFile:
    """Rounded weights as the floats they stand for: a file of tensors, as far as its users can see."""

    format = "safetensors"

    def __init__(self, stored: Tensors, names: list[str]) -> None:
        """`names`: of the weights, as if they were stored as floats. Raises CheckpointError where parts do not fit."""
        self._stored = stored
        self.info: Mapping[str, TensorInfo] = {name: self._info(name) for name in names}

    def kind(self, name: str) -> type[QuantizedWeight]:
        """How a weight is rounded."""
        return Int8Weight if name.removesuffix("weight") + INT8 in self._stored else Int4Weight

    def rounded(self, name: str, *, mapped: bool = False) -> QuantizedWeight:
        """The weight as it is stored, in memory of its own, or mapped from the file."""
        kind, layer = self.kind(name), name.removesuffix("weight")
        read = self._stored.__getitem__ if mapped else self._stored.copy
        made = kind(*(read(layer + part) for part in PARTS[kind]))
        return replace(made, mapped=mapped) if isinstance(made, Int4Weight) else made

    def copied(self, name: str) -> Tensor:
        """float32."""
        return self.rounded(name).float()

    mapped = copied

    def place(self, name: str) -> None:
        """Nowhere: these values are not stored."""

    def _info(self, name: str) -> TensorInfo:
        kind, layer = self.kind(name), name.removesuffix("weight")
        shape = self._stored.info(layer + PARTS[kind][0]).shape
        if kind is Int4Weight and len(shape) == 2:
            shape = (shape[0], 2 * shape[1])
        if len(shape) != 2 or (kind is Int4Weight and shape[1] % GROUP):
            raise CheckpointError(f"{name} is rounded from a shape of {list(shape)}, which is no weight")
        for part, wanted in parts_of(name, shape, kind).items():
            found = self._stored.info(part) if part in self._stored else None
            if found != wanted:
                said = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise CheckpointError(
                    f"{part}, a part of a rounded weight, {said}; expected {wanted.dtype} {list(wanted.shape)}; "
                    "round the model anew with blip2 quantize"
                )
        return TensorInfo(shape, torch.float32)


def as_floats(stored: Tensors) -> Tensors:
    """A checkpoint's tensors, with rounded weights in the place of their parts.

    Raises:
        CheckpointError: parts that are missing or do not fit each other.
    """
    first = (f".{INT8}", f".{INT4}")
    names = [name.rpartition(".")[0] + ".weight" for name in stored if name.endswith(first)]
    if not names:
        return stored
    every = tuple(f".{part}" for parts in PARTS.values() for part in parts)
    file = RoundedFile(stored, names)
    plain = {name: stored.file(name) for name in stored if not name.endswith(every)}
    return Tensors(plain | dict.fromkeys(names, file))


def rounded(
    tensors: Tensors, name: str, kind: type[QuantizedWeight], *, mapped: bool = False
) -> QuantizedWeight:
    """A weight, rounded: as it is stored where it is stored so (`mapped`: mapped from the file), or rounded now."""
    file = tensors.file(name)
    if isinstance(file, RoundedFile):
        if file.kind(name) is not kind:
            raise CheckpointError(
                f"{name} is stored rounded in another way; leave quantize out to load it as it is"
            )
        return file.rounded(name, mapped=mapped)
    return kind.of(tensors.copy(name))


def stored_mode(tensors: Tensors) -> Mode | None:
    """The mode a checkpoint was rounded in; None where it holds floats."""
    kinds = {
        file.kind(name) for name in tensors for file in [tensors.file(name)] if isinstance(file, RoundedFile)
    }
    return None if not kinds else "int4" if Int4Weight in kinds else "int8"
