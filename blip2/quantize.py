"""Linear layers in 8 and 4 bits: [..., K] -> [..., N] from weights that take a quarter and an eighth of fp32's memory.

Weights are rounded once, activations as they come, each token by its own largest value, so that what stands beside a
row in a batch changes nothing. Norms, softmax and logits stay as they are; the table of word embeddings is rounded too,
a scale a word.

Outlier channels: OPT has a handful of dimensions 20 to 60 times larger than the rest (Dettmers et al., LLM.int8, 2022),
and a token rounded to 8 bits by its largest value loses all others. Where that matters a token is therefore written as
two 8 bit terms, the second one what the first leaves over: 15 bits in all, at no cost where reading weights is what
takes the time. Nothing has to be calibrated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2 import openvino_product
from blip2.layers import give_back_memory, processor_has_bf16
from blip2.openvino_product import Product

Mode = Literal["int8", "int4"]
MODES: tuple[Mode, ...] = ("int8", "int4")

GROUP = 128  # weights that share a scale in int4
WORDS = ("language.embed_tokens", "language.shared")  # OPT's and T5's table of word embeddings
KEPT = "vision.layers.0.mlp."  # stays as it is, see `layers`
# Shares of a group's range that are tried: cutting off an extreme may round all the others better.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# A token whose largest value is so many times its mean size is written in two terms. Of 4096 normally distributed
# values the largest is 5 times the mean size, of 16384 after a ReLU 11 times, beside seven outlier channels 100 times.
STEEP = 12.0
_NONE = torch.empty(0, dtype=torch.int64)
_AT_ONCE = 1 << 19  # weights rounded together: what that takes stays small, and in the processor's caches


@dataclass(frozen=True)
class Rounded8:
    """A weight in 8 bits: values int8 [N, K], and the scale float32 [N] of each row."""

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Rounded8:
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

    def to(self, device: torch.device) -> Rounded8:
        """The same on a device."""
        return Rounded8(self.values.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Rounded4:
    """A weight in 4 bits: values uint8 [N, K / 2], two a byte, the first one low.

    A value q stands for (q - zero) * scale; scales bfloat16 and zeros uint8 [N, groups].
    mapped: whether the values are those of a file, mapped.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    mapped: bool = field(default=False, kw_only=True)

    @classmethod
    def of(cls, weight: Tensor) -> Rounded4:
        """Round a float weight [N, K], K a multiple of GROUP.

        Every group's range is cut by the share that leaves the smallest squared error; then its scale is that of least
        squares.
        """
        rows = max(1, _AT_ONCE // weight.shape[1])
        parts = [cls._of(part) for part in weight.split(rows)]
        return cls(*map(torch.cat, zip(*(part.parts for part in parts), strict=True)))

    @classmethod
    def _of(cls, weight: Tensor) -> Rounded4:
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

    def rows(self, these: slice) -> Rounded4:
        """Some of its outputs' weights."""
        return Rounded4(self.values[these], self.scales[these], self.zeros[these])

    def to(self, device: torch.device) -> Rounded4:
        """The same on a device."""
        mapped = self.mapped and device.type == "cpu"
        values, scales, zeros = (part.to(device) for part in self.parts)
        return Rounded4(values, scales, zeros, mapped=mapped)


Rounded = Rounded8 | Rounded4


class Int8Linear(nn.Module):
    """A linear layer with a scale for each output and 8 bit activations, in one term or two.

    On x86 the product is FBGEMM's, exact in whole numbers: a row gives the same bits alone and in any batch. Elsewhere
    the weights are widened for each product, which saves memory, not time.
    """

    def __init__(self, weight: Rounded8, bias: Tensor | None, terms: int, steep: float = STEEP) -> None:
        """bias: [N] in any float. terms: 1 or 2, of the activations. steep: see `STEEP`; 0: every token is."""
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.terms, self.steep = terms, steep
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        packs = weight.values.device.type == "cpu" and levels() > 0
        self._packed: Any = _pack(weight) if packs else None
        self._plain = None if packs else weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] in any float -> [..., N] in the same."""
        rows = x.reshape(-1, self.in_features)
        if self._plain is not None:
            out = F.linear(rows, self._plain.values.to(x.dtype)).float() * self._plain.scale
            if self.bias is not None:
                out = out + self.bias
        else:
            out = self._product(rows.float())
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        """rows float32 [M, K] -> float32 [M, N]."""
        most, sizes = levels(), rows.abs()
        largest = sizes.amax(dim=1, keepdim=True).clamp_(min=1e-30)  # [M, 1]
        step = largest / most
        scaled = rows / step
        first = scaled.round()  # FBGEMM would round some values close to halfway the other way
        again = self._again(sizes, largest)
        if len(again) == 0:
            out = _multiply(first, self._packed)
        else:
            second = (scaled[again] - first[again]).mul_(2 * most)  # what is left is at most a half
            both = _multiply(torch.cat([first, second]), self._packed)
            out = both[: len(rows)].index_add_(0, again, both[len(rows) :], alpha=0.5 / most)
        return out.mul_(step) if self.bias is None else torch.addcmul(self.bias, out, step)

    def _again(self, sizes: Tensor, largest: Tensor) -> Tensor:
        """The tokens that get a second term, by the sizes of their values [M, K] and the largest [M, 1]: int64 [k]."""
        if self.terms == 1:
            return _NONE
        if levels() < 127:
            return torch.arange(len(sizes))
        # the order of a sum depends on the batch: in double precision it decides nothing
        steep = largest > self.steep * sizes.mean(dim=1, keepdim=True, dtype=torch.float64)
        return steep.flatten().nonzero().flatten()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8, terms={self.terms}"


class Int8ImageLinear(nn.Module):
    """As `Int8Linear`, for the image encoder's hundreds of rows: oneDNN multiplies, twice as fast at so many.

    A token is rounded once, in 256 steps between its smallest value and its largest. What comes out of a GELU is nearly
    all positive: between the negative and the positive largest value it would have half as many.
    """

    def __init__(self, weight: Rounded8, bias: Tensor | None, out: torch.dtype | None = None) -> None:
        """bias: [N] in any float. out: the dtype of what comes out; None: as what comes in."""
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.out = out
        self.bias = nn.Parameter(
            torch.zeros(self.out_features) if bias is None else bias.float(), requires_grad=False
        )
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] in any float -> [..., N]."""
        rows = x.reshape(-1, self.in_features).float().contiguous()
        # torch rounds the rows of embedding tables so: [M, K] in 0 .. 255, each row's step and smallest value after it
        rounded = torch.ops.quantized.embedding_bag_byte_prepack(rows)
        steps, ends = rounded.split([self.in_features, 8], dim=1)
        step, low = ends.contiguous().view(torch.float32).split(1, dim=1)  # [M, 1]
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            steps.contiguous(),
            1.0,
            0,
            self._packed,
            self.scale,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        # in place: new memory for the rows of an image takes as long as what is computed
        out.mul_(step).addcmul_(low, self.sums).add_(self.bias)
        return out.to(self.out or x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


class Int8Embedding(nn.Module):
    """A table of embeddings with a scale for each: ids [...] -> float32 [..., W]."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Rounded8) -> None:
        super().__init__()
        self.register_buffer("values", weight.values, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.values[ids] * self.scale[ids][..., None]
        return out


class Int4Linear(nn.Module):
    """A linear layer in 4 bits, with a scale and a zero for every `GROUP` inputs of an output.

    OpenVINO multiplies where it is installed and the processor has VNNI, with activations in 8 bits, a scale for every
    `GROUP` of them; torch elsewhere, with activations in bfloat16. Either way a row gives the same bits in any batch.
    """

    def __init__(self, weight: Rounded4, bias: Tensor | None) -> None:
        """bias: [N] in any float."""
        super().__init__()
        self.out_features, self.in_features = len(weight.values), 2 * weight.values.shape[1]
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self._product: Product | None = None
        self._plain = None
        if weight.values.device.type != "cpu":
            self._plain = weight
        elif openvino_multiplies():
            self._product = Product(weight.values, weight.scales, weight.zeros, mapped=weight.mapped)
        else:
            zeros = (8 - weight.zeros.float()) * weight.scales.float()  # torch's kernel adds them
            pairs = torch.stack([weight.scales, zeros.bfloat16()], dim=-1).transpose(
                0, 1
            )  # [K / GROUP, N, 2]
            rows = max(
                64, _AT_ONCE // self.in_features // 64 * 64
            )  # the layout's blocks have 64 outputs at most
            parts = (weight.rows(slice(i, i + rows)) for i in range(0, self.out_features, rows))
            packed = torch.cat(
                [torch._convert_weight_to_int4pack_for_cpu(part.unpacked().int(), 1) for part in parts]
            )
            self.register_buffer("pairs", pairs.contiguous(), persistent=False)
            self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] in any float -> [..., N] in the same."""
        rows = x.reshape(-1, self.in_features)
        out: Tensor
        if self._product is not None:
            out = self._product(rows.float())
        elif self._plain is None:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.packed, GROUP, self.pairs)
        else:
            out = F.linear(rows.bfloat16(), self._plain.float().bfloat16())
        out = out.float()
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int4, group={GROUP}"


