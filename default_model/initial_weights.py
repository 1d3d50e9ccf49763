"""Initial weights of the default model's parts, none of them pre-trained; and stage 1's Q-Former as stage 2's.

BLIP-2's Q-Former starts from BERT and learns from 129 million images which query should look where. Here initial
weights say it: every query attends to one part of the image (`init_query_attention`), the language model's first layer
looks for equal tokens (`init_matching_heads`), a noun has one vector in every letter case (`init_word_embeddings`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.opt import Opt, OptDecoderLayer
from blip2.modeling.qformer import QFormer, QFormerLayer
from blip2.modeling.vision import ImageEncoder, VisionBlock
from default_model.recipe import PARTS
from default_model.slots import centres


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


POSITION_SIGMA = 0.1  # of a query's attention around the middle of its part, as a share of the image's side
VALUE_GAIN = 2.0  # of the attended patches in a query, beside 1 of the query's own embedding
OBJECTNESS_LOGIT = 4.0  # by how much a patch that shows an object outscores one that does not, in nats


def init_query_attention(
    qformer: QFormer, features: Tensor, middles: Tensor, shown: Tensor, seed: int
) -> None:
    """Let every query attend to the patches of the object whose middle is in its part of the image. In place.

    In the first layer, the cross-attention's score of a patch is that of a Gaussian around the middle of the query's
    part, at the middle of the patch's object as its features predict it; values are passed on unchanged. The keys are
    fitted, by ridge regression, to image features with known places: -|c - p|^2 is linear in p and |p|^2, and the
    remaining |c|^2 is the same for all patches.

    Args:
        qformer: after `init_weights`; its first `PARTS` queries get a part each, the others attend everywhere. As wide
            as the image features, heads of four or more.
        features: [K, W], of patches from many images.
        middles: [K, 2], the middle of each patch's object, or of the patch itself if it shows none.
        shown: bool [K], whether the patch shows an object.
        seed: of the queries themselves, which are orthogonal to one another.

    Raises:
        ValueError: a Q-Former of another shape.
    """
    config, count = qformer.config, qformer.query_tokens.shape[1]
    width, heads = config.hidden_size, config.num_attention_heads
    side, size = math.isqrt(PARTS), width // heads
    if width != config.encoder_hidden_size or size < 4 or not PARTS <= count <= width:
        raise ValueError(
            f"{count} queries {width} wide in {heads} heads cannot be aimed at image features "
            f"{config.encoder_hidden_size} wide: widths must be equal, a head four or wider, queries {PARTS} to {width}"
        )
    squares = middles.square().sum(1, keepdim=True)
    weight, bias = _ridge(features, torch.cat([middles, squares, shown.float()[:, None]], dim=1))  # to [K, 4]
    precision = 1 / (2 * POSITION_SIGMA**2)
    shared = torch.tensor([[-precision, OBJECTNESS_LOGIT]]).expand(PARTS, -1)
    codes = torch.zeros(count, 4)  # those beyond the parts attend everywhere
    codes[:PARTS] = torch.cat([2 * precision * centres(side), shared], dim=1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.linalg.qr(torch.randn(width, count, generator=generator))[0].mT * math.sqrt(width)
    first = qformer.layers[0]
    assert isinstance(first, QFormerLayer) and first.crossattention is not None
    cross = first.crossattention
    with torch.no_grad():
        qformer.query_tokens[0] = tokens
        inputs = first.attention.output.LayerNorm(qformer.layernorm(qformer.query_tokens[0]))  # [Q, W]
        query = torch.linalg.lstsq(inputs, codes * math.sqrt(size)).solution.mT  # [4, W]
        for head in range(heads):
            rows = slice(head * size, head * size + 4)
            cross.attention.query.weight[rows] = query
            cross.attention.key.weight[rows] = weight
            cross.attention.key.bias[rows] = bias
        cross.attention.value.weight.copy_(torch.eye(width))
        cross.output.dense.weight.copy_(VALUE_GAIN * torch.eye(width))


def init_word_embeddings(language: Opt, names: Tensor, bags: Sequence[Sequence[int]], seed: int) -> None:
    """Give tokens embeddings such that those of a name's tokens add up to the name's vector. In place, after
    `init_weights`.

    So a name has the same vector in every letter case and number, before any training.

    Args:
        names: [N, E], one vector of unit length for each bag, E at most the language model's width.
        bags: N, the tokens of each form of a name; forms of one name have equal vectors.
        seed: of the directions that the vectors take in the embeddings' space.
    """
    width = language.config.hidden_size
    tokens = torch.zeros(len(bags), language.config.vocab_size)  # how often each name has each token
    for row, found in zip(tokens, bags, strict=True):
        row += torch.bincount(torch.tensor(found), minlength=len(row))
    # The shortest embeddings that (nearly) add up to the names.
    used = tokens.any(0)
    some = tokens[:, used]
    gram = some.mT @ some + 0.05 * torch.eye(some.shape[1])
    words = torch.linalg.solve(gram, some.mT @ names)  # [V', E]
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(noise)[0][:, : names.shape[1]]  # [W, E]
    with torch.no_grad():
        language.embed_tokens.weight[used] += words @ directions.mT


def _ridge(x: Tensor, y: Tensor, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight [M, W] and bias [M] that map x [K, W] to y [K, M], by ridge regression."""
    mean, target = x.mean(0), y.mean(0)
    gram = (x - mean).mT @ (x - mean) / len(x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (x - mean).mT @ (y - target) / len(x)).mT
    return weight, target - weight @ mean


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
