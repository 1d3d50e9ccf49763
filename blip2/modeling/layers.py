"""What the model's parts share: activations, attention, and what this CPU does in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16."""
    # a torch without oneDNN, as on Apple's processors, lacks it
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def lacks_native_bf16(weight: Tensor) -> bool:
    """Whether products with a weight are slow for want of instructions: bf16 on a CPU without them."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not cpu_has_bf16()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# By Hugging Face's names, several of which mean the same.
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

_MIN_POSITIONS = 128  # an image's; a text has fewer


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, W] -> [B, H, T, W / H]."""
    out: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return out


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention: query [B, H, T, D]; key and value [B, H, S, D] -> [B, H, T, D].

    mask: broadcastable to [B, H, T, S]; bool: True may be seen; float: is added to the scores.
    causal: position t sees s <= t (needs T == S and no mask). scale: of the scores; None: D ** -0.5.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not causal:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if query.requires_grad:
            # torch's fused attention runs its bf16 backward on the CPU several times slower than these three steps
            scores = (query * factor) @ key.mT
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return torch.matmul(scores.softmax(-1).to(value.dtype), value)
        is_image = mask is None and query.shape[2] >= _MIN_POSITIONS
        if is_image and cpu_has_bf16() and not torch.is_grad_enabled():
            return _attend_by_head(query, key, value, factor)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def _attend_by_head(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every position to every other, a head at a time, so that its scores stay in the processor's cache.

    At an image's positions in bf16 this is faster than torch's fused attention.
    """
    out = query.new_empty(query.shape)  # [B, H, T, D]
    unused = query.new_empty(1)
    heads = (part.flatten(0, 1) for part in (out, query, key, value))  # each [B * H, T, D]
    for o, q, k, v in zip(*heads, strict=True):
        scores = torch.addmm(unused, q, k.mT, beta=0, alpha=scale)  # [T, S]
        torch.mm(scores.softmax(-1), v, out=o)
    return out
