"""Linear layers with int8 and int4 weights."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.quantization.formats import GROUP, WEIGHTS_AT_ONCE, Int4Weight, Int8Weight
from blip2.quantization.openvino import OpenVinoLinear

# A token whose largest value is so many times its mean size is split in hi and lo. Of 4096 normally distributed values
# the largest is 5 times the mean size, of 16384 after a ReLU 11 times, beside seven outlier channels 100 times.
OUTLIER_RATIO = 12.0


class QuantizedLinear(nn.Module):
    """A linear layer that keeps no float weight, [..., K] in any float -> [..., N] in the same."""

    kind = "int8"
    out_dtype: torch.dtype | None = None  # of the result; None: as the input's

    def __init__(self, shape: Sequence[int], bias: Tensor | None) -> None:
        """shape: N, K. bias: [N] in any float."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x.reshape(-1, self.in_features))
        return out.to(self.out_dtype or x.dtype).view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K] in any float -> float32 [M, N]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


class Int8Linear(QuantizedLinear):
    """A linear layer with a scale for each output and 8 bit activations; outlier tokens are split in hi and lo.

    On x86 the product is FBGEMM's, exact in whole numbers: a row gives the same bits alone and in any batch. Elsewhere
    the weights are widened for each product, which saves memory, not time.
    """

    def __init__(
        self,
        weight: Int8Weight,
        bias: Tensor | None,
        hi_lo: bool = True,
        outlier_ratio: float = OUTLIER_RATIO,
    ) -> None:
        """hi_lo: whether tokens are split. outlier_ratio: from which one on; 0: every token."""
        super().__init__(weight.values.shape, bias)
        self.hi_lo, self.outlier_ratio, self.kind = hi_lo, outlier_ratio, f"int8, hi_lo={hi_lo}"
        has_kernel = weight.values.device.type == "cpu" and max_activation_level() > 0
        self._packed: Any = _pack(weight) if has_kernel else None
        self._plain = None if has_kernel else weight

    def multiply(self, rows: Tensor) -> Tensor:
        if self._plain is not None:
            out = F.linear(rows, self._plain.values.to(rows.dtype)).float() * self._plain.scale
            return out if self.bias is None else out + self.bias
        rows = rows.float()
        level, sizes = max_activation_level(), rows.abs()
        largest = sizes.amax(dim=1, keepdim=True).clamp_(min=1e-30)  # [M, 1]
        step = largest / level
        scaled = rows / step
        hi = scaled.round()  # FBGEMM would round some values close to halfway the other way
        split = self._split_tokens(sizes, largest)
        if len(split) == 0:
            out = _multiply(hi, self._packed)
        else:
            lo = (scaled[split] - hi[split]).mul_(2 * level)  # what is left is at most a half
            both = _multiply(torch.cat([hi, lo]), self._packed)
            out = both[: len(rows)].index_add_(0, split, both[len(rows) :], alpha=0.5 / level)
        return out.mul_(step) if self.bias is None else torch.addcmul(self.bias, out, step)

    def _split_tokens(self, sizes: Tensor, largest: Tensor) -> Tensor:
        """The tokens that are split, by the sizes of their values [M, K] and the largest [M, 1]: int64 [k]."""
        if not self.hi_lo:
            return torch.empty(0, dtype=torch.int64)
        if max_activation_level() < 127:
            return torch.arange(len(sizes))
        # the order of a sum depends on the batch: in double precision it decides nothing
        outlier = largest > self.outlier_ratio * sizes.mean(dim=1, keepdim=True, dtype=torch.float64)
        return outlier.flatten().nonzero().flatten()


