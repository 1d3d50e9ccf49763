"""Logits processors and warpers: pure functions of scores [R, V] and the ids before them, history [R, L].

R rows, V the vocabulary, L the ids of the longest history. Rules and order are those of transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blip2.generation.options import GenerationOptions

PADDING = -1  # in a history, and for a row that has ended


def prompt_history(
    image_token_id: int | None, queries: int, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """The ids before the first new token as the processors see them, [B, L]: padding (-1), then the prompt.

    transformers writes the prefix into a prompt as `queries` image tokens and shows them to its processors, so they
    are here too where the model has an image token.
    """
    ids = input_ids.masked_fill(attention_mask == 0, PADDING)
    if image_token_id is not None:
        ids = torch.cat([ids.new_full((len(ids), queries), image_token_id), ids], dim=1)
    padding_first = (ids != PADDING).int().argsort(dim=1, stable=True)
    return ids.gather(1, padding_first)


def process_logits(
    scores: Tensor, history: Tensor, options: GenerationOptions, *, new_tokens: int, end_ids: Tensor
) -> Tensor:
    """Repetition penalty, n-gram ban, minimum length, in this order.

    scores [R, V] are logits (greedy, sampling) or log-probabilities (beams); history [R, L] has -1 for padding;
    new_tokens is how many of `history` are new; end_ids [E].
    """
    if options.repetition_penalty != 1:
        scores = apply_repetition_penalty(scores, history, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        scores = ban_repeated_ngrams(scores, history, options.no_repeat_ngram_size)
    if new_tokens < options.min_new_tokens:
        known = end_ids[end_ids < scores.shape[1]]  # a config may name an end token its vocabulary lacks
        scores = scores.index_fill(1, known, -math.inf)
    return scores


def apply_repetition_penalty(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Scores [R, V] of the ids in history [R, L]: the positive ones divided, the negative ones multiplied.

    Keskar et al., CTRL (2019).
    """
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_mark(scores, history, history >= 0), penalised, scores)


def ban_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """-inf for every id that would complete, for the second time, a run of `size` ids in history [R, L]."""
    if history.shape[1] < size:
        return scores
    windows = history.unfold(1, size, 1)  # [R, L - size + 1, size]
    suffix = history[:, history.shape[1] - size + 1 :]  # [R, size - 1]
    repeats = (windows[..., :-1] == suffix[:, None]).all(-1) & (windows >= 0).all(-1)
    return scores.masked_fill(_mark(scores, windows[..., -1], repeats), -math.inf)


def _mark(scores: Tensor, ids: Tensor, selected: Tensor) -> Tensor:
    """[R, V], True at the ids [R, L] that are `selected`."""
    vocabulary = scores.shape[1]
    spare = torch.where(selected, ids.clamp(max=vocabulary), vocabulary)  # one column more takes all others
    marked = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
    return marked.scatter_(1, spare, True)[:, :vocabulary]


def warp_logits(scores: Tensor, options: GenerationOptions) -> Tensor:
    """Temperature, top-k, top-p (Holtzman et al., 2020), in this order: scores [R, V], -inf for what is not drawn."""
    if options.temperature is not None:
        # below 1e-4 only the best is left; and nothing overflows
        scores = scores / max(options.temperature, 1e-4)
    if options.top_k:
        kth = scores.topk(min(options.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)  # ties with the k-th stay
    if options.top_p is not None and options.top_p < 1:
        ascending, order = scores.sort(dim=1)
        rare = ascending.softmax(1).cumsum(1) <= 1 - options.top_p
        rare[:, -1] = False  # the best one always stays
        scores = scores.masked_fill(rare.scatter(1, order, rare), -math.inf)
    return scores


def sampling_distribution(
    logits: Tensor, history: Tensor, options: GenerationOptions, *, new_tokens: int, end_ids: Tensor
) -> Tensor:
    """The probabilities [R, V] a sample is drawn from; arguments as for `process_logits`."""
    scores = process_logits(logits, history, options, new_tokens=new_tokens, end_ids=end_ids)
    return warp_logits(scores, options).softmax(1)
