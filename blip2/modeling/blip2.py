"""The models: `Blip2` writes text about an image, `Blip2Matcher` (stage 1) scores how well a text fits one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import Blip2Config, MatcherConfig, QFormerConfig
from blip2.modeling.kv_cache import PromptCache
from blip2.modeling.language import IGNORE_INDEX, DecodeState, LanguageModel
from blip2.modeling.layers import ACTIVATION
from blip2.modeling.opt import Opt
from blip2.modeling.qformer import QFormer
from blip2.modeling.t5 import T5
from blip2.modeling.vision import ImageEncoder

# By `model_type` in the config.
LANGUAGE_MODELS: dict[str, Callable[[Any], LanguageModel]] = {"opt": Opt, "t5": T5}


class Blip2(nn.Module):
    """Image encoder -> Q-Former -> projection -> language model."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        self.vision = ImageEncoder(config.vision)
        self.qformer = QFormer(config.qformer, config.num_query_tokens)
        self.projection = nn.Linear(config.qformer.hidden_size, config.language.width)
        self.language = LANGUAGE_MODELS[config.language.model_type](config.language)

    def embed_image(self, pixels: Tensor, *, interpolate: bool = False) -> Tensor:
        """Pixels [B, 3, S, S] -> prefix [B, Q, W]: what the language model reads first."""
        return self.project(self.qformer(self.vision(pixels, interpolate=interpolate)))

    def project(self, queries: Tensor) -> Tensor:
        """Queries [B, Q, W_qformer] -> prefix [B, Q, W_language]."""
        out: Tensor = self.projection(queries.to(self.projection.weight.dtype))
        return out

    def forward(
        self,
        pixels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Pixels and text [B, T] -> logits.

        With OPT [B, Q + T, V] for every position, the queries first. T5 reads the text and writes another, of which
        decoder_input_ids [B, L] are the start token and all tokens but the last: logits [B, L, V].
        """
        return self.logits_from_prefix(self.embed_image(pixels), input_ids, attention_mask, decoder_input_ids)

    def logits_from_prefix(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, for images that have been embedded already."""
        embeddings, mask = self._embed(prefix, input_ids, attention_mask)
        out: Tensor = self.language.lm_head(self.language(embeddings, mask, decoder_input_ids))
        return out

    def _embed(
        self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Prefix and text as embeddings [B, Q + T, W], and their mask [B, Q + T]."""
        embeddings = torch.cat([prefix, self.language.embed(input_ids).to(prefix.dtype)], dim=1)
        mask = None if attention_mask is None else F.pad(attention_mask, (prefix.shape[1], 0), value=1)
        return embeddings, mask

    def loss(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Mean cross-entropy of the labels, a scalar.

        Args:
            labels: -100 where a position is no target. With OPT [B, T], the id at each text position, or [B, Q + T];
                each is predicted from what comes before it, the first one from the queries. With T5 [B, L], the text
                to write, its end token included. Shifted inside.
        """
        return self.loss_from_prefix(self.embed_image(pixels), input_ids, attention_mask, labels)

    def loss_from_prefix(
        self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        """As `loss`, for images that have been embedded already."""
        logits, targets = self.target_logits(prefix, input_ids, attention_mask, labels)
        return F.cross_entropy(logits.float(), targets)

    def target_logits(
        self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logits [K, V] of the K positions that have a target, and the targets [K]; arguments as for `loss`."""
        hidden, targets = self.language.target_states(*self._embed(prefix, input_ids, attention_mask), labels)
        is_target = targets != IGNORE_INDEX
        # The head is as wide as the vocabulary: only where something is to be predicted.
        return self.language.lm_head(hidden[is_target]), targets[is_target]

    def prompt_room(self, max_new_tokens: int) -> int:
        """How many tokens a prompt may have."""
        return self.config.language.prompt_positions(max_new_tokens) - self.config.num_query_tokens

    def prefill_prefix(self, prefix: Tensor) -> PromptCache | None:
        """The prefix as the language model has read it: a value that serves every later question about the image.

        None with T5, whose encoder reads prefix and prompt together.
        """
        return self.language.prefill_prefix(prefix)

    def prefill(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: int = 1,
        max_new_tokens: int,
        prompt_cache: PromptCache | None = None,
    ) -> DecodeState:
        """Read the prefix and the prompts, ready to write `rows` continuations of each prompt.

        Args:
            prefix: [B, Q, W].
            input_ids, attention_mask: [B, T], padded on either side.
            prompt_cache: the prefix as `prefill_prefix` gave it; the prefix is then not read again.

        Raises:
            ValueError: prefix, prompt and new tokens are longer than the language model's positions.
        """
        if prompt_cache is not None:
            prefix = prefix[:, :0]  # it has been read
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeddings, _ = self._embed(prefix, input_ids, None)
        mask = F.pad(mask, (prefix.shape[1], 0), value=1)
        return self.language.prefill(embeddings, mask, prompt_cache, rows, max_new_tokens)


class TextHead(nn.Module):
    """BERT's head: hidden states [..., W] -> logits over the text vocabulary, on the word embeddings' weight."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATION[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.LayerNorm(self.activation(self.dense(hidden))), words, self.bias)


class Blip2Matcher(nn.Module):
    """The stage-1 model: image-text contrast (ITC), matching (ITM) and image-grounded generation (ITG).

    Checkpoints for matching alone hold no ITG head; `itg_head` is then None.
    """

    def __init__(self, config: MatcherConfig, *, itg: bool = True) -> None:
        super().__init__()
        self.config = config
        width, shared = config.qformer.hidden_size, config.image_text_hidden_size
        self.vision = ImageEncoder(config.vision)
        self.qformer = QFormer(config.qformer, config.num_query_tokens, words=True)
        self.vision_projection = nn.Linear(width, shared)
        self.text_projection = nn.Linear(width, shared)
        self.itm_head = nn.Linear(width, 2)
        self.itg_head = TextHead(config.qformer) if itg else None
        self.temp = nn.Parameter(torch.tensor(0.07)) if itg else None  # the contrastive loss's temperature

    def image_embeddings(self, features: Tensor) -> Tensor:
        """Image features [B, N, W] -> [B, Q, E], each query of length 1."""
        return self.project_queries(self.qformer(features))

    def project_queries(self, queries: Tensor) -> Tensor:
        """Queries [B, Q, W] -> [B, Q, E], each of length 1."""
        return F.normalize(self.vision_projection(queries.to(self.vision_projection.weight.dtype)), dim=-1)

    def text_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text [B, T], beginning with [CLS] -> [B, E], of length 1."""
        first = self.qformer.encode_text(ids, mask)[:, 0]
        return F.normalize(self.text_projection(first.to(self.text_projection.weight.dtype)), dim=-1)

    def itm_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Each image with its text -> [B, 2]; softmax column 1 is the probability that they match."""
        queries = self.qformer.encode_multimodal(features, ids, mask)[:, : self.config.num_query_tokens]
        out: Tensor = self.itm_head(queries.to(self.itm_head.weight.dtype)).mean(dim=1)
        return out

    def text_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text [B, T], beginning with [DEC] -> logits [B, T, V] for the token after each position."""
        return self.queries_and_text_logits(features, ids, mask)[1]

    def queries_and_text_logits(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The queries as `qformer(features)` gives them and the ITG logits, in one pass."""
        if self.itg_head is None:
            raise ValueError("this checkpoint is for matching alone: it holds no head for generation (ITG)")
        hidden = self.qformer.encode_multimodal(features, ids, mask, causal=True)
        queries, text = hidden.split([self.config.num_query_tokens, ids.shape[1]], dim=1)
        return queries, self.itg_head(text, self.qformer.word_embeddings.weight)
