"""The language model T5, in the form of FlanT5: embeddings [B, S, W] -> logits [B, T, V] of the text that answers them.

Raffel et al., T5 (2020); with the gated feed-forward and the head of its version 1.1. The encoder reads prefix and
prompt; the prompt cache holds the cross-attention's keys and values. Positions are distances, counted over what is not
padding, so no text is too long.

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
from blip2.modeling.language import DecodeState, LanguageModel
from blip2.modeling.layers import ACTIVATION, attend, merge_heads, split_heads


class T5LayerNorm(nn.Module):
    """Root mean square norm: no mean taken off, no bias."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        size = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * size).to(self.weight.dtype)


class T5Attention(nn.Module):
    """Multi-head attention; its scores are not scaled, the weights are trained for that."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D] of x [B, S, W]."""
        return split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [B, T, W] attends to keys and values; mask as for `attend`."""
        query = split_heads(self.q(x), self.heads)
        out: Tensor = self.o(merge_heads(attend(query, *keys_values, mask, scale=1.0)))
        return out


class T5FeedForward(nn.Module):
    """Widen, activate, narrow; in the gated form a second widening is multiplied in. [..., W] -> [..., W]."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.is_gated_act
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.activation = ACTIVATION[config.dense_act_fn]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        if isinstance(self.wo, nn.Linear):  # fp32 in fp16 models too; packed and quantized it takes any dtype
            inner = inner.to(self.wo.weight.dtype)
        out: Tensor = self.wo(inner)
        return out


# The sub-layers of a layer, each with the norm before it. A layer holds them in a list, under the published names.


class T5SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config)
        self.layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor, mask: Tensor, kv_cache: KVCache | None = None, index: int = 0) -> Tensor:
        """x [R, T, W] after kv_cache, of layer `index`; mask [1 or R, H, T, S] is added to the scores."""
        normed = self.layer_norm(x)
        keys_values = self.SelfAttention.keys_values(normed)
        if kv_cache is not None:
            keys_values = kv_cache.append(index, *keys_values)
        out: Tensor = x + self.SelfAttention(normed, keys_values, mask)
        return out


class T5CrossAttentionLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = T5Attention(config)
        self.layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor, prompt: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, T, W] attends to the prompt: keys and values [B, H, S, D], mask bool [B, 1, 1, S]."""
        out: Tensor = x + self.EncDecAttention(self.layer_norm(x), prompt, mask)
        return out


class T5FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)
        self.layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class T5Layer(nn.Module):
    """A layer of the encoder, or of the decoder, which attends to the prompt too."""

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        cross = [T5CrossAttentionLayer(config)] if decoder else []
        self.layer = nn.ModuleList([T5SelfAttentionLayer(config), *cross, T5FeedForwardLayer(config)])

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        prompt_cache: PromptCache | None = None,
        kv_cache: KVCache | None = None,
        index: int = 0,
    ) -> Tensor:
        """x [B * n, T, W]; mask and kv_cache as for `T5SelfAttentionLayer`."""
        attention, *cross, feed_forward = self.layer
        x = attention(x, mask, kv_cache, index)
        if prompt_cache is not None:
            prompt, prompt_mask = prompt_cache.layers[index], prompt_cache.mask[:, None, None, :]
            # [B, n * T, W]: to the prompt its rows are positions
            by_prompt = x.view(len(prompt_mask), -1, x.shape[-1])
            x = cross[0](by_prompt, prompt, prompt_mask).view_as(x)
        out: Tensor = feed_forward(x)
        return out


class T5PositionBias(nn.Module):
    """What a key's distance from its query adds to the scores of each head, learned by bucket."""

    def __init__(self, config: T5Config, *, bidirectional: bool) -> None:
        """`bidirectional`: keys come before and after their query (the encoder's do)."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.relative_attention_num_buckets, config.num_heads))
        self.max_distance, self.bidirectional = config.relative_attention_max_distance, bidirectional

    def forward(self, distance: Tensor) -> Tensor:
        """distance int64 [B, T, S], the key's position less the query's -> [B, H, T, S]."""
        count, both = len(self.weight), self.bidirectional
        buckets = position_buckets(distance, count, self.max_distance, bidirectional=both)
        return F.embedding(buckets, self.weight).movedim(-1, 1)


def position_buckets(distance: Tensor, count: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """Which of `count` buckets each distance belongs to.

    The near ones have a bucket each; those farther away share ever wider ones, by their logarithm, up to
    `max_distance`, and the last one holds all beyond. With `bidirectional` half of the buckets are for keys after their
    query.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        count //= 2
        first, size = (distance > 0) * count, distance.abs()
    else:
        size = (-distance).clamp(min=0)
    near = count // 2
    # 0 .. 1 at `max_distance`
    growth = torch.log(size.clamp(min=near).float() / near) / math.log(max_distance / near)
    far = (near + (growth * (count - near)).long()).clamp(max=count - 1)
    return first + torch.where(size < near, size, far)


