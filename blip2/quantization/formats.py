"""int8 and int4 weights: how they are quantized, and how they are stored in files.

A folder with quantized weights is as Hugging Face's, but for the layers that `apply.quantized_layers` names: in the
place of `weight` it holds `weight_int8` and `weight_scale` (`Int8Weight`), or `weight_int4`, `weight_scales` and
`weight_zeros` (`Int4Weight`). Whoever reads `weight` gets the floats it stands for: inspecting and converting need not
know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blip2.modeling.config import Mode
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import TensorFile, TensorInfo, Tensors

GROUP = 128  # weights that share a scale in int4
# Shares of a group's range that are tried: cutting off an extreme may quantize all the others better.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
WEIGHTS_AT_ONCE = 1 << 19  # quantized together: what that takes stays small, and in the processor's caches


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits: values int8 [N, K], and the scale float32 [N] of each row."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Quantize a float weight [N, K]."""
        largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float()
        scale = (largest / 127).clamp(min=1e-30)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        blocks = zip(values.split(rows), weight.split(rows), scale.split(rows), strict=True)
        for values_block, weight_block, scale_block in blocks:
            values_block.copy_((weight_block / scale_block[:, None]).round_())
        return cls(values, scale)

    def float(self) -> Tensor:
        """Dequantized: float32 [N, K]."""
        return self.values.float().mul_(self.scale[:, None])

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors it is made of."""
        return self.values, self.scale

    def to(self, device: torch.device) -> Int8Weight:
        """The same on a device."""
        return Int8Weight(self.values.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Int4Weight:
    """A weight in 4 bits: values uint8 [N, K / 2], two a byte, the first one low.

    A value q stands for (q - zero) * scale; scales bfloat16 and zeros uint8 [N, groups].
    mapped: whether the values are those of a file, mapped.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    mapped: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, weight: Tensor) -> Int4Weight:
        """Quantize a float weight [N, K], K a multiple of GROUP.

        Every group's range is cut by the share that leaves the smallest squared error; then its scale is that of least
        squares.
        """
        rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        blocks = [cls._of(block).parts for block in weight.split(rows)]
        return cls(*map(torch.cat, zip(*blocks, strict=True)))

    @classmethod
    def _of(cls, weight: Tensor) -> Int4Weight:
        groups = weight.float().unflatten(1, (-1, GROUP))  # [N, G, GROUP]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best = torch.full_like(low, torch.inf)
        scales, zeros = torch.empty_like(low), torch.empty_like(low)

        def keep_if_better(scale: Tensor, zero: Tensor) -> None:
            nonlocal best, scales, zeros
            difference = cls._steps(groups, scale, zero).mul_(scale[..., None]).sub_(groups)
            error = difference.square_().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)

        for cut in _CUTS:
            scale = ((high - low) * (cut / 15)).clamp(min=1e-30).bfloat16().float()
            keep_if_better(scale, (low * -cut / scale).round())
        steps = cls._steps(groups, scales, zeros)
        scale = (steps * groups).sum(-1) / steps.square().sum(-1).clamp(min=1e-30)
        keep_if_better(scale.clamp(min=1e-30).bfloat16().float(), zeros)
        values = (cls._steps(groups, scales, zeros) + zeros[..., None]).to(torch.uint8).flatten(1)
        return cls(values[:, ::2] | (values[:, 1::2] << 4), scales.bfloat16(), zeros.to(torch.uint8))

    @staticmethod
    def _steps(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Groups [N, G, GROUP] in whole steps of each group's scale [N, G], -zero to 15 - zero."""
        zero = zero[..., None]
        return groups.div(scale[..., None]).round_().clamp_(-zero, 15 - zero)

    def unpacked(self) -> Tensor:
        """The values one a byte: uint8 [N, K]."""
        return torch.stack([self.values & 15, self.values >> 4], dim=-1).flatten(1)

    def float(self) -> Tensor:
        """Dequantized: float32 [N, K]."""
        steps: Tensor = self.unpacked().float().unflatten(1, (-1, GROUP)).sub_(self.zeros.float()[..., None])
        return steps.mul_(self.scales.float()[..., None]).flatten(1)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors it is made of."""
        return self.values, self.scales, self.zeros

    def to(self, device: torch.device) -> Int4Weight:
        """The same on a device."""
        mapped = self.mapped and device.type == "cpu"
        values, scales, zeros = (part.to(device) for part in self.parts)
        return Int4Weight(values, scales, zeros, mapped=mapped)


QuantizedWeight = Int8Weight | Int4Weight


# --- in files --------------------------------------------------------------------------------------------------------

INT8, INT4 = "weight_int8", "weight_int4"
PARTS = {Int8Weight: (INT8, "weight_scale"), Int4Weight: (INT4, "weight_scales", "weight_zeros")}
LARGEST = {
    "weight_scale": 128,
    "weight_scales": 255,
}  # how many times a scale a weight may be, whatever a file says


def parts_of(name: str, shape: tuple[int, ...], kind: type[QuantizedWeight]) -> dict[str, TensorInfo]:
    """What is stored in the place of a weight [N, K]."""
    rows, inputs = shape
    groups = (rows, -(-inputs // GROUP))
    infos: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, torch.int8), ((rows,), torch.float32)]
    if kind is Int4Weight:
        infos = [((rows, inputs // 2), torch.uint8), (groups, torch.bfloat16), (groups, torch.uint8)]
    layer = name.removesuffix("weight")
    return {layer + part: TensorInfo(*info) for part, info in zip(PARTS[kind], infos, strict=True)}


class QuantizedFile(TensorFile):
    """Quantized weights as the floats they stand for: a file of tensors, as far as its users can see."""

    format = "safetensors"

    def __init__(self, stored: Tensors, names: list[str]) -> None:
        """`names`: of the weights, as if they were stored as floats. Raises CheckpointError where parts do not fit."""
        self._stored = stored
        self.info = {name: self._info(name) for name in names}

    def kind(self, name: str) -> type[QuantizedWeight]:
        """The format of a weight."""
        return Int8Weight if name.removesuffix("weight") + INT8 in self._stored else Int4Weight

    def quantized(self, name: str, *, mapped: bool = False) -> QuantizedWeight:
        """The weight as it is stored, in memory of its own, or mapped from the file."""
        kind, layer = self.kind(name), name.removesuffix("weight")
        read = self._stored.__getitem__ if mapped else self._stored.copy
        weight = kind(*(read(layer + part) for part in PARTS[kind]))
        return replace(weight, mapped=mapped) if isinstance(weight, Int4Weight) else weight

    def copied(self, name: str) -> Tensor:
        """float32."""
        return self.quantized(name).float()

    def sources(self, name: str) -> Iterator[tuple[TensorFile, str]]:
        for part in PARTS[self.kind(name)]:
            stored = name.removesuffix("weight") + part
            yield from self._stored.file(stored).sources(stored)

    def _info(self, name: str) -> TensorInfo:
        kind, layer = self.kind(name), name.removesuffix("weight")
        shape = self._stored.info(layer + PARTS[kind][0]).shape
        if kind is Int4Weight and len(shape) == 2:
            shape = (shape[0], 2 * shape[1])
        if len(shape) != 2 or (kind is Int4Weight and shape[1] % GROUP):
            raise CheckpointError(f"{name} is quantized from a shape of {list(shape)}, which is no weight")
        for part, expected in parts_of(name, shape, kind).items():
            info = self._stored.info(part) if part in self._stored else None
            if info != expected:
                problem = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{part}, a part of a quantized weight, {problem}; expected {expected.dtype} "
                    f"{list(expected.shape)}; quantize the model anew with blip2 quantize"
                )
        return TensorInfo(shape, torch.float32)


def as_floats(stored: Tensors) -> Tensors:
    """A checkpoint's tensors, with quantized weights as floats in the place of their parts.

    Raises CheckpointError where parts are missing or do not fit each other.
    """
    first = (f".{INT8}", f".{INT4}")
    names = [name.rpartition(".")[0] + ".weight" for name in stored if name.endswith(first)]
    if not names:
        return stored
    endings = tuple(f".{part}" for parts in PARTS.values() for part in parts)
    file = QuantizedFile(stored, names)
    plain = {name: stored.file(name) for name in stored if not name.endswith(endings)}
    return Tensors(plain | dict.fromkeys(names, file))


def read_quantized(
    tensors: Tensors, name: str, kind: type[QuantizedWeight], *, mapped: bool = False
) -> QuantizedWeight:
    """A quantized weight: as stored where it is stored so (`mapped`: mapped from the file), else quantized now."""
    file = tensors.file(name)
    if isinstance(file, QuantizedFile):
        if file.kind(name) is not kind:
            raise CheckpointError(
                f"{name} is stored quantized in another way; leave out quantize= to load it as it is"
            )
        return file.quantized(name, mapped=mapped)
    return kind.of(tensors.copy(name))


def stored_mode(tensors: Tensors) -> Mode | None:
    """The mode a checkpoint was quantized in; None where it holds floats."""
    files = ((name, tensors.file(name)) for name in tensors)
    kinds = {file.kind(name) for name, file in files if isinstance(file, QuantizedFile)}
    return None if not kinds else "int4" if Int4Weight in kinds else "int8"
