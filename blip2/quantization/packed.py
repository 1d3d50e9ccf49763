"""Linear layers with bf16 weights packed for the CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn


def lacks_native_bf16(weight: Tensor) -> bool:
    """Whether products with a weight are slow for want of instructions: bf16 on a processor without them."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not cpu_has_bf16()


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


def malloc_trim() -> None:
    """Give what was freed back to the system, where the allocator would keep it between what is in use.

    While weights are laid out one by one it would keep about as much as the weights take.
    """
    if (trim := _trim()) is not None:
        trim(0)


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 by itself."""
    # a torch without oneDNN, as on Apple's processors, lacks it
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


_WIDE_FROM = 8  # rows; with fewer, reading the weight is what takes the time


_FEW = 5  # rows a laid-out weight is meant for: five beams; the layout serves any number


_AT_ONCE = 256  # outputs whose weights are widened together: 4 MB of them at OPT-6.7B's width


class _Through(torch.autograd.Function):
    """A product with a laid-out weight that gradients pass; backward has it plainly for a moment only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, laid_out: Tensor) -> Tensor:
        ctx.laid_out = laid_out
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.laid_out.to_dense(), None


class Linear(nn.Linear):
    """`nn.Linear` as this processor is quick at it.

    Where bf16 is slow the weight is widened a block at a time, and the sums are fp32's: with AVX2 that is six times as
    fast at 677 rows of 4096 values, an image's. Where the processor has bf16 the weight can be laid out (`lay_out`).
    """

    _laid_out: Tensor | None = None
    _learns = True  # whether the weight that is laid out required gradients

    def lay_out(self, weight: Tensor) -> None:
        """Hold a bf16 weight [N, K] the way oneDNN reads it, blocks of it in one piece, and in no other way.

        For inference: at few rows torch reads a plain weight at half of what the memory gives. Training, another device
        or dtype, and loading a state put the plain weight back; `weight` and `state_dict` give a copy of it.
        """
        self._laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW)
        held = self._parameters.pop("weight", None)
        self._learns = held is None or held.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        return self.weight.dtype if self._laid_out is None else self._laid_out.dtype

    def put_back(self) -> None:
        """Hold the weight plainly again."""
        if self._laid_out is not None:
            self.weight = self._plain()

    def _plain(self) -> nn.Parameter:
        assert self._laid_out is not None
        with torch.inference_mode(False):  # an inference tensor could never be trained
            return nn.Parameter(self._laid_out.to_dense(), requires_grad=self._learns)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self._laid_out is not None:  # this one counts from now on
            self._parameters["weight"], self._laid_out = None, None
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._laid_out is not None:
            return self._laid_out.to_dense()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        if self._laid_out is None:
            return self.__dict__
        # what is laid out can be neither copied nor pickled
        held = {"weight": self._plain(), **self._parameters}
        return self.__dict__ | {"_laid_out": None, "_parameters": held}

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.put_back()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.put_back()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if args[0].get(f"{args[1]}weight") is not None:
            self.put_back()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._laid_out is not None:
            destination[f"{prefix}weight"] = self._laid_out.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if (laid_out := self._laid_out) is not None:
            narrow = x.to(laid_out.dtype)  # in a model with rounded weights what comes is fp32
            bias = None if self.bias is None else self.bias.to(laid_out.dtype)
            if torch.is_grad_enabled():
                product: Tensor = _Through.apply(narrow, laid_out)  # type: ignore[no-untyped-call]
                return (product if bias is None else product + bias).to(x.dtype)
            out: Tensor = torch.ops.mkldnn._linear_pointwise(narrow, laid_out, bias, "none", [], None)
            return out.to(x.dtype)
        rows = x.numel() // self.in_features
        if rows < _WIDE_FROM or not lacks_native_bf16(self.weight) or torch.is_grad_enabled():
            return super().forward(x)
        flat = x.reshape(rows, self.in_features).float()
        out = x.new_empty(rows, self.out_features)
        widened = flat.new_empty(min(_AT_ONCE, self.out_features), self.in_features)
        added = out.new_zeros(self.out_features) if self.bias is None else self.bias
        for start in range(0, self.out_features, _AT_ONCE):
            these = slice(start, min(start + _AT_ONCE, self.out_features))
            block = widened[: these.stop - start].copy_(self.weight[these])
            out[:, these] = torch.addmm(added[these].float(), flat, block.mT)
        return out.view(*x.shape[:-1], self.out_features)
