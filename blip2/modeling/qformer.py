"""The Querying Transformer: image features [B, N, W_image] -> queries [B, Q, W]; and its text branch.

A BERT (post-norm) in which learned queries cross-attend to the image in every n-th layer. Queries and text share the
self-attention and have a feed-forward each. Li et al., BLIP-2 (2023), section 3.1; the masks are those of figure 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import QFormerConfig
from blip2.modeling.layers import ACTIVATION, attend, merge_heads, split_heads


class QFormerProjections(nn.Module):
    """The query, key and value matrices of one attention."""

    def __init__(self, width: int, read_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(read_width, width)
        self.value = nn.Linear(read_width, width)


class QFormerOutput(nn.Module):
    """Linear, dropout, residual, norm: how every sub-layer of a BERT ends."""

    def __init__(self, config: QFormerConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual)
        return out


class QFormerAttention(nn.Module):
    """Attention of x over itself, or over `memory` (the image features)."""

    def __init__(self, config: QFormerConfig, read_width: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention = QFormerProjections(config.hidden_size, read_width)
        self.output = QFormerOutput(config, config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        read = x if memory is None else memory
        query = split_heads(self.attention.query(x), self.heads)
        key = split_heads(self.attention.key(read), self.heads)
        value = split_heads(self.attention.value(read), self.heads)
        out: Tensor = self.output(merge_heads(attend(query, key, value, mask)), x)
        return out


class QFormerIntermediate(nn.Module):
    """The widening half of a feed-forward."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention for the queries in some layers, one feed-forward for queries and one for text."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.attention = QFormerAttention(config, config.hidden_size)
        crosses = index % config.cross_attention_frequency == 0
        self.crossattention = QFormerAttention(config, config.encoder_hidden_size) if crosses else None
        self.intermediate_query = QFormerIntermediate(config)
        self.output_query = QFormerOutput(config, config.intermediate_size)
        if config.use_qformer_text_input:
            self.intermediate = QFormerIntermediate(config)
            self.output = QFormerOutput(config, config.intermediate_size)

    def forward(self, x: Tensor, queries: int, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: [B, Q + T, W], the first `queries` positions queries; mask: bool, broadcastable to [B, H, Q+T, Q+T]."""
        x = self.attention(x, mask=mask)
        parts = []
        if queries:
            query = x[:, :queries]
            if self.crossattention is not None:
                query = self.crossattention(query, features)
            parts.append(self.output_query(self.intermediate_query(query), query))
        if x.shape[1] > queries:
            text = x[:, queries:]
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class QFormer(nn.Module):
    """Learned queries that read an image; with a text branch where the config has one."""

    def __init__(self, config: QFormerConfig, num_queries: int, *, words: bool = False) -> None:
        """`words`: hold the word and position embeddings of the text branch (the stage-1 model's are here)."""
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.num_hidden_layers))
        if words:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Image features [B, N, W_image] -> queries [B, Q, W]."""
        queries = self.query_tokens.shape[1]
        return self._run(self.query_tokens.expand(len(features), -1, -1), queries, features, None)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text alone, bidirectional: ids and mask [B, T] -> [B, T, W]."""
        return self._run(self._embed(ids), 0, None, mask.bool()[:, None, None, :])

    def encode_multimodal(
        self, features: Tensor, ids: Tensor, mask: Tensor, *, causal: bool = False
    ) -> Tensor:
        """Queries and text see each other (ITM): -> [B, Q + T, W], queries first.

        causal: text sees the queries and itself causally, the queries see only themselves (ITG). They come out as from
            `forward`, so one pass serves ITC and ITG.
        """
        queries = self.query_tokens.shape[1]
        allowed = F.pad(mask.bool(), (queries, 0), value=True)[:, None, None, :]  # [B, 1, 1, Q + T]
        if causal:
            size = allowed.shape[-1]
            before = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
            before[:queries, :queries] = True
            allowed = before & allowed  # [B, 1, Q + T, Q + T]
        x = torch.cat([self.query_tokens.expand(len(ids), -1, -1), self._embed(ids)], dim=1)
        return self._run(x, queries, features, allowed)

    def _embed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return out

    def _run(self, x: Tensor, queries: int, features: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.layernorm(x)
        if features is not None:  # the Q-Former may be kept in a wider dtype than the image encoder
            features = features.to(self.layernorm.weight.dtype)
        for layer in self.layers:
            x = layer(x, queries, features, mask)
        return x
