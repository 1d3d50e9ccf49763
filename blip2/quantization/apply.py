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

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blip2.quantization import linear
from blip2.quantization.formats import GROUP, Int4Weight, Int8Weight, Mode, QuantizedWeight
from blip2.quantization.linear import OUTLIER_RATIO, Int4Linear, Int8Embedding, Int8ImageLinear, Int8Linear
from blip2.quantization.packed import cpu_has_bf16, malloc_trim

EMBEDDINGS = ("language.embed_tokens", "language.shared")  # OPT's and T5's table of word embeddings
EXCLUDED = "vision.layers.0.mlp."  # stays as it is, see `layers`


# --- FBGEMM ----------------------------------------------------------------------------------------------------------


# --- models ----------------------------------------------------------------------------------------------------------


def layers(
    model: nn.Module, mode: Mode
) -> Iterator[tuple[str, nn.Module, type[Int8Weight] | type[Int4Weight]]]:
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
        if inside and not name.startswith(EXCLUDED) and (isinstance(module, nn.Linear) or name in EMBEDDINGS):
            assert isinstance(module, nn.Linear | nn.Embedding)
            found.append((name, module, module.weight))
    # what rounding takes besides is largest for the largest, and least is there yet when they come first
    for name, module, weight in sorted(found, key=lambda each: -each[2].numel()):
        eight = name in (*EMBEDDINGS, "language.lm_head") or name.startswith(ends)
        four = mode == "int4" and name.startswith("language.") and not eight
        yield name, module, Int4Weight if four and weight.shape[1] % GROUP == 0 else Int8Weight


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
    model: nn.Module, mode: Mode, read: Callable[[str, type[QuantizedWeight]], QuantizedWeight] | None = None
) -> None:
    """Put rounded layers in the place of a model's, two at a time. In place.

    Args:
        model: in eval mode. With `read` its weights need not be there; biases come later, by load_state_dict.
        mode: "int8" or "int4".
        read: gives a layer's weight rounded, by the layer's name; None: the model's own weights are rounded.
    """

    def make(name: str, layer: nn.Module, kind: type[Int8Weight] | type[Int4Weight]) -> None:
        assert isinstance(layer, nn.Linear | nn.Embedding)
        weight = kind.of(layer.weight.detach()) if read is None else read(name, kind)
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, _layer(name, layer, weight))
        malloc_trim()

    fbgemm = linear._packing() if linear.levels() else nullcontext()
    with fbgemm, ThreadPoolExecutor(2) as pool:  # one reads or rounds while the other packs
        for done in [pool.submit(make, *each) for each in list(layers(model, mode))]:
            done.result()


def _layer(name: str, layer: nn.Linear | nn.Embedding, weight: QuantizedWeight) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        assert isinstance(weight, Int8Weight)
        return Int8Embedding(weight)
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(weight, Int4Weight):
        return Int4Linear(weight, bias)
    if name.startswith("vision.") and weight.values.device.type == "cpu" and linear.onednn_multiplies():
        # an image's attention is quicker in bf16, and what eight bits leave of a value fits into it
        narrow = name.endswith(".qkv") and cpu_has_bf16()
        return Int8ImageLinear(weight, bias, torch.bfloat16 if narrow else None)
    # the Q-Former is small, and everything that is said of an image goes through it: all its tokens get two terms
    return Int8Linear(weight, bias, 2, 0 if name.startswith("qformer.") else OUTLIER_RATIO)
