"""What quantizing does beside outlier channels at full width: layers of OPT-6.7B's shape, with random weights.

    python -m benchmarks.outliers [--layers 4]

Seven channels of what every linear layer after a norm reads are 20 to 60 times as large as the others, as in OPT from
6.7 billion parameters on (Dettmers et al., LLM.int8, 2022). Printed beside fp32 on the same weights: top-1 agreement of
the next token and the mean KL divergence in nats, with the weights alone quantized, with activations in 8 bits
without the hi/lo split and with it, and in int4; then the same without outliers. Next tokens of random
weights are close to one another, and what quantizing the weights alone leaves is the most that any arithmetic could
reach. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor, nn

from blip2.modeling.config import Mode, OptConfig
from blip2.modeling.opt import Opt, OptDecoderLayer
from blip2.quantization.apply import quantize_model, quantized_layers
from blip2.quantization.linear import Int8Linear
from default_model.initial_weights import init_weights

CHANNELS = (7, 512, 1023, 1900, 2777, 3333, 4000)
VARIANTS: tuple[
    tuple[str, Mode, bool | None], ...
] = (  # with the hi/lo split? None: activations are not quantized
    ("int8, weights alone", "int8", None),
    ("int8, without the hi/lo split", "int8", False),
    ("int8", "int8", True),
    ("int4, weights alone", "int4", None),
    ("int4", "int4", True),
)
LENGTH = 36  # of each sequence: 32 queries and a prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for planted in (True, False):
        original = build(arguments.layers, planted)
        exact = next_tokens(original, arguments.sequences)
        for name, mode, hi_lo in VARIANTS:
            model = copy.deepcopy(original)
            parent = nn.ModuleDict({"language": model})
            if hi_lo is not None:
                quantize_model(parent, mode)
            else:
                for _, layer, kind in quantized_layers(parent, mode):
                    layer.weight.data = kind.of(layer.weight.data).float()
            for part in model.modules():
                if isinstance(part, Int8Linear):
                    part.hi_lo = bool(hi_lo)
            logprobs = next_tokens(model, arguments.sequences)
            row = {
                "top1": round(float((logprobs.argmax(-1) == exact.argmax(-1)).float().mean()), 4),
                "kl": round(float((exact.exp() * (exact - logprobs)).sum(-1).mean()), 6),
            }
            key = f"{name}, {'with' if planted else 'without'} outliers"
            figures[key] = row
            print(f"{key}: top-1 agreement {row['top1']:.1%}, KL {row['kl']:.5f}", flush=True)
    print(json.dumps({"layers": arguments.layers, "positions": arguments.sequences * LENGTH, **figures}))


def build(layers: int, planted: bool) -> Opt:
    """The same model every time; `planted`: seven channels after each norm are 20 to 60 times as large."""
    model = Opt(OptConfig(hidden_size=4096, ffn_dim=16384, num_hidden_layers=layers))
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers:
        assert isinstance(layer, OptDecoderLayer)
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
            times = 20 + 40 * torch.rand(len(CHANNELS), generator=generator)
            if planted:
                norm.weight.data[list(CHANNELS)] *= times
    return model.eval()


@torch.inference_mode()
def next_tokens(model: Opt, sequences: int) -> Tensor:
    """Log-probabilities at every position of random sequences: [sequences * LENGTH, V]."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(sequences, LENGTH, model.config.hidden_size, generator=generator)
    logits = model.lm_head(model(embeddings)).float()
    return logits.log_softmax(-1).flatten(0, 1)


if __name__ == "__main__":
    main()
