"""What `Blip2` needs of a language model: the interface that `Opt` and `T5` follow, and the state of decoding.

A third language model is a file beside them with a subclass of `LanguageModel`, its config, and a line in the table
`blip2.modeling.blip2.LANGUAGE_MODELS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from blip2.modeling.config import LanguageConfig
from blip2.modeling.kv_cache import KVCache, PromptCache, concat_prompt_caches

IGNORE_INDEX = -100  # label of a position that is no target


class LanguageModel(nn.Module, ABC):
    """A language model that reads embeddings: the prefix, and the embedded prompt after it.

    A prompt is read once (`prefill`), whatever the number of rows (beams or samples) that continue it: every row
    attends to the prompt's one copy of keys and values, and to its own new tokens (`decode_step`). A class, not a
    `typing.Protocol`, as `Blip2` also needs what every module has.

    lm_head: hidden states [..., W] -> logits [..., V].
    """

    config: LanguageConfig
    lm_head: nn.Linear

    def tie(self) -> None:
        """Share one weight between the head and the word embeddings."""
        self.lm_head.weight = self._word_embeddings.weight

    @property
    def tied(self) -> bool:
        """Whether head and word embeddings share one weight."""
        # layers that are packed or quantized have a weight of their own, and are no nn.Linear
        return isinstance(self.lm_head, nn.Linear) and self.lm_head.weight is self._word_embeddings.weight

    @property
    def _word_embeddings(self) -> nn.Embedding:
        embeddings = self.get_submodule(self.config.word_embeddings)
        assert isinstance(embeddings, nn.Embedding)
        return embeddings

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, W], without positions."""

    @abstractmethod
    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, decoder_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, S, W] for `lm_head`; with an encoder-decoder [B, T, W].

        embeddings: [B, S, W]. mask: [B, S], 0 where a position is padding, which changes nothing for the others.
        decoder_ids: int64 [B, T], for an encoder-decoder: the start token and all tokens written but the last.
        """

    @abstractmethod
    def target_states(self, embeddings: Tensor, mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, W] and what each is to predict, int64 [B, T]; labels as for `Blip2.loss`."""

    @abstractmethod
    def prefill_prefix(self, prefix: Tensor) -> PromptCache | None:
        """Read a prefix [B, Q, W] alone; None where it can only be read together with the prompt (T5)."""

    @abstractmethod
    def prefill(
        self, embeddings: Tensor, mask: Tensor, past: PromptCache | None, rows: int, max_new_tokens: int
    ) -> DecodeState:
        """Read prompts, ready to write `rows` continuations of each; see `Blip2.prefill`.

        embeddings, mask: as for `forward`. past: what the same B prompts begin with, read before.
        """

    @abstractmethod
    def decode_step(self, ids: Tensor, prompt_cache: PromptCache, kv_cache: KVCache) -> Tensor:
        """One more token for each row: int64 [B * n] -> logits float32 [B * n, V]; `kv_cache` grows by one."""


class DecodeState:
    """A text being written: B prompts, n rows of each, the rows of a prompt adjacent.

    logits: float32 [B, V], for the first new token.
    """

    def __init__(
        self, language: LanguageModel, prompt_cache: PromptCache, kv_cache: KVCache, logits: Tensor
    ) -> None:
        self._language, self._prompt_cache, self._kv_cache = language, prompt_cache, kv_cache
        self.logits = logits
        self._first = kv_cache.buffer, kv_cache.length  # all rows are the same so far

    def decode_step(self, ids: Tensor) -> Tensor:
        """Append ids int64 [B * n]; logits float32 [B * n, V] for the token after them. One that fails appends none."""
        length = self._kv_cache.length
        try:
            return self._language.decode_step(ids, self._prompt_cache, self._kv_cache)
        except BaseException:
            self._kv_cache.length = length
            raise

    def prefixes(self, queries: int) -> list[PromptCache | None]:
        """Each prompt's prefix of so many queries, as `Blip2.prefill_prefix` gives it."""
        if self._language.config.is_encoder_decoder:
            return [None] * len(self._prompt_cache.mask)
        return [*self._prompt_cache.split(queries)]

    def reorder_cache(self, parents: Tensor) -> None:
        """Row i goes on from what row parents[i] (int64 [B * n], of the same prompt) has written."""
        self._kv_cache.reorder_cache(parents)

    def crop(self) -> None:
        """Back to before the first new token, with all rows; not after `batch_select_indices`."""
        self._kv_cache.buffer, self._kv_cache.length = self._first

    def batch_select_indices(self, prompts: Tensor) -> None:
        """Go on with these prompts (int64 [k]) and all their rows, in this order; drop the others.

        A prompt named twice is there twice from now on.
        """
        rows = self._kv_cache.buffer.shape[2] // len(self._prompt_cache.mask)
        indices = prompts[:, None] * rows + torch.arange(rows, device=prompts.device)  # [k, n]
        prompt_cache = self._prompt_cache.batch_select_indices(prompts)
        self._kv_cache.reorder_cache(indices.flatten())
        self._prompt_cache = prompt_cache

    def select(self, prompts: Tensor) -> DecodeState:
        """These prompts (int64 [k]) as a state of its own, a copy; one row a prompt."""
        prompt_cache = self._prompt_cache.batch_select_indices(prompts)
        return DecodeState(self._language, prompt_cache, self._kv_cache.select(prompts), self.logits)

    def concat(self, other: DecodeState) -> None:
        """Take in another state's prompts, at any length; one row a prompt in both."""
        prompt_cache = concat_prompt_caches([self._prompt_cache, other._prompt_cache])
        self._kv_cache = self._kv_cache.concat(other._kv_cache)
        self._prompt_cache = prompt_cache
