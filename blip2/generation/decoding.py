"""Choosing new tokens: greedy search, sampling, beam search, and the same token by token.

Token ids only: no images, no text. Logits come from `Blip2.prefill` and `DecodeState`.
Ids, rules and scores are those of transformers 5.23; where it lets padding into a rule, this does not.

Lengths count new tokens only, the end token included. B prompts, n rows (beams or samples) a prompt,
V the vocabulary, L the ids so far (`history`).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip2.generation.logits import PADDING, process_logits, prompt_history, sampling_distribution
from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2
from blip2.modeling.kv_cache import PromptCache
from blip2.modeling.language import DecodeState

_NEVER = -1e9  # a score that loses against every real one, and still adds without turning into NaN


@dataclass(frozen=True)
class Generated:
    """New tokens. B * num_return_sequences rows: those of the first prompt, best first, then the next's."""

    ids: list[list[int]]  # new token ids only; the end token, if it came, is the last
    scores: list[float]  # sum of log-probabilities (with beams: processed ones) / length ** length_penalty
    token_logprobs: list[list[float]]  # of every id under the model itself, before any processor or warper
    finished: list[bool]  # False: cut at max_new_tokens


@torch.inference_mode()
def generate(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    *,
    prompt_cache: PromptCache | None = None,
) -> Generated:
    """Continue B prompts.

    prefix [B, Q, width] is `model.embed_image(pixels)`; input_ids and attention_mask [B, T] are the prompts,
    padded on either side (mask 0; None: no padding). `prompt_cache` is `model.prefill_prefix(prefix)`, where that
    was computed before. A prompt's result does not depend on the others in its batch.

    Raises:
        ValueError: shapes that do not fit each other, or more positions than the language model has.
    """
    start = _prefill(model, prefix, input_ids, attention_mask, options, prompt_cache)
    end_ids = start[-1]
    if options.num_beams > 1:
        return _beam_search(*start)
    steps = list(_decode_steps(*start))
    ids_by_row, logprobs_by_row = (torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True))
    sequences = []
    for padded, logprobs in zip(ids_by_row, logprobs_by_row, strict=True):
        ids = [i for i in padded if i != PADDING]
        del logprobs[len(ids) :]
        sequences.append(ScoredSequence(ids, logprobs, sequence_score(logprobs, options)))
    return _generated(sequences, end_ids)


def stream(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    *,
    prompt_cache: PromptCache | None = None,
) -> Iterator[list[int | None]]:
    """As `generate`, greedy or sampling, token by token.

    Yields one new id a row, in the order of `Generated.ids`; None for a row that has ended.
    """
    if options.num_beams > 1:
        raise ValueError(f"stream needs num_beams=1, got num_beams={options.num_beams}")
    steps = _decode_steps(*_prefill(model, prefix, input_ids, attention_mask, options, prompt_cache))
    return ([None if i == PADDING else i for i in ids.tolist()] for ids, _ in steps)


@torch.inference_mode()
def _prefill(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    prompt_cache: PromptCache | None,
) -> tuple[DecodeState, Tensor, GenerationOptions, Tensor]:
    """The prompts read; their history [B, L]; the options; the end tokens [E]."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    shapes = [tuple(tensor.shape) for tensor in (prefix, input_ids, attention_mask)]
    if list(map(len, shapes)) != [3, 2, 2] or shapes[0][0] != shapes[1][0] or shapes[1] != shapes[2]:
        raise ValueError(
            f"prefix, input_ids and attention_mask have shapes {', '.join(map(str, shapes))}; "
            "expected [B, Q, W], [B, T] and [B, T]"
        )
    rows, limit = options.rows, options.max_new_tokens
    decoding = model.prefill(
        prefix, input_ids, attention_mask, rows=rows, max_new_tokens=limit, prompt_cache=prompt_cache
    )
    history = history_before(model, prefix, input_ids, attention_mask)
    return decoding, history, options, end_ids_of(model, options, history.device)


def history_before(model: Blip2, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The ids before the first new token as the logits processors see them, [B, L]."""
    start = model.config.language.decoder_start_token_id
    if start is not None:  # an encoder-decoder writes a text of its own: the prompt is no part of it
        return input_ids.new_full((len(input_ids), 1), start)
    return prompt_history(model.config.image_token_id, prefix.shape[1], input_ids, attention_mask)


