"""The language model OPT: embeddings [B, T, W] -> logits [B, T, V]. Zhang et al., OPT (2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import OptConfig
from blip2.modeling.kv_cache import KVCache, PromptCache
from blip2.modeling.language import IGNORE_INDEX, DecodeState, LanguageModel
from blip2.modeling.layers import ACTIVATION, attend, merge_heads, split_heads

POSITION_OFFSET = 2  # OPT's position table begins with two entries no position uses


class OptAttention(nn.Module):
    """Causal multi-head self-attention over the prompt and the new tokens."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, W], mask bool [B, 1, T, S] (None: plain causal) -> output [B, T, W], keys and values of S."""
        query, key, value = self._project(x)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        out = self.out_proj(merge_heads(attend(query, key, value, mask, causal=mask is None)))
        return out, key, value

    def decode_step(
        self, x: Tensor, layer: int, prompt_cache: PromptCache, kv_cache: KVCache, padding: Tensor | None
    ) -> Tensor:
        """One token for each row, x [B * n, 1, W]; padding, of the kv_cache, bool [B, 1, n, t] (None: nowhere)."""
        query, key, value = self._project(x)  # [B * n, H, 1, D]
        keys, values = kv_cache.append(layer, key, value)  # [B * n, H, t, D]
        prompt, hidden = prompt_cache.layers[layer], ~prompt_cache.mask[:, None, None, :]  # [B, 1, 1, S]
        prompts = len(hidden)
        query = query * query.shape[-1] ** -0.5
        by_prompt = query.squeeze(2).unflatten(0, (prompts, -1)).transpose(1, 2)  # [B, H, n, D]
        far = (by_prompt @ prompt[0].mT).masked_fill(hidden, float("-inf"))  # [B, H, n, S]
        near = (query @ keys.mT).squeeze(2).unflatten(0, (prompts, -1)).transpose(1, 2)  # [B, H, n, t]
        if padding is not None:
            near = near.masked_fill(padding, float("-inf"))
        weights = torch.cat([far, near], dim=-1).float().softmax(-1).to(x.dtype)
        far, near = weights.split([far.shape[-1], near.shape[-1]], dim=-1)
        from_prompt = (far @ prompt[1]).transpose(1, 2).flatten(0, 1)  # [B * n, H, D]
        from_row = (near.transpose(1, 2).flatten(0, 1).unsqueeze(2) @ values).squeeze(2)  # [B * n, H, D]
        out: Tensor = self.out_proj((from_prompt + from_row).flatten(1).unsqueeze(1))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return split_heads(query, self.heads), split_heads(key, self.heads), split_heads(value, self.heads)


class OptDecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = OptAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size)
        self.activation = ACTIVATION[config.activation_function]

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return out


class Opt(LanguageModel):
    """OPT with its head. The head shares the word embeddings' weight until a checkpoint gives it its own."""

    config: OptConfig

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = nn.Embedding(positions, config.hidden_size)
        self.layers = nn.ModuleList(OptDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie()

    def embed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.embed_tokens(ids)
        return out.to(self.embed_positions.weight.dtype)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None
    ) -> Tensor:
        if decoder_ids is not None:
            raise ValueError("decoder_input_ids are for T5; OPT takes none")
        return self._read(embeddings, mask)[0]

    def target_states(self, embeddings: Tensor, mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self(embeddings, mask)[:, :-1]
        return hidden, F.pad(labels, (embeddings.shape[1] - labels.shape[1], 0), value=IGNORE_INDEX)[:, 1:]

    def _read(
        self, embeddings: Tensor, mask: Tensor | None = None, past: PromptCache | None = None
    ) -> tuple[Tensor, PromptCache]:
        """Hidden states [B, T, W] of embeddings that come after `past`, and the cache that includes them."""
        batch, length = embeddings.shape[:2]
        before = 0 if past is None else past.length
        new_mask = embeddings.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
        full_mask = new_mask if past is None else torch.cat([past.mask, new_mask], dim=1)  # [B, S]
        self._check_length(int(full_mask.sum(1).max()))
        positions = (full_mask.cumsum(1) * full_mask - 1)[:, before:]  # counted over what is not padding
        allowed = None
        if mask is not None or past is not None:
            device = new_mask.device
            causal = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
            itself = torch.eye(length, before + length, dtype=torch.bool, device=device).roll(before, 1)
            allowed = causal & full_mask[:, None, None, :]  # [B, 1, T, S]
            allowed |= itself & ~allowed.any(-1, keepdim=True)  # padding with nothing to see would give NaN
        x = embeddings + self.embed_positions(positions + POSITION_OFFSET).to(embeddings.dtype)
        layers = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, OptDecoderLayer)
            prompt = None if past is None else past.layers[i]
            out, key, value = layer.self_attn(layer.self_attn_layer_norm(x), prompt, allowed)
            x = layer.feed_forward(x + out)
            layers.append((key, value))
        return self.final_layer_norm(x), PromptCache(tuple(layers), full_mask)

    def prefill_prefix(self, prefix: Tensor) -> PromptCache:
        return self._read(prefix)[1]

    def prefill(
        self, embeddings: Tensor, mask: Tensor, past: PromptCache | None, rows: int, max_new_tokens: int
    ) -> DecodeState:
        # Checked before anything is written; the last new token is never read.
        before = 0 if past is None else past.mask.sum(1)
        self._check_length(int((before + mask.sum(1)).max()) + max_new_tokens - 1)
        hidden, prompt_cache = self._read(embeddings, mask, past)
        last = (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [B], not padding
        logits = self.lm_head(hidden[torch.arange(len(last), device=last.device), last]).float()
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        shape = (self.config.num_hidden_layers, len(mask) * rows, heads, max_new_tokens, width // heads)
        return DecodeState(self, prompt_cache, KVCache(shape, embeddings), logits)

    def decode_step(self, ids: Tensor, prompt_cache: PromptCache, kv_cache: KVCache) -> Tensor:
        rows = len(ids) // len(prompt_cache.mask)
        positions = prompt_cache.mask.sum(1).repeat_interleave(rows) + kv_cache.row_lengths + POSITION_OFFSET
        x = (self.embed(ids) + self.embed_positions(positions)).unsqueeze(1)  # [B * n, 1, W]
        padding = kv_cache.padding
        if padding is not None:
            padding = padding.unflatten(0, (-1, rows))[:, None]  # [B, 1, n, t + 1]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, OptDecoderLayer)
            normed = layer.self_attn_layer_norm(x)
            out = layer.self_attn.decode_step(normed, i, prompt_cache, kv_cache, padding)
            x = layer.feed_forward(x + out)
        kv_cache.length += 1
        logits: Tensor = self.lm_head(self.final_layer_norm(x))
        return logits.squeeze(1).float()

    def _check_length(self, length: int) -> None:
        """Raise ValueError where a text, padding not counted, is longer than the model's positions."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"image, prompt and new tokens take {length} positions but the language model has {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )
