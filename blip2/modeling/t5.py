"""The language model T5, in the form of FlanT5: embeddings [B, S, W] -> logits [B, T, V] of the text that answers them.

Raffel et al., T5 (2020); with the gated feed-forward and the head of its version 1.1. An encoder reads prefix and
prompt once (`read`), whatever the number of beams: every row of a prompt attends to the prompt's one copy of the
cross-attention's keys and values, and to its own new tokens (`step`). Positions are distances, counted over what is not
padding, so there is no longest text.

The second matrix of a feed-forward gives more than fp16 can hold. Where a model is loaded in fp16 it stays in fp32, as
in transformers (`checkpoint.load`), and with it all that is added up from layer to layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import T5Config
from blip2.modeling.kv_cache import KVCache, PromptCache
from blip2.modeling.layers import ACTIVATION, attend, merge_heads, split_heads
from blip2.quantization.packed import Linear


class Norm(nn.Module):
    """Root mean square norm: no mean taken off, no bias."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        size = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * size).to(self.weight.dtype)


class Attention(nn.Module):
    """Multi-head attention; its scores are not scaled, the weights are trained for that."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of x [B, S, W]."""
        return split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)

    def forward(self, x: Tensor, read: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [B, T, W] looks at what was read; mask as for `attend`."""
        query = split_heads(self.q(x), self.heads)
        out: Tensor = self.o(merge_heads(attend(query, *read, mask, scale=1.0)))
        return out


class FeedForward(nn.Module):
    """Widen, activate, narrow; in the gated form a second widening is multiplied in. [..., W] -> [..., W]."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.is_gated_act
        if self.gated:
            self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.activation = ACTIVATION[config.dense_act_fn]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        if isinstance(self.wo, Linear):  # in fp16 models it stays in fp32; a quantized layer takes any dtype
            inner = inner.to(self.wo.dtype)
        out: Tensor = self.wo(inner)
        return out


# The sub-layers of a layer, each with the norm before it. A layer holds them in a list, under the published names.


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.SelfAttention = Attention(config)
        self.layer_norm = Norm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, W]; mask [B or 1, H, T, T] is added to the scores."""
        normed = self.layer_norm(x)
        out: Tensor = x + self.SelfAttention(normed, self.SelfAttention.read(normed), mask)
        return out

    def step(self, x: Tensor, mask: Tensor, tail: KVCache, layer: int) -> Tensor:
        """One token for each row: x [R, 1, W]; mask [1 or R, H, 1, t + 1]."""
        normed = self.layer_norm(x)
        written = tail.append(layer, *self.SelfAttention.read(normed))
        out: Tensor = x + self.SelfAttention(normed, written, mask)
        return out


class CrossAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = Norm(config)

    def forward(self, x: Tensor, read: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, T, W] looks at what the encoder has read: keys and values [B, H, S, D], mask bool [B, 1, 1, S]."""
        out: Tensor = x + self.EncDecAttention(self.layer_norm(x), read, mask)
        return out


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class EncoderLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([SelfAttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        out: Tensor = feed_forward(attention(x, mask))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [SelfAttentionLayer(config), CrossAttentionLayer(config), FeedForwardLayer(config)]
        )

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of what the encoder has read [B, S, W]."""
        cross = self.layer[1]
        assert isinstance(cross, CrossAttentionLayer)
        return cross.EncDecAttention.read(memory)

    def forward(self, x: Tensor, mask: Tensor, read: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """x [B, T, W]; mask [1, H, T, T] is added to the scores; read, seen as for `CrossAttentionLayer`."""
        attention, cross, feed_forward = self.layer
        out: Tensor = feed_forward(cross(attention(x, mask), read, seen))
        return out

    def step(
        self, x: Tensor, mask: Tensor, tail: KVCache, index: int, read: tuple[Tensor, Tensor], seen: Tensor
    ) -> Tensor:
        """One token for each row, x [B * n, 1, W], on the prompts' own keys and values [B, H, S, D]."""
        attention, cross, feed_forward = self.layer
        assert isinstance(attention, SelfAttentionLayer)
        x = attention.step(x, mask, tail, index)
        by_prompt = x.view(len(seen), -1, x.shape[-1])  # [B, n, W]: to what was read, rows are positions
        out: Tensor = feed_forward(cross(by_prompt, read, seen).view_as(x))
        return out


class PositionBias(nn.Module):
    """What a key's distance from its query adds to the scores of each head, learned by bucket."""

    def __init__(self, config: T5Config, *, both_ways: bool) -> None:
        """`both_ways`: keys stand before and after their query (the encoder's do)."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.relative_attention_num_buckets, config.num_heads))
        self.longest, self.both_ways = config.relative_attention_max_distance, both_ways

    def forward(self, distance: Tensor) -> Tensor:
        """distance int64 [B, T, S], the key's position less the query's -> [B, H, T, S]."""
        buckets = position_buckets(distance, len(self.weight), self.longest, both_ways=self.both_ways)
        return F.embedding(buckets, self.weight).movedim(-1, 1)


def position_buckets(distance: Tensor, count: int, longest: int, *, both_ways: bool) -> Tensor:
    """Which of `count` buckets each distance belongs to.

    The near ones have a bucket each; those farther away share ever wider ones, up to `longest` by their logarithm, and
    the last one holds all beyond. With `both_ways` half of the buckets are for keys after their query.
    """
    first = torch.zeros_like(distance)
    if both_ways:
        count //= 2
        first, away = (distance > 0) * count, distance.abs()
    else:
        away = (-distance).clamp(min=0)
    near = count // 2
    growth = torch.log(away.clamp(min=near).float() / near) / math.log(longest / near)  # 0 .. 1 at `longest`
    far = (near + (growth * (count - near)).long()).clamp(max=count - 1)
    return first + torch.where(away < near, away, far)


class Encoder(nn.Module):
    """Reads: every position sees all others."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_attention_bias = PositionBias(config, both_ways=True)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.final_layer_norm = Norm(config)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [B, S, W], seen bool [B, S] -> [B, S, W]."""
        positions = seen.cumsum(1) - 1  # counted over what is not padding
        bias = self.relative_attention_bias(positions[:, None, :] - positions[:, :, None])
        mask = bias.masked_fill(~seen[:, None, None, :], float("-inf"))  # [B, H, S, S]
        for layer in self.layers:
            x = layer(x, mask)
        out: Tensor = self.final_layer_norm(x)
        return out


class Decoder(nn.Module):
    """Writes: every position sees those before it, and all that the encoder has read."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_attention_bias = PositionBias(config, both_ways=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.final_layer_norm = Norm(config)

    def read(self, memory: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Every layer's keys and values [B, H, S, D] of what the encoder has read [B, S, W]."""
        read = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            read.append(layer.read(memory))
        return tuple(read)

    def forward(self, x: Tensor, context: PromptCache) -> Tensor:
        """x [B, T, W] -> [B, T, W]."""
        positions = torch.arange(x.shape[1], device=x.device)
        distance = positions[None, None, :] - positions[None, :, None]  # [1, T, T]
        bias = self.relative_attention_bias(distance)
        mask = bias.masked_fill((distance > 0)[:, None], float("-inf"))  # [1, H, T, T]
        seen = context.mask[:, None, None, :]
        for layer, read in zip(self.layers, context.layers, strict=True):
            x = layer(x, mask, read, seen)
        out: Tensor = self.final_layer_norm(x)
        return out

    def step(self, x: Tensor, context: PromptCache, tail: KVCache) -> Tensor:
        """One token for each row: x [B * n, 1, W] -> [B * n, 1, W]; `tail` grows by one."""
        distance = torch.arange(-tail.length, 1, device=x.device)[None, None]
        mask = self.relative_attention_bias(distance)  # [1, H, 1, t + 1]
        unwritten = tail.unwritten
        if unwritten is not None:
            mask = mask.masked_fill(unwritten[:, None, None], float("-inf"))  # [B * n, H, 1, t + 1]
        seen = context.mask[:, None, None, :]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            x = layer.step(x, mask, tail, i, context.layers[i], seen)
        tail.length += 1
        out: Tensor = self.final_layer_norm(x)
        return out


class T5(nn.Module):
    """Word embeddings, encoder, decoder, head."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Share one weight between the head and the word embeddings."""
        self.lm_head.weight = self.shared.weight

    @property
    def tied(self) -> bool:
        """Whether head and word embeddings share one weight."""
        return self.lm_head.weight is self.shared.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, W]."""
        out: Tensor = self.shared(ids)
        return out

    def forward(self, embeddings: Tensor, mask: Tensor | None, decoder_ids: Tensor) -> Tensor:
        """What is read, embeddings [B, S, W] and mask [B, S] (None: no padding), and what is written, beginning with
        the start token, int64 [B, T] -> hidden states [B, T, W] for `head`."""
        out: Tensor = self.decoder(self.embed(decoder_ids), self.read(embeddings, mask))
        return out

    def read(self, embeddings: Tensor, mask: Tensor | None = None) -> PromptCache:
        """What the decoder is to know of embeddings [B, S, W]; padding (mask [B, S] is 0) changes nothing."""
        shape = embeddings.shape[:2]
        seen = embeddings.new_ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        return PromptCache(self.decoder.read(self.encoder(embeddings, seen)), seen)

    def start(
        self, embeddings: Tensor, mask: Tensor, *, rows: int, max_new_tokens: int
    ) -> tuple[PromptCache, KVCache, Tensor]:
        """Read prompts, ready to write `rows` texts for each; as `Opt.start`. The start token is written already."""
        context = self.read(embeddings, mask)
        shape = (
            self.config.num_decoder_layers,
            len(mask) * rows,
            self.config.num_heads,
            max_new_tokens,  # the start token and all new ones but the last, which is never read
            self.config.d_kv,
        )
        tail = KVCache(shape, embeddings)
        first = torch.full((shape[1],), self.config.decoder_start_token_id, device=mask.device)
        return context, tail, self.step(first, context, tail)[::rows]

    def step(self, ids: Tensor, context: PromptCache, tail: KVCache) -> Tensor:
        """One more token for each row: ids int64 [B * n] -> logits float32 [B * n, V]; `tail` grows by one."""
        hidden = self.decoder.step(self.embed(ids).unsqueeze(1), context, tail)
        return self.head(hidden).squeeze(1).float()

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] -> logits [..., V]."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        out: Tensor = self.lm_head(hidden)
        return out

    def shift_right(self, labels: Tensor) -> Tensor:
        """Labels [B, T] -> what the decoder has read before each of them: the start token, then all but the last.

        Labels that are no target (below 0) are read as padding.
        """
        read = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) < 0, self.config.pad_token_id)
        read[:, 0] = self.config.decoder_start_token_id
        return read
