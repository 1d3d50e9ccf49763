"""The language model OPT: embeddings [B, T, W] -> logits [B, T, V]. Zhang et al., OPT (2022).

It reads a prompt once (`read`) whatever the number of beams that continue it: every row of a prompt attends to the
prompt's one copy of keys and values, and only to its own new tokens besides (`step`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2.modeling.config import OptConfig
from blip2.modeling.kv_cache import KVCache, PromptCache
from blip2.modeling.layers import ACTIVATION, attend, merge_heads, split_heads
from blip2.quantization.packed import Linear

POSITION_OFFSET = 2  # OPT's position table begins with two entries no position uses


class SelfAttention(nn.Module):
    """Causal multi-head self-attention over what has been read and what comes now."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, W], mask bool [B, 1, T, S] (None: plain causal) -> output [B, T, W], keys and values of S."""
        query, key, value = self._project(x)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        out = self.out_proj(merge_heads(attend(query, key, value, mask, causal=mask is None)))
        return out, key, value

    def step(
        self,
        x: Tensor,
        context: tuple[Tensor, Tensor],
        seen: Tensor,
        unwritten: Tensor | None,
        tail: KVCache,
        layer: int,
    ) -> Tensor:
        """One token for each row: x [B * n, 1, W]; context [B, H, S, D]; seen bool [B, 1, 1, S]; unwritten, of the
        tail, bool [B, 1, n, t] (None: nowhere)."""
        query, key, value = self._project(x)  # [B * n, H, 1, D]
        keys, values = tail.append(layer, key, value)  # [B * n, H, t, D]
        prompts = len(context[0])
        query = query * query.shape[-1] ** -0.5
        shared = query.squeeze(2).unflatten(0, (prompts, -1)).transpose(1, 2)  # [B, H, n, D]
        far = (shared @ context[0].mT).masked_fill(~seen, float("-inf"))  # [B, H, n, S]
        near = (query @ keys.mT).squeeze(2).unflatten(0, (prompts, -1)).transpose(1, 2)  # [B, H, n, t]
        if unwritten is not None:
            near = near.masked_fill(unwritten, float("-inf"))
        weights = torch.cat([far, near], dim=-1).float().softmax(-1).to(x.dtype)
        far, near = weights.split([far.shape[-1], near.shape[-1]], dim=-1)
        read = (far @ context[1]).transpose(1, 2).flatten(0, 1)  # [B * n, H, D]
        own = (near.transpose(1, 2).flatten(0, 1).unsqueeze(2) @ values).squeeze(2)  # [B * n, H, D]
        out: Tensor = self.out_proj((read + own).flatten(1).unsqueeze(1))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            split_heads(self.q_proj(x), self.heads),
            split_heads(self.k_proj(x), self.heads),
            split_heads(self.v_proj(x), self.heads),
        )


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = Linear(config.hidden_size, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size)
        self.activation = ACTIVATION[config.activation_function]

    def feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return out