# --- FBGEMM ----------------------------------------------------------------------------------------------------------


_PRODUCT = "linear_with_input_q_dq_qweight_dq_output_fp32"


@lru_cache(maxsize=1)
def levels() -> int:
    """How far 8 bit activations may go on this processor, 0 where FBGEMM does not run.

    127, or 63 where instructions for whole numbers (VNNI) are missing: sums of two products are then held in 16 bits
    and cut off beyond them. Found by trying, so that a torch without these operators is no error either.
    """
    known = hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, _PRODUCT)
    if "fbgemm" not in torch.backends.quantized.supported_engines or not known:
        return 0
    packed = _pack(Rounded8(torch.full((1, 64), 127, dtype=torch.int8), torch.ones(1)))
    return 127 if float(_multiply(torch.full((1, 64), 127.0), packed, 127)) == 64 * 127 * 127 else 63


def onednn_multiplies() -> bool:
    """Whether oneDNN multiplies 8 bit values here and is quick at it: on x86 with VNNI."""
    return levels() == 127 and hasattr(torch.ops.onednn, "qlinear_pointwise")


def openvino_multiplies() -> bool:
    """Whether OpenVINO multiplies 4 bit weights here: where it is installed, on x86 with VNNI."""
    return levels() == 127 and openvino_product.installed()


@contextmanager
def _packing() -> Iterator[None]:
    """Weights are packed for FBGEMM meanwhile, in all threads."""
    engine = torch.backends.quantized.engine
    if engine == "fbgemm":  # whoever began sets it back
        yield
        return
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = engine


def _pack(weight: Rounded8) -> Any:
    """A weight in FBGEMM's layout."""
    zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
    with _packing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases announce that these tensors will go; see `levels`
        tensor = torch._make_per_channel_quantized_tensor(weight.values, weight.scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


def _multiply(rows: Tensor, packed: Any, most: int | None = None) -> Tensor:
    """Rows float32 [M, K] of values up to `most`, rounded -> their product with the scaled weights, float32 [M, N]."""
    middle = 1 + (most or levels())
    out: Tensor = getattr(torch.ops.quantized, _PRODUCT)(rows, 1.0, middle, packed)
    return out


# --- models ----------------------------------------------------------------------------------------------------------


def layers(model: nn.Module, mode: Mode) -> Iterator[tuple[str, nn.Module, type[Rounded8] | type[Rounded4]]]:
    """What a mode rounds: name, layer, and how its weight is rounded; the largest first.

    All linear layers of image encoder, Q-Former and language model, its head included, and its word embeddings, but not
    the first feed-forward of the image encoder: rounding that does as much harm to the default matcher's image features
    as rounding all the rest of the encoder. In "int4" the linear layers of the language model are in 4 bits, all others
    in 8, and so are its head and the first and last layer of each stack: in 4 bits the default model's first layer
    alone does half of all harm.
    """
    ends = _ends(model)
    found: list[tuple[str, nn.Module, Tensor]] = []
    for name, module in model.named_modules():
        inside = name.split(".", 1)[0] in ("vision", "qformer", "language")
        if inside and not name.startswith(KEPT) and (isinstance(module, nn.Linear) or name in WORDS):
            assert isinstance(module, nn.Linear | nn.Embedding)
            found.append((name, module, module.weight))
    # what rounding takes besides is largest for the largest, and least is there yet when they come first
    for name, module, weight in sorted(found, key=lambda each: -each[2].numel()):
        eight = name in (*WORDS, "language.lm_head") or name.startswith(ends)
        four = mode == "int4" and name.startswith("language.") and not eight
        yield name, module, Rounded4 if four and weight.shape[1] % GROUP == 0 else Rounded8


def _ends(model: nn.Module) -> tuple[str, ...]:
    """How names in the first and last layers of the language model begin."""
    stacks = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    deep = [
        (name, len(part))
        for name, part in stacks
        if name.startswith("language.") and name.endswith(".layers")
    ]
    return tuple(f"{name}.{index}." for name, count in deep for index in (0, count - 1))


def quantize(
    model: nn.Module, mode: Mode, read: Callable[[str, type[Rounded]], Rounded] | None = None
) -> None:
    """Put rounded layers in the place of a model's, two at a time. In place.

    Args:
        model: in eval mode. With `read` its weights need not be there; biases come later, by load_state_dict.
        mode: "int8" or "int4".
        read: gives a layer's weight rounded, by the layer's name; None: the model's own weights are rounded.
    """

    def make(name: str, layer: nn.Module, kind: type[Rounded8] | type[Rounded4]) -> None:
        assert isinstance(layer, nn.Linear | nn.Embedding)
        weight = kind.of(layer.weight.detach()) if read is None else read(name, kind)
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, _layer(name, layer, weight))
        give_back_memory()

    fbgemm = _packing() if levels() else nullcontext()
    with fbgemm, ThreadPoolExecutor(2) as pool:  # one reads or rounds while the other packs
        for done in [pool.submit(make, *each) for each in list(layers(model, mode))]:
            done.result()


def _layer(name: str, layer: nn.Linear | nn.Embedding, weight: Rounded) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        assert isinstance(weight, Rounded8)
        return Int8Embedding(weight)
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(weight, Rounded4):
        return Int4Linear(weight, bias)
    if name.startswith("vision.") and weight.values.device.type == "cpu" and onednn_multiplies():
        # an image's attention is quicker in bf16, and what eight bits leave of a value fits into it
        narrow = name.endswith(".qkv") and processor_has_bf16()
        return Int8ImageLinear(weight, bias, torch.bfloat16 if narrow else None)
    # the Q-Former is small, and everything that is said of an image goes through it: all its tokens get two terms
    return Int8Linear(weight, bias, 2, 0 if name.startswith("qformer.") else STEEP)