class Int8ImageLinear(QuantizedLinear):
    """As `Int8Linear`, for the image encoder's hundreds of rows: oneDNN multiplies, twice as fast at so many.

    A token is quantized once, in 256 steps between its smallest value and its largest. What a GELU gives is nearly all
    positive: between the negative and the positive largest value it would have half as many.
    """

    def __init__(self, weight: Int8Weight, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> None:
        """out_dtype: of the result; None: as the input's."""
        super().__init__(weight.values.shape, bias)
        self.out_dtype = out_dtype
        self._packed = torch.ops.onednn.qlinear_prepack(weight.values, None)
        # No buffers: `model.half()` must not narrow them.
        self.scale, self.zeros = weight.scale, torch.zeros(self.out_features, dtype=torch.int64)
        self.sums = weight.values.sum(1, dtype=torch.int32) * weight.scale  # the products of a token of ones

    def __getstate__(self) -> dict[str, Any]:
        # packed it can be neither copied nor pickled
        return self.__dict__ | {"_packed": self._packed.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed = torch.ops.onednn.qlinear_prepack(state["_packed"].mT.contiguous(), None)

    def multiply(self, rows: Tensor) -> Tensor:
        # torch quantizes embedding tables so: rows [M, K] in 0 .. 255, each with its step and smallest value at the end
        quantized = torch.ops.quantized.embedding_bag_byte_prepack(rows.float().contiguous())
        steps, step_and_low = quantized.split([self.in_features, 8], dim=1)
        step, low = step_and_low.contiguous().view(torch.float32).split(1, dim=1)  # [M, 1]
        result: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            steps.contiguous(), 1.0, 0, self._packed, self.scale, self.zeros, *result
        )
        # in place: new memory for the rows of an image takes as long as what is computed
        out.mul_(step).addcmul_(low, self.sums)
        return out if self.bias is None else out.add_(self.bias)


class Int8Embedding(nn.Module):
    """A table of embeddings with a scale for each: ids [...] -> float32 [..., W]."""

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.values = nn.Buffer(weight.values, persistent=False)
        self.scale = nn.Buffer(weight.scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.values[ids] * self.scale[ids][..., None]
        return out


class Int4Linear(QuantizedLinear):
    """A linear layer in 4 bits, with a scale and a zero for every `GROUP` inputs of an output.

    OpenVINO multiplies where it is installed and the processor has VNNI, with activations in 8 bits, a scale for every
    `GROUP` of them; torch elsewhere, with activations in bfloat16. Either way a row gives the same bits in any batch.
    """

    kind = f"int4, group={GROUP}"

    def __init__(self, weight: Int4Weight, bias: Tensor | None) -> None:
        super().__init__((len(weight.values), 2 * weight.values.shape[1]), bias)
        self._product: OpenVinoLinear | None = None
        self._plain = None
        if weight.values.device.type != "cpu":
            self._plain = weight
        elif openvino_multiplies():
            self._product = OpenVinoLinear(weight.values, weight.scales, weight.zeros, mapped=weight.mapped)
        else:
            zeros = (8 - weight.zeros.float()) * weight.scales.float()  # torch's kernel adds them
            pairs = torch.stack([weight.scales.mT, zeros.bfloat16().mT], dim=-1)  # [K / GROUP, N, 2]
            # the layout's blocks have at most 64 outputs
            rows = max(64, WEIGHTS_AT_ONCE // self.in_features // 64 * 64)
            blocks = [
                torch._convert_weight_to_int4pack_for_cpu(replace(weight, values=block).unpacked().int(), 1)
                for block in weight.values.split(rows)
            ]
            self.pairs = nn.Buffer(pairs.contiguous(), persistent=False)
            self.packed = nn.Buffer(torch.cat(blocks), persistent=False)

    def multiply(self, rows: Tensor) -> Tensor:
        out: Tensor
        if self._product is not None:
            out = self._product(rows.float())
        elif self._plain is None:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.packed, GROUP, self.pairs)
        else:
            out = F.linear(rows.bfloat16(), self._plain.float().bfloat16())
        out = out.float()
        return out if self.bias is None else out.add_(self.bias)


_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"


@lru_cache(maxsize=1)
def max_activation_level() -> int:
    """The largest 8 bit value of activations on this processor, 0 where FBGEMM does not run.

    127, or 63 where instructions for whole numbers (VNNI) are missing: sums of two products are then held in 16 bits
    and cut off beyond them. Found by trying, so that a torch without these operators is no error either.
    """
    known = hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, _PRODUCT)
    if "fbgemm" not in torch.backends.quantized.supported_engines or not known:
        return 0
    packed = _pack(Int8Weight(torch.full((1, 64), 127, dtype=torch.int8), torch.ones(1)))
    return 127 if float(_multiply(torch.full((1, 64), 127.0), packed, 127)) == 64 * 127 * 127 else 63


def onednn_multiplies() -> bool:
    """Whether oneDNN multiplies 8 bit values here and is quick at it: on x86 with VNNI."""
    return max_activation_level() == 127 and hasattr(torch.ops.onednn, "qlinear_pointwise")


def openvino_multiplies() -> bool:
    """Whether OpenVINO multiplies 4 bit weights here: where it is installed, on x86 with VNNI."""
    return max_activation_level() == 127 and importlib.util.find_spec("openvino") is not None


@contextmanager
def fbgemm_engine() -> Iterator[None]:
    """Weights are packed for FBGEMM meanwhile, in all threads."""
    engine = torch.backends.quantized.engine
    if engine == "fbgemm":  # the outermost call sets it back
        yield
        return
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = engine


def _pack(weight: Int8Weight) -> Any:
    """A weight in FBGEMM's layout."""
    zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
    with fbgemm_engine(), warnings.catch_warnings():
        # newer releases announce that these tensors will go; see `max_activation_level`
        warnings.simplefilter("ignore")
        tensor = torch._make_per_channel_quantized_tensor(weight.values, weight.scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


def _multiply(rows: Tensor, packed: Any, level: int | None = None) -> Tensor:
    """Rows float32 [M, K] of whole values up to `level` -> their product with the scaled weights, float32 [M, N]."""
    middle = 1 + (level or max_activation_level())
    out: Tensor = getattr(torch.ops.quantized, _PRODUCT)(rows, 1.0, middle, packed)
    return out