class Opt(nn.Module):
    """OPT with its head. The head shares the word embeddings' weight until a checkpoint gives it its own."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(
            config.max_position_embeddings + POSITION_OFFSET, config.hidden_size
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Share one weight between the head and the word embeddings."""
        self.lm_head.weight = self.embed_tokens.weight

    @property
    def tied(self) -> bool:
        """Whether head and word embeddings share one weight."""
        return self.lm_head.weight is self.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, W], without positions."""
        out: Tensor = self.embed_tokens(ids)
        return out.to(self.embed_positions.weight.dtype)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, context: PromptCache | None = None
    ) -> Tensor:
        """Embeddings [B, T, W], mask [B, T] (None: no padding) -> hidden states [B, T, W] for `head`."""
        return self.read(embeddings, mask, context)[0]

    def read(
        self, embeddings: Tensor, mask: Tensor | None = None, past: PromptCache | None = None
    ) -> tuple[Tensor, PromptCache]:
        """Read embeddings after what has been read already.

        Args:
            embeddings: [B, T, W].
            mask: [B, T], 0 where a position is padding; padding anywhere changes nothing for the others.
            past: what the same B rows have read before.

        Returns:
            hidden states [B, T, W] and the context that includes these positions.

        Raises:
            ValueError: more positions than the model has.
        """
        batch, length = embeddings.shape[:2]
        before = 0 if past is None else past.length
        here = (
            torch.ones(batch, length, dtype=torch.bool, device=embeddings.device)
            if mask is None
            else mask.bool()
        )
        seen = here if past is None else torch.cat([past.mask, here], dim=1)  # [B, S]
        self.check_length(int(seen.sum(1).max()))
        positions = (seen.cumsum(1) * seen - 1)[:, before:]  # counted over what is not padding
        allowed = None
        if mask is not None or past is not None:
            causal = torch.ones(length, before + length, dtype=torch.bool, device=here.device).tril(before)
            itself = torch.eye(length, before + length, dtype=torch.bool, device=here.device).roll(before, 1)
            allowed = causal & seen[:, None, None, :]  # [B, 1, T, S]
            allowed |= itself & ~allowed.any(-1, keepdim=True)  # padding with nothing to see would give NaN
        x = embeddings + self.embed_positions(positions + POSITION_OFFSET).to(embeddings.dtype)
        layers = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            out, key, value = layer.self_attn(
                layer.self_attn_layer_norm(x), None if past is None else past.layers[i], allowed
            )
            x = layer.feed_forward(x + out)
            layers.append((key, value))
        return self.final_layer_norm(x), PromptCache(tuple(layers), seen)

    def start(
        self,
        embeddings: Tensor,
        mask: Tensor,
        past: PromptCache | None = None,
        *,
        rows: int,
        max_new_tokens: int,
    ) -> tuple[PromptCache, KVCache, Tensor]:
        """Read prompts, ready to write `rows` continuations of each.

        Args: as for `read`.

        Returns:
            what was read, the empty tail of B * rows texts, and logits float32 [B, V] for the first new token.

        Raises:
            ValueError: what was read and the new tokens take more positions than the model has.
        """
        # Checked before anything is written; the last new token is never read.
        before = 0 if past is None else past.mask.sum(1)
        self.check_length(int((before + mask.sum(1)).max()) + max_new_tokens - 1)
        hidden, context = self.read(embeddings, mask, past)
        last = (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # [B], not padding
        logits = self.head(hidden[torch.arange(len(last), device=last.device), last]).float()
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        shape = (self.config.num_hidden_layers, len(mask) * rows, heads, max_new_tokens, width // heads)
        return context, KVCache(shape, embeddings), logits

    def step(self, ids: Tensor, context: PromptCache, tail: KVCache) -> Tensor:
        """One more token for each row: ids int64 [B * n] -> logits float32 [B * n, V]; `tail` grows by one."""
        rows = len(ids) // len(context.mask)
        positions = context.mask.sum(1).repeat_interleave(rows) + tail.written + POSITION_OFFSET
        x = (self.embed(ids) + self.embed_positions(positions)).unsqueeze(1)  # [B * n, 1, W]
        seen, unwritten = context.mask[:, None, None, :], tail.unwritten
        if unwritten is not None:
            unwritten = unwritten.unflatten(0, (-1, rows))[:, None]  # [B, 1, n, t + 1]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            out = layer.self_attn.step(
                layer.self_attn_layer_norm(x), context.layers[i], seen, unwritten, tail, i
            )
            x = layer.feed_forward(x + out)
        tail.length += 1
        return self.head(self.final_layer_norm(x)).squeeze(1).float()

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] -> logits [..., V]."""
        out: Tensor = self.lm_head(hidden)
        return out

    def check_length(self, length: int) -> None:
        """Raise ValueError where a text, padding not counted, is longer than the model's positions."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"image, prompt and new tokens take {length} positions but the language model has {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )
