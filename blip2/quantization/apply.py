"""Swapping a model's linear layers: for int8 and int4 ones (`quantize_model`), and for bf16 ones that suit the CPU.

Weights are quantized once, activations as they come, each token by its own largest value, so that its batch changes
nothing. Norms, softmax and logits stay as they are; the table of word embeddings is quantized too, a scale a word.

Outlier channels: OPT has a handful of dimensions 20 to 60 times larger than the rest (Dettmers et al., LLM.int8, 2022),
and a token quantized to 8 bits by its largest value loses all others. Where that matters a token is therefore split in
hi and lo, 8 bits each, lo being what hi leaves over: 15 bits in all, at no cost where reading weights is what takes the
time. Nothing has to be calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from blip2.modeling.config import LANGUAGE_CONFIGS, Mode
from blip2.modeling.layers import cpu_has_bf16, lacks_native_bf16
from blip2.quantization import linear
from blip2.quantization.formats import GROUP, Int4Weight, Int8Weight, QuantizedWeight
from blip2.quantization.linear import OUTLIER_RATIO, Int4Linear, Int8Embedding, Int8ImageLinear, Int8Linear
from blip2.quantization.packed import PackedLinear, WideningLinear, malloc_trim

EMBEDDINGS = tuple(f"language.{config.word_embeddings}" for config in LANGUAGE_CONFIGS)
EXCLUDED = "vision.layers.0.mlp."  # not quantized, see `quantized_layers`
_TOWERS = ("vision", "qformer", "language")  # whose layers are swapped; the matcher's small heads stay


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that can be swapped, by name: those of image encoder, Q-Former and language model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".", 1)[0] in _TOWERS:
            yield name, module


# --- int8 and int4 ---------------------------------------------------------------------------------------------------


def quantized_layers(
    model: nn.Module, mode: Mode
) -> Iterator[tuple[str, nn.Linear | nn.Embedding, type[Int8Weight] | type[Int4Weight]]]:
    """What a mode quantizes: name, layer, and the format of its weight; the largest first.

    All linear layers of image encoder, Q-Former and language model, its head included, and its word embeddings, but not
    the first feed-forward of the image encoder: quantizing that does as much harm to the default matcher's image
    features as quantizing all the rest of the encoder. In "int4" the linear layers of the language model are in 4 bits,
    all others in 8, and so are its head and the first and last layer of each stack: in 4 bits the default model's first
    layer alone does half of all harm.
    """
    ends: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.startswith("language.") and name.endswith(".layers"):
            ends += (f"{name}.0.", f"{name}.{len(module) - 1}.")
    layers: dict[str, nn.Linear | nn.Embedding] = {
        name: layer for name, layer in linear_layers(model) if not name.startswith(EXCLUDED)
    }
    for name, module in model.named_modules():
        if name in EMBEDDINGS and isinstance(module, nn.Embedding):
            layers[name] = module
    # the memory that quantizing takes is largest for the largest, and least is in use when they come first
    for name, layer in sorted(layers.items(), key=lambda entry: -entry[1].weight.numel()):
        eight = name in (*EMBEDDINGS, "language.lm_head") or name.startswith(ends)
        four = mode == "int4" and name.startswith("language.") and not eight
        yield name, layer, Int4Weight if four and layer.weight.shape[1] % GROUP == 0 else Int8Weight


def quantize_model(
    model: nn.Module, mode: Mode, read: Callable[[str, type[QuantizedWeight]], QuantizedWeight] | None = None
) -> None:
    """Put quantized layers in the place of a model's, two at a time. In place.

    Args:
        model: in eval mode. With `read` its weights need not be there; biases come later, by load_state_dict.
        mode: "int8" or "int4".
        read: gives a layer's quantized weight, by the layer's name; None: the model's own weights are quantized.
    """

    def swap(name: str, layer: nn.Linear | nn.Embedding, kind: type[Int8Weight] | type[Int4Weight]) -> None:
        weight = kind.of(layer.weight.detach()) if read is None else read(name, kind)
        model.set_submodule(name, _quantized(name, layer, weight))
        malloc_trim()

    fbgemm = linear.fbgemm_engine() if linear.max_activation_level() else nullcontext()
    with fbgemm, ThreadPoolExecutor(2) as pool:  # one reads or quantizes while the other packs
        for swapped in [pool.submit(swap, *entry) for entry in list(quantized_layers(model, mode))]:
            swapped.result()


def _quantized(name: str, layer: nn.Linear | nn.Embedding, weight: QuantizedWeight) -> nn.Module:
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
    # the Q-Former is small, and all the language model learns of an image goes through it: all its tokens are split
    return Int8Linear(weight, bias, outlier_ratio=0 if name.startswith("qformer.") else OUTLIER_RATIO)


# --- bf16 ------------------------------------------------------------------------------------------------------------


def prepack(model: nn.Module, read: Mapping[str, Callable[[], Tensor]] | None = None) -> None:
    """Put `PackedLinear` in the place of linear layers, for inference on a CPU with bf16 instructions. In place.

    Args:
        model: in eval mode; what its `state_dict` gives stays the same.
        read: by the names of the layers to pack, what reads each one's weight, in any float: one is read while the one
            before is packed, and then dropped. None: all that have bf16 weights of their own are packed.
    """
    if read is None:
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        read = {
            name: partial(model.get_parameter, f"{name}.weight")
            for name, layer in linear_layers(model)
            # a head that shares its weight with the word embeddings is needed as it is
            if layer.weight.dtype == torch.bfloat16 and not any(layer.weight is table for table in tables)
        }
    names = list(read)
    with ThreadPoolExecutor(1) as reader:
        reading = [reader.submit(read[name]) for name in names[:1]]
        for name, following in zip_longest(names, names[1:]):
            weight = reading.pop().result().detach().to(torch.bfloat16)
            if following is not None:
                reading.append(reader.submit(read[following]))
            bias = model.get_submodule(name).bias
            assert bias is None or isinstance(bias, nn.Parameter)
            model.set_submodule(name, PackedLinear(weight, bias).eval())
            del weight
            malloc_trim()


def unpack(model: nn.Module) -> None:
    """Undo `prepack`: plain linear layers again, whose weights can be trained, moved and cast. In place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            with torch.inference_mode(False):  # an inference tensor could never be trained
                plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
                plain.weight = nn.Parameter(layer.weight)
                plain.register_parameter("bias", layer.bias)
                model.set_submodule(name, plain.eval())


def widen(model: nn.Module) -> None:
    """Put `WideningLinear` in the place of linear layers with bf16 weights, on a CPU without bf16. In place.

    They share the weights, and are as trainable as before.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and lacks_native_bf16(layer.weight):
            model.set_submodule(name, WideningLinear(layer).train(layer.training))
