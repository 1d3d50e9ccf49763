"""Pre-training the image encoder, and initial weights, without any pre-trained model.

The image encoder learns from captions (CLIP's loss), which objects its patches show (`losses.region_loss`) and where
these are (`losses.place_loss`); `init_weights` initializes untrained modules, `qformer_from_matcher` copies stage 1's
result into stage 2's model. Queries and language model: see `queries.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.opt import Opt, OptDecoderLayer
from blip2.modeling.qformer import QFormerLayer
from blip2.modeling.vision import ImageEncoder, VisionBlock

Batch = Mapping[str, Tensor]


def init_mimetic(vision: ImageEncoder, seed: int) -> None:
    """Initialize an image encoder to resemble trained ones, so that it learns from far fewer images. In place.

    Query and key weights correlate, value and output weights together approximate a negative identity; position
    embeddings are sines and cosines of row and column. Trockman and Kolter, Mimetic Initialization of Self-Attention
    Layers (2023).
    """
    generator = torch.Generator().manual_seed(seed)
    width, grid = vision.config.hidden_size, vision.config.grid
    heads = vision.config.num_attention_heads
    size = width // heads

    def near_identity(noise: float, identity: float) -> tuple[Tensor, Tensor, Tensor]:
        matrix = torch.randn(width, width, generator=generator) * noise / math.sqrt(width)
        left, values, right = torch.linalg.svd(matrix + identity * torch.eye(width))
        return left, values.sqrt(), right

    with torch.no_grad():
        for layer in vision.layers:
            assert isinstance(layer, VisionBlock)
            query, key, value = layer.self_attn.qkv.weight.chunk(3)
            for head in range(heads):
                left, root, right = near_identity(0.7, 0.7)
                rows = slice(head * size, (head + 1) * size)
                query[rows] = (left[:, :size] * root[:size]).mT
                key[rows] = right[:size] * root[:size, None]
            left, root, right = near_identity(0.4, -0.4)
            value.copy_(root[:, None] * right)
            layer.self_attn.projection.weight.copy_(left * root)
        angles = torch.arange(float(grid))[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, W / 2]
        rows_and_columns = [waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)]
        vision.position_embedding[0, 1:] = 0.3 * torch.cat(rows_and_columns, dim=-1).flatten(0, 1)


def init_matching_heads(language: Opt, seed: int, *, heads: int = 2) -> None:
    """Initialize some heads of the first layer to attend to earlier equal tokens. In place, after `init_weights`.

    So what a question names is found in the prefix from the first step on; a small model takes thousands of steps to
    learn it, and answers "yes" or "no" by chance until then. Position embeddings start small, so that a word is similar
    everywhere.
    """
    width, count = language.config.hidden_size, language.config.num_attention_heads
    rows = heads * (width // count)
    noise = torch.randn(width, rows, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(noise)[0].mT  # [rows, W], orthonormal
    first = language.layers[0]
    assert isinstance(first, OptDecoderLayer)
    with torch.no_grad():
        first.self_attn.q_proj.weight[:rows] = directions
        first.self_attn.k_proj.weight[:rows] = directions
        language.embed_positions.weight *= 0.1


def init_weights(module: nn.Module, seed: int, *, std: float = 0.02) -> None:
    """Initial weights, in place: truncated normal for weights, zero for biases, one for norms; scalars stay unchanged.

    The Q-Former's feed-forward for queries starts as a copy of the one for text, if there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if isinstance(part, nn.LayerNorm):
                    parameter.fill_(float(name == "weight"))
                elif "bias" in name:
                    parameter.zero_()
                elif parameter.ndim >= 2:
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        for part in module.modules():
            if isinstance(part, QFormerLayer) and hasattr(part, "intermediate"):
                part.intermediate_query.load_state_dict(part.intermediate.state_dict())
                part.output_query.load_state_dict(part.output.state_dict())


# The text branch of stage 1's Q-Former, which stage 2 does not use.
_TEXT_BRANCH = (
    ".intermediate.",
    ".output.dense.",
    ".output.LayerNorm.",
    "word_embeddings.",
    "position_embeddings.",
)


def qformer_from_matcher(matcher: Blip2Matcher, model: Blip2) -> None:
    """Copy stage 1's image encoder, queries and Q-Former into the stage-2 model, without its text branch.

    Raises:
        ValueError: the two are of different sizes.
    """
    for part in ("vision", "qformer"):
        source, target = getattr(matcher, part).state_dict(), getattr(model, part).state_dict()
        spare = [name for name in source.keys() - target.keys() if not _is_text(name)]
        wrong = sorted(n for n in target if n not in source or source[n].shape != target[n].shape) + sorted(
            spare
        )
        if wrong:
            raise ValueError(
                f"the stage-1 model's {part} does not fit the stage-2 model's: {', '.join(wrong[:4])} "
                f"({len(wrong)} tensors in all) differ; build both from the same config"
            )
        getattr(model, part).load_state_dict({name: source[name] for name in target})


def _is_text(name: str) -> bool:
    in_attention = ".attention." in name or ".crossattention." in name
    return not in_attention and any(mark in f".{name}" for mark in _TEXT_BRANCH)
