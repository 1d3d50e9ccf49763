"""Linear layers that are swapped in at load for bf16 weights on CPUs: see `apply.prepack` and `apply.widen`."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Self

import torch
from torch import Tensor, nn

from blip2.modeling.layers import lacks_native_bf16

_PACKED_ROWS = 5  # rows a weight is packed for: five beams; the packed weight serves any number
_WIDEN_FROM_ROWS = 8  # with fewer, reading the weight is what takes the time
_WIDENED_OUTPUTS = 256  # outputs whose weights are widened together: 4 MB of them at OPT-6.7B's width


def malloc_trim() -> None:
    """Return freed memory to the system, where the allocator would keep it between what is in use.

    While weights are packed one by one it would keep about as much as the weights take. Nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _PackedProduct(torch.autograd.Function):
    """A product with a packed weight that gradients pass; backward unpacks the weight for a moment only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.packed = packed
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.packed.to_dense(), None


class PackedLinear(nn.Module):
    """A linear layer with a bf16 weight in the blocked layout that oneDNN reads, and in no other.

    For inference on a CPU with bf16 instructions: at few rows torch reads a plain weight at half of what the memory
    gives. Gradients pass to the input; the weight itself is no parameter and stays bf16 on the CPU, whatever the model
    is moved to. `state_dict` gives it plainly, `load_state_dict` takes it so, and copies and pickles hold it.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """weight: bf16 [N, K]. bias: [N] in any float."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, bf16 [N, K]."""
        plain: Tensor = self._packed.to_dense()
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] in any float -> [..., N] in the same."""
        narrow = x.to(torch.bfloat16)  # between quantized layers activations are fp32
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if torch.is_grad_enabled():
            product: Tensor = _PackedProduct.apply(narrow, self._packed)  # type: ignore[no-untyped-call]
            return (product if bias is None else product + bias).to(x.dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(narrow, self._packed, bias, "none", [], None)
        return out.to(x.dtype)

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError(
                "packed weights cannot be trained: load the model without packing (prepack=False), "
                "or call blip2.quantization.apply.unpack(model)"
            )
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": self.weight}  # a packed tensor can be neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(state["_packed"], _PACKED_ROWS)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        weight = state_dict.pop(name := f"{prefix}weight", None)  # of load_state_dict's own copy
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if weight is None:
            missing.append(name)
        elif weight.shape != (shape := (self.out_features, self.in_features)):
            errors.append(f"size mismatch for {name}: {tuple(weight.shape)} instead of {shape}")
        else:
            plain = weight.detach().to("cpu", torch.bfloat16)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(plain, _PACKED_ROWS)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed bf16"


class WideningLinear(nn.Linear):
    """A linear layer that widens its bf16 weight to fp32 a block at a time, for inference on CPUs without bf16.

    Sums are fp32's. With AVX2 that is six times as fast as torch at 677 rows of 4096 values, an image's. In other
    dtypes, at few rows and for training it is `nn.Linear`.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """A layer that shares another's parameters."""
        nn.Module.__init__(self)  # nn.Linear's would draw a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.numel() // self.in_features
        if rows < _WIDEN_FROM_ROWS or not lacks_native_bf16(self.weight) or torch.is_grad_enabled():
            return super().forward(x)
        flat = x.reshape(rows, self.in_features).float()
        out = x.new_empty(rows, self.out_features)
        widened = flat.new_empty(min(_WIDENED_OUTPUTS, self.out_features), self.in_features)
        bias = out.new_zeros(self.out_features) if self.bias is None else self.bias
        for start in range(0, self.out_features, _WIDENED_OUTPUTS):
            block = slice(start, min(start + _WIDENED_OUTPUTS, self.out_features))
            weight = widened[: block.stop - start].copy_(self.weight[block])
            out[:, block] = torch.addmm(bias[block].float(), flat, weight.mT)
        return out.view(*x.shape[:-1], self.out_features)