def end_ids_of(model: Blip2, options: GenerationOptions, device: torch.device) -> Tensor:
    """The end tokens, int64 [E]."""
    ids = options.end_ids(model.config.language.eos_token_ids)
    return torch.tensor(sorted({*ids}), dtype=torch.int64, device=device)


class ScoredSequence(NamedTuple):
    """The new tokens of one row, the log-probability of each, and the row's score."""

    ids: list[int]
    logprobs: list[float]
    score: float


def sequence_score(logprobs: list[float], options: GenerationOptions) -> float:
    """The sum of a sequence's log-probabilities / length ** length_penalty."""
    return sum(logprobs) / float(len(logprobs) ** options.length_penalty)


def _generated(sequences: list[ScoredSequence], end_ids: Tensor) -> Generated:
    ends = end_ids.tolist()
    return Generated(
        ids=[sequence.ids for sequence in sequences],
        scores=[sequence.score for sequence in sequences],
        token_logprobs=[sequence.logprobs for sequence in sequences],
        finished=[sequence.ids[-1:] != [] and sequence.ids[-1] in ends for sequence in sequences],
    )


# --- Greedy search and sampling ---


@torch.inference_mode()
def _decode_steps(
    decoding: DecodeState, history: Tensor, options: GenerationOptions, end_ids: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each step's ids and their log-probabilities under the model, both [B*n]; id -1: row has ended."""
    samples = options.num_return_sequences
    logits = decoding.logits.repeat_interleave(samples, dim=0)  # [B*n, V]
    history = history.repeat_interleave(samples, dim=0)
    total = len(history)
    rows = torch.arange(total, device=history.device)  # which of all rows are still being decoded
    running = torch.ones_like(rows, dtype=torch.bool)
    noise = uniform_numbers(options, total).to(history.device) if options.do_sample else None
    for step in range(options.max_new_tokens):
        uniform = None if noise is None else noise[rows, step]
        ids = choose_next(logits, history, options, step, end_ids, uniform)
        logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
        yield (
            rows.new_full((total,), PADDING).index_copy(0, rows, ids.where(running, PADDING)),
            logits.new_zeros(total).index_copy(0, rows, logprobs),
        )
        running = running & ~torch.isin(ids, end_ids)
        history = torch.cat([history, ids[:, None]], dim=1)
        if step + 1 == options.max_new_tokens:
            return
        unfinished = running.view(-1, samples).any(1)
        count = int(unfinished.sum())  # the one wait for the device in a step
        if count == 0:
            return
        if count <= len(unfinished) // 2:
            prompts = unfinished.nonzero()[:, 0]
            decoding.batch_select_indices(prompts)
            kept = (prompts[:, None] * samples + torch.arange(samples, device=prompts.device)).flatten()
            rows, running, history, ids = rows[kept], running[kept], history[kept], ids[kept]
        logits = decoding.decode_step(ids)


def choose_next(
    logits: Tensor,
    history: Tensor,
    options: GenerationOptions,
    step: int,
    end_ids: Tensor,
    uniform: Tensor | None,
) -> Tensor:
    """The next ids [R]: the likeliest, or drawn with the numbers `uniform` [R]."""
    if uniform is None:
        return process_logits(logits, history, options, new_tokens=step, end_ids=end_ids).argmax(1)
    return _draw(sampling_distribution(logits, history, options, new_tokens=step, end_ids=end_ids), uniform)


def uniform_numbers(options: GenerationOptions, rows: int) -> Tensor:
    """Uniform numbers [rows, max_new_tokens], a row's own whatever the batch, the same on every device."""
    if options.seed is None:
        return torch.rand(rows, options.max_new_tokens)
    samples = options.num_return_sequences
    generators = [torch.Generator().manual_seed((options.seed + row) % 2**63) for row in range(samples)]
    drawn = torch.stack([torch.rand(options.max_new_tokens, generator=g) for g in generators])
    return drawn.repeat(rows // samples, 1)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One id a row: where the running sum of probabilities [R, V] passes uniform [R], which lies in [0, 1)."""
    running_sum = probabilities.cumsum(1)
    passed = (running_sum > uniform[:, None] * running_sum[:, -1:]) & (probabilities > 0)
    # Rounding can leave nothing above the last threshold: then the likeliest id.
    return torch.where(passed.any(1), passed.int().argmax(1), probabilities.argmax(1))


# --- Beam search ---


class _Beams(NamedTuple):
    """The sequences of b prompts, n each, best first; M is max_new_tokens."""

    ids: Tensor  # [b, n, M]
    logprobs: Tensor  # [b, n, M], of each id under the model
    scores: Tensor  # [b, n]; the sum of log-probabilities, once finished / length ** length_penalty
    lengths: Tensor  # [b, n]; what comes after in ids and logprobs is arbitrary
    real: Tensor  # [b, n]; False where there is no sequence yet

    def take(self, index: Tensor) -> _Beams:
        """Of each prompt the sequences index [b, m]."""
        deep = index[..., None]
        return _Beams(*(field.take_along_dim(deep if field.dim() == 3 else index, 1) for field in self))

    def select_prompts(self, prompts: Tensor) -> _Beams:
        return _Beams(*(field[prompts] for field in self))

    def concat(self, other: _Beams) -> _Beams:
        """The sequences of both, for each prompt."""
        return _Beams(*(torch.cat(fields, dim=1) for fields in zip(self, other, strict=True)))


class Move(NamedTuple):
    """What a search needs from the decoder next: the rows in a new order, then one more token for each."""

    parents: Tensor  # int64 [b * n], the row that each goes on from, of the same prompt
    kept: Tensor | None  # int64 [k], the prompts to go on with after that; None: all
    ids: Tensor  # int64 [k * n]


# Is sent the logits [b * n, V] after each move; ends with the texts.
Search = Generator[Move, Tensor, Generated]


@dataclass(eq=False)
class BeamSequence:
    """A beam search for b prompts. `generated`: their sequences, once it is done. error: as of `SampledSequence`."""

    options: GenerationOptions
    history: Tensor  # int64 [b, L]
    end_ids: Tensor  # int64 [E]
    generated: Generated | None = None
    dropped: bool = False
    error: BaseException | None = None
    _search: Search | None = None

    @property
    def done(self) -> bool:
        return self.generated is not None

    def next_move(self, logits: Tensor) -> Move | None:
        """The next step of the search, given the logits [b * n, V] of the last; None: it is done."""
        try:
            if self._search is None:  # the rows of a prompt are still all the same: one is enough
                first = logits[: len(self.history)]
                self._search = _search_steps(first, self.history, self.options, self.end_ids)
                return next(self._search)
            return self._search.send(logits)
        except StopIteration as end:
            self.generated = end.value
            return None


def _beam_search(
    decoding: DecodeState, history: Tensor, options: GenerationOptions, end_ids: Tensor
) -> Generated:
    search, logits = BeamSequence(options, history, end_ids), decoding.logits
    while (move := search.next_move(logits)) is not None:
        decoding.reorder_cache(move.parents)
        if move.kept is not None:
            decoding.batch_select_indices(move.kept)
        logits = decoding.decode_step(move.ids)
    assert search.generated is not None
    return search.generated


@torch.inference_mode()
def _search_steps(logits: Tensor, history: Tensor, options: GenerationOptions, end_ids: Tensor) -> Search:
    """Search for the best sequences of b prompts, step by step; what the decoder does between is left to the caller.

    logits: float32 [b, V], for the first new token. history: int64 [b, L], the ids before it.
    """
    n, limit, penalty = options.num_beams, options.max_new_tokens, options.length_penalty
    (b, vocabulary), device = logits.shape, history.device
    prompts = list(range(b))  # those not dropped yet
    logits = logits.repeat_interleave(n, dim=0)  # [b*n, V]
    # a length to a high power is no float32; and a score that is any number beats that of no sequence
    exact = torch.float32 if device.type == "mps" else torch.float64
    finished = _Beams(
        ids=history.new_zeros(b, n, limit),
        logprobs=logits.new_zeros(b, n, limit),
        scores=logits.new_full((b, n), -math.inf, dtype=exact),
        lengths=history.new_zeros(b, n),
        real=torch.zeros(b, n, dtype=torch.bool, device=device),
    )
    # A prompt's beams start out equal: only the first may be continued.
    running = finished._replace(scores=(torch.arange(n, device=device) > 0) * _NEVER + logits.new_zeros(b, n))
    searching = torch.ones(b, dtype=torch.bool, device=device)
    results: list[list[ScoredSequence]] = [[] for _ in prompts]
    width = max(2, 1 + len(end_ids)) * n  # candidates: however many of them end, n are left to run
    for length in range(1, limit + 1):
        # Grow: the best candidates of all beams.
        new = running.ids[..., : length - 1].flatten(0, 1)
        so_far = torch.cat([history.repeat_interleave(n, dim=0), new], dim=1)
        logprobs = logits.log_softmax(1)
        processed = process_logits(logprobs, so_far, options, new_tokens=length - 1, end_ids=end_ids)
        sums, index = (running.scores[..., None] + processed.view(b, n, vocabulary)).flatten(1).topk(width)
        parents, ids = index // vocabulary, index % vocabulary  # [b, width]
        grown = running.take(parents)
        grown.ids[..., length - 1] = ids
        grown.logprobs[..., length - 1] = logprobs.view(b, -1).gather(1, index)
        stops = torch.isin(ids, end_ids) | (length == limit)
        # Finish: an end counts only among the n best candidates.
        ends = stops & (torch.arange(width, device=device) < n) & searching[:, None]
        scores = (sums.to(exact) / length**penalty).masked_fill(~ends, -math.inf)
        ended = grown._replace(scores=scores, lengths=torch.full_like(ids, length), real=ends)
        both = finished.concat(ended)
        finished = both.take(both.scores.topk(n).indices)
        # Run on with the best that have not ended.
        sums, onward = (sums + stops * _NEVER).topk(n)
        running = grown.take(onward)._replace(scores=sums)
        # Stop where no running sequence can become one of the n best finished ones any more.
        possible_length = limit if options.early_stopping == "never" and penalty > 0 else length
        searching = searching & (sums[:, 0].to(exact) / possible_length**penalty > finished.scores[:, -1])
        if options.early_stopping is True:
            searching = searching & ~finished.real.all(1)
        count = int(searching.sum()) if length < limit else 0  # the one wait for the device in a step
        if count == 0:
            break
        first_rows = torch.arange(0, b * n, n, device=device)
        rows = (first_rows[:, None] + parents.gather(1, onward)).flatten()
        kept = None
        if count <= b // 2:  # then the cache is worth copying: what is done is no longer decoded along
            _store_results(finished, prompts, options, results)
            kept = searching.nonzero()[:, 0]
            b, prompts = count, [prompts[i] for i in kept.tolist()]
            history, searching = history[kept], searching[kept]
            running, finished = running.select_prompts(kept), finished.select_prompts(kept)
        logits = yield Move(rows, kept, running.ids[..., length - 1].flatten())
    _store_results(finished, prompts, options, results)
    return _generated([sequence for sequences in results for sequence in sequences], end_ids)


def _store_results(
    finished: _Beams, prompts: list[int], options: GenerationOptions, results: list[list[ScoredSequence]]
) -> None:
    """Store the sequences of each prompt at its place in results; a prompt searched further is stored again."""
    columns = (field[:, : options.num_return_sequences].tolist() for field in finished)
    for prompt, *beams in zip(prompts, *columns, strict=True):
        results[prompt] = [
            ScoredSequence(ids[:length], logprobs[:length], score)
            for ids, logprobs, score, length, _ in zip(*beams, strict=True)
        ]
