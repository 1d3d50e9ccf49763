"""int8 and int4 weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["int8", "int4"]


MODES: tuple[Mode, ...] = ("int8", "int4")


GROUP = 128  # weights that share a scale in int4


# Shares of a group's range that are tried: cutting off an extreme may round all the others better.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


_AT_ONCE = 1 << 19  # weights rounded together: what that takes stays small, and in the processor's caches


@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits: values int8 [N, K], and the scale float32 [N] of each row."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Round a float weight [N, K]."""
        largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float()
        scale = (largest / 127).clamp(min=1e-30)
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, _AT_ONCE // weight.shape[1])
        for part, whole, each in zip(values.split(rows), weight.split(rows), scale.split(rows), strict=True):
            part.copy_((whole / each[:, None]).round_())
        return cls(values, scale)

    def float(self) -> Tensor:
        """The weight this stands for, float32 [N, K]."""
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
        """Round a float weight [N, K], K a multiple of GROUP.

        Every group's range is cut by the share that leaves the smallest squared error; then its scale is that of least
        squares.
        """
        rows = max(1, _AT_ONCE // weight.shape[1])
        parts = [cls._of(part) for part in weight.split(rows)]
        return cls(*map(torch.cat, zip(*(part.parts for part in parts), strict=True)))

    @classmethod
    def _of(cls, weight: Tensor) -> Int4Weight:
        groups = weight.float().unflatten(1, (-1, GROUP))  # [N, G, GROUP]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        best = torch.full_like(low, torch.inf)
        scales, zeros = torch.empty_like(low), torch.empty_like(low)

        def consider(scale: Tensor, zero: Tensor) -> None:
            nonlocal best, scales, zeros
            off = cls._steps(groups, scale, zero).mul_(scale[..., None]).sub_(groups)
            error = off.square_().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)

        for cut in _CUTS:
            scale = ((high - low) * (cut / 15)).clamp(min=1e-30).bfloat16().float()
            consider(scale, (low * -cut / scale).round())
        steps = cls._steps(groups, scales, zeros)
        scale = (steps * groups).sum(-1) / steps.square().sum(-1).clamp(min=1e-30)
        consider(scale.clamp(min=1e-30).bfloat16().float(), zeros)
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
        """The weight this stands for, float32 [N, K]."""
        steps: Tensor = self.unpacked().float().unflatten(1, (-1, GROUP)).sub_(self.zeros.float()[..., None])
        return steps.mul_(self.scales.float()[..., None]).flatten(1)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors it is made of."""
        return self.values, self.scales, self.zeros

    def rows(self, these: slice) -> Int4Weight:
        """Some of its outputs' weights."""
        return Int4Weight(self.values[these], self.scales[these], self.zeros[these])

    def to(self, device: torch.device) -> Int4Weight:
        """The same on a device."""
        mapped = self.mapped and device.type == "cpu"
        values, scales, zeros = (part.to(device) for part in self.parts)
        return Int4Weight(values, scales, zeros, mapped=mapped)


QuantizedWeight = Int8Weight | Int4Weight