class T5Encoder(nn.Module):
    """Every position attends to all others."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_attention_bias = T5PositionBias(config, bidirectional=True)
        self.layers = nn.ModuleList(T5Layer(config, decoder=False) for _ in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, W], mask bool [B, S] -> [B, S, W]."""
        positions = mask.cumsum(1) - 1  # counted over what is not padding
        bias = self.relative_attention_bias(positions[:, None, :] - positions[:, :, None])
        bias = bias.masked_fill(~mask[:, None, None, :], float("-inf"))  # [B, H, S, S]
        for layer in self.layers:
            x = layer(x, bias)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5Decoder(nn.Module):
    """Every position attends to those before it, and to all of the prompt."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative_attention_bias = T5PositionBias(config, bidirectional=False)
        self.layers = nn.ModuleList(T5Layer(config, decoder=True) for _ in range(config.num_decoder_layers))
        self.final_layer_norm = T5LayerNorm(config)

    def read_prompt(self, memory: Tensor, mask: Tensor) -> PromptCache:
        """Every layer's keys and values of what the encoder gives: [B, S, W], mask bool [B, S]."""
        layers = []
        for layer in self.layers:
            cross = layer.get_submodule("layer.1")
            assert isinstance(cross, T5CrossAttentionLayer)
            layers.append(cross.EncDecAttention.keys_values(memory))
        return PromptCache(tuple(layers), mask)

    def forward(self, x: Tensor, prompt_cache: PromptCache, kv_cache: KVCache | None = None) -> Tensor:
        """x [B, T, W] -> [B, T, W]; or one token for each row after those of kv_cache: [B * n, 1, W] -> the same."""
        before = 0 if kv_cache is None else kv_cache.length
        positions = torch.arange(-before, x.shape[1], device=x.device)
        distance = positions[None, None, :] - positions[None, before:, None]  # [1, T, before + T]
        mask = self.relative_attention_bias(distance)
        mask = mask.masked_fill((distance > 0)[:, None], float("-inf"))  # [1, H, T, before + T]
        if kv_cache is not None and (padding := kv_cache.padding) is not None:
            mask = mask.masked_fill(padding[:, None, None], float("-inf"))  # [B * n, H, 1, before + 1]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, prompt_cache, kv_cache, i)
        if kv_cache is not None:
            kv_cache.length += 1
        out: Tensor = self.final_layer_norm(x)
        return out


class T5(LanguageModel):
    """Word embeddings, encoder, decoder, head."""

    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Encoder(config)
        self.decoder = T5Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie()

    def embed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.shared(ids)
        return out

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None
    ) -> Tensor:
        if decoder_ids is None:
            raise ValueError(
                "decoder_input_ids are missing: T5 writes a text of its own, beginning with them"
            )
        return self._scale(self.decoder(self.embed(decoder_ids), self._read(embeddings, mask)))

    def target_states(self, embeddings: Tensor, mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        decoder_ids = labels.roll(1, dims=1)  # before each label the start token, then all but the last
        decoder_ids = decoder_ids.masked_fill(decoder_ids < 0, self.config.pad_token_id)
        decoder_ids[:, 0] = self.config.decoder_start_token_id
        return self(embeddings, mask, decoder_ids), labels

    def prefill_prefix(self, prefix: Tensor) -> None:
        """None: the encoder reads prefix and prompt together."""

    def prefill(
        self, embeddings: Tensor, mask: Tensor, past: PromptCache | None, rows: int, max_new_tokens: int
    ) -> DecodeState:
        if past is not None:
            raise ValueError("T5 reads prefix and prompt together and has no cache of a prefix alone")
        prompt_cache = self._read(embeddings, mask)
        config, count = self.config, len(mask) * rows
        # for the start token and all new tokens but the last, which is never read
        shape = (config.num_decoder_layers, count, config.num_heads, max_new_tokens, config.d_kv)
        kv_cache = KVCache(shape, embeddings)
        first = torch.full((count,), config.decoder_start_token_id, device=mask.device)
        logits = self.decode_step(first, prompt_cache, kv_cache)[::rows]
        return DecodeState(self, prompt_cache, kv_cache, logits)

    def decode_step(self, ids: Tensor, prompt_cache: PromptCache, kv_cache: KVCache) -> Tensor:
        hidden = self.decoder(self.embed(ids).unsqueeze(1), prompt_cache, kv_cache)
        logits: Tensor = self.lm_head(self._scale(hidden))
        return logits.squeeze(1).float()

    def _read(self, embeddings: Tensor, mask: Tensor | None) -> PromptCache:
        mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return self.decoder.read_prompt(self.encoder(embeddings, mask), mask)

    def _scale(self, hidden: Tensor) -> Tensor:
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden
