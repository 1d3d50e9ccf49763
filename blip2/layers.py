"""What the model's parts are built from: activations, attention, feed-forward, what a decoder has read and written."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Scaled dot-product attention.

    Args:
        query: [B, H, T, D].
        key, value: [B, H, S, D].
        mask: broadcastable to [B, H, T, S]; bool: True may be seen; float: is added to the scores.
        causal: position t sees s <= t (needs T == S and no mask).
        scale: of the scores; None: D ** -0.5.

    Returns:
        [B, H, T, D].
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad and not causal:
        # torch's fused attention runs its bf16 backward on the CPU several times slower than these three steps
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        out: Tensor = scores.softmax(-1).to(value.dtype) @ value
        return out
    if _is_image_in_bf16(query) and mask is None and not causal and not torch.is_grad_enabled():
        return _attend_by_head(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


_MANY = 128  # positions


def _is_image_in_bf16(query: Tensor) -> bool:
    narrow = query.dtype == torch.bfloat16 and query.device.type == "cpu" and processor_has_bf16()
    return narrow and query.shape[2] >= _MANY


def _attend_by_head(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every position to every other, a head at a time, so that its scores stay in the processor's cache.

    At an image's positions in bf16 this is faster than torch's fused attention.
    """
    out = query.new_empty(query.shape)  # [B, H, T, D]
    unused = query.new_empty(1)
    each = (part.flatten(0, 1) for part in (query, key, value))
    for into, q, k, v in zip(out.flatten(0, 1), *each, strict=True):
        scores = torch.addmm(unused, q, k.mT, beta=0, alpha=scale)  # [T, S]
        torch.mm(scores.softmax(-1), v, out=into)
    return out


@lru_cache(maxsize=1)
def processor_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 by itself."""
    # a torch without oneDNN, as on Apple's processors, lacks it
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def slow(weight: Tensor) -> bool:
    """Whether products with a weight are slow for want of instructions: bf16 on a processor without them."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not processor_has_bf16()


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return trim
    return None


def give_back_memory() -> None:
    """Give what was freed back to the system, where the allocator would keep it between what is in use.

    While weights are laid out one by one it would keep about as much as the weights take.
    """
    if (trim := _trim()) is not None:
        trim(0)


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
        if rows < _WIDE_FROM or not slow(self.weight) or torch.is_grad_enabled():
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


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: [..., width] -> [..., width]."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)
        self.activation = ACTIVATION[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


@dataclass(frozen=True)
class Context:
    """What a decoder has read: the keys and values of every layer. A value: reading on gives a new one.

    layers: one (keys, values) pair a layer, each [B, H, S, D].
    mask: bool [B, S], False where a position is padding.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @property
    def length(self) -> int:
        """Positions read, padding included."""
        return self.mask.shape[1]

    def select(self, rows: Tensor) -> Context:
        """The context of the prompts `rows` (int64 [k]), in that order."""
        return Context(tuple((k[rows], v[rows]) for k, v in self.layers), self.mask[rows])

    def expand(self, rows: int) -> Context:
        """A context of one prompt as the context of `rows` prompts, without copying."""
        assert self.mask.shape[0] == 1, "only a single prompt's context can be expanded"
        return Context(
            tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.layers),
            self.mask.expand(rows, -1),
        )


def join_contexts(contexts: Sequence[Context]) -> Context:
    """What several decoders have read as what one has; the shorter ones padded on the left."""
    if len(contexts) == 1:
        return contexts[0]
    firsts = [int(context.mask.any(0).int().argmax()) for context in contexts]  # padding all have is left out
    length = max(context.length - first for context, first in zip(contexts, firsts))
    pads = [length - context.length + first for context, first in zip(contexts, firsts)]

    def join(parts: Iterable[Tensor]) -> Tensor:  # each [B, H, S, D]
        cut = (part[:, :, first:] for part, first in zip(parts, firsts))
        return torch.cat([F.pad(part, (0, 0, pad, 0)) for part, pad in zip(cut, pads)])

    layers = zip(*(context.layers for context in contexts), strict=True)
    joined = tuple((join(k for k, _ in layer), join(v for _, v in layer)) for layer in map(tuple, layers))
    masks = (context.mask[:, first:] for context, first in zip(contexts, firsts))
    return Context(joined, torch.cat([F.pad(mask, (pad, 0)) for mask, pad in zip(masks, pads)]))


class Tail:
    """Keys and values of the tokens written so far, one buffer a layer, allocated once.

    length: the tokens of the row that has written most.
    starts: int64 [R], where each row's tokens begin, where some began later; None: all at 0.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        """`shape`: layers, rows, heads, tokens at most, width of a head. Device and dtype are those of `like`."""
        self.buffer = like.new_empty((shape[0], 2, *shape[1:]))
        self.length = 0
        self.starts: Tensor | None = None

    @property
    def written(self) -> Tensor | int:
        """How many tokens each row has written: one number, or int64 [R]."""
        return self.length if self.starts is None else self.length - self.starts

    @property
    def unwritten(self) -> Tensor | None:
        """bool [R, length + 1], True before a row's first token; None where all rows began together."""
        if self.starts is None:
            return None
        return torch.arange(self.length + 1, device=self.starts.device) < self.starts[:, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [R, H, 1, D]; all of this layer's so far: [R, H, t + 1, D]."""
        here, end = self.buffer[layer], self.length + 1
        here[0, :, :, self.length : end] = key
        here[1, :, :, self.length : end] = value
        return here[0, :, :, :end], here[1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; fewer rows drop the rest, more repeat them."""
        written = self.buffer[..., : self.length, :].index_select(2, rows)
        layers, pair, before, *shape = self.buffer.shape
        if len(rows) > before:
            self.buffer = self.buffer.new_empty(layers, pair, len(rows), *shape)
        self.buffer = self.buffer[:, :, : len(rows)]
        self.buffer[..., : self.length, :] = written
        if self.starts is not None:
            self.starts = self.starts[rows]

    def join(self, other: Tail) -> Tail:
        """The rows of both, whose last tokens then stand at the same place."""
        tails = (self, other)
        starts = [
            self.buffer.new_zeros(tail.buffer.shape[2], dtype=torch.int64)
            if tail.starts is None
            else tail.starts
            for tail in tails
        ]
        firsts = [int(start.min()) for start in starts]  # what nobody needs any more is left out
        length = max(tail.length - first for tail, first in zip(tails, firsts))
        room = max(tail.buffer.shape[-2] - tail.length for tail in tails)
        layers, _, _, heads, _, width = self.buffer.shape
        joined = Tail((layers, sum(map(len, starts)), heads, length + room, width), self.buffer)
        joined.buffer[..., :length, :] = 0  # garbage times a weight of 0 may be NaN
        row = 0
        for tail, first, start in zip(tails, firsts, starts):
            to = length - tail.length + first
            joined.buffer[:, :, row : row + len(start), :, to:length] = tail.buffer[
                ..., first : tail.length, :
            ]
            row += len(start)
        joined.length = length
        joined.starts = torch.cat([start + length - tail.length for tail, start in zip(tails, starts)])
        return joined
