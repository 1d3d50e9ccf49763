"""Choosing new tokens: greedy search, sampling, beam search, and the same token by token.

Token ids only: no images, no text. The model is asked for logits through `Blip2.start` and `DecodeState`.
Ids, rules and scores are those of transformers 5.23; where it lets padding into a rule, this does not.

Lengths count new tokens only, the end token included. B prompts, n rows (beams or samples) a prompt,
V the vocabulary, L the ids seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2, DecodeState
from blip2.modeling.config import T5Config
from blip2.modeling.kv_cache import PromptCache

_NEVER = -1e9  # a score that loses against every real one, and still adds without turning into NaN
_NOTHING = -1  # in a row of ids: padding, or a row that has ended


@dataclass(frozen=True)
class Generated:
    """New tokens. B * num_return_sequences rows: those of the first prompt, best first, then the next's."""

    ids: list[list[int]]  # new token ids only; the end token, if it came, is the last
    scores: list[float]  # sum of log-probabilities / length ** length_penalty; with beams: after the rules
    token_logprobs: list[list[float]]  # of every id under the model itself, before any rule or filter
    finished: list[bool]  # False: cut at max_new_tokens


@torch.inference_mode()
def generate(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    *,
    context: PromptCache | None = None,
) -> Generated:
    """Continue B prompts.

    prefix [B, Q, width] is `model.embed_image(pixels)`; input_ids and attention_mask [B, T] are the prompts,
    padded on either side (mask 0; None: no padding). `context` is `model.read_prefix(prefix)`, where that was
    already paid for. A prompt's result does not depend on the others in its batch.

    Raises:
        ValueError: shapes that do not fit each other, or more positions than the language model has.
    """
    started = _start(model, prefix, input_ids, attention_mask, options, context)
    end_ids = started[-1]
    if options.num_beams > 1:
        return _search(*started)
    steps = list(_one_by_one(*started))
    ids_by_row, logprobs_by_row = (torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True))
    rows: list[_Row] = []
    for padded, logprobs in zip(ids_by_row, logprobs_by_row, strict=True):
        ids = [i for i in padded if i != _NOTHING]
        rows.append(scored(ids, logprobs[: len(ids)], options))
    return _generated(rows, end_ids)


def stream(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    *,
    context: PromptCache | None = None,
) -> Iterator[list[int | None]]:
    """As `generate`, greedy or sampling, token by token.

    Yields one new id a row, in the order of `Generated.ids`; None for a row that has ended.
    """
    if options.num_beams > 1:
        raise ValueError(f"stream needs num_beams=1, got num_beams={options.num_beams}")
    steps = _one_by_one(*_start(model, prefix, input_ids, attention_mask, options, context))
    return ([None if i == _NOTHING else i for i in ids.tolist()] for ids, _ in steps)


@torch.inference_mode()
def _start(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: GenerationOptions,
    context: PromptCache | None,
) -> tuple[DecodeState, Tensor, GenerationOptions, Tensor]:
    """The prompts read; the ids said before the first new token [B, L]; the options; the end tokens [E]."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    shapes = [tuple(part.shape) for part in (prefix, input_ids, attention_mask)]
    if list(map(len, shapes)) != [3, 2, 2] or shapes[0][0] != shapes[1][0] or shapes[1] != shapes[2]:
        raise ValueError(
            f"prefix, input_ids and attention_mask have shapes {', '.join(map(str, shapes))}; "
            "expected [B, Q, W], [B, T] and [B, T]"
        )
    rows = options.num_beams if options.num_beams > 1 else options.num_return_sequences
    decoding = model.start(
        prefix, input_ids, attention_mask, rows=rows, max_new_tokens=options.max_new_tokens, context=context
    )
    seen = said_before(model, prefix, input_ids, attention_mask)
    return decoding, seen, options, end_ids_of(model, options, seen.device)


def said_before(model: Blip2, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The ids said before the first new token, [B, L]."""
    language = model.config.language
    if isinstance(language, T5Config):  # writes a text of its own: the prompt is no part of it
        return input_ids.new_full((len(input_ids), 1), language.decoder_start_token_id)
    return prompt_ids(model.config.image_token_id, prefix.shape[1], input_ids, attention_mask)


def end_ids_of(model: Blip2, options: GenerationOptions, device: torch.device) -> Tensor:
    """The end tokens [E]."""
    configured = model.config.language.eos_token_id
    ends = _as_tuple(configured if options.eos_token_id is None else options.eos_token_id)
    return torch.tensor(sorted(set(ends)), dtype=torch.int64, device=device)


_Row = tuple[list[int], list[float], float]  # ids, log-probability of each, score


def scored(ids: list[int], logprobs: list[float], options: GenerationOptions) -> _Row:
    return ids, logprobs, sum(logprobs) / len(ids) ** options.length_penalty


def _generated(rows: list[_Row], end_ids: Tensor) -> Generated:
    ends = set(end_ids.tolist())
    return Generated(
        ids=[ids for ids, _, _ in rows],
        scores=[score for _, _, score in rows],
        token_logprobs=[logprobs for _, logprobs, _ in rows],
        finished=[ids[-1:] != [] and ids[-1] in ends for ids, _, _ in rows],
    )


def _as_tuple(ids: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _is_end(ids: Tensor, end_ids: Tensor) -> Tensor:
    return (ids[..., None] == end_ids).any(-1)


# --- What the rules see, and the rules: pure functions of scores [R, V] and the ids seen, [R, L] ---


def prompt_ids(image_token_id: int | None, queries: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The ids that count as already said before the first new token, [B, L]: -1 (nothing), then the prompt.

    transformers writes the prefix into a prompt as `queries` image tokens and shows them to its rules, so
    they are here too where the model has an image token. Padding counts as nothing, wherever it stands.
    """
    ids = input_ids.masked_fill(attention_mask == 0, _NOTHING)
    if image_token_id is not None:
        ids = torch.cat([ids.new_full((len(ids), queries), image_token_id), ids], dim=1)
    kept_last = (ids != _NOTHING).int().argsort(dim=1, stable=True)
    return ids.gather(1, kept_last)


def process_logits(
    scores: Tensor, seen: Tensor, options: GenerationOptions, *, new_tokens: int, end_ids: Tensor
) -> Tensor:
    """Repetition penalty, n-gram ban, minimum length, in this order.

    scores [R, V] are logits (greedy, sampling) or log-probabilities (beams); seen [R, L] has -1 for nothing;
    new_tokens is how many of `seen` are new; end_ids [E].
    """
    if options.repetition_penalty != 1:
        scores = penalise_repetition(scores, seen, options.repetition_penalty)
    if options.no_repeat_ngram_size > 0:
        scores = ban_repeated_ngrams(scores, seen, options.no_repeat_ngram_size)
    if new_tokens < options.min_new_tokens:
        known = end_ids[end_ids < scores.shape[1]]  # a config may name an end token its vocabulary lacks
        scores = scores.index_fill(1, known, -math.inf)
    return scores


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores [R, V] of the ids in seen [R, L]: the positive ones divided, the negative ones multiplied."""
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(_mark(scores, seen, seen >= 0), penalised, scores)


def ban_repeated_ngrams(scores: Tensor, seen: Tensor, size: int) -> Tensor:
    """-inf for every id that would complete, for the second time, a run of `size` ids in seen [R, L]."""
    if seen.shape[1] < size:
        return scores
    windows = seen.unfold(1, size, 1)  # [R, L - size + 1, size]
    suffix = seen[:, seen.shape[1] - size + 1 :]  # [R, size - 1]
    repeats = (windows[..., :-1] == suffix[:, None]).all(-1) & (windows >= 0).all(-1)
    return scores.masked_fill(_mark(scores, windows[..., -1], repeats), -math.inf)


def _mark(scores: Tensor, ids: Tensor, which: Tensor) -> Tensor:
    """[R, V], True at the ids [R, L] for which `which` holds."""
    vocabulary = scores.shape[1]
    spare = torch.where(which, ids.clamp(max=vocabulary), vocabulary)  # one column more takes all others
    marked = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
    return marked.scatter_(1, spare, True)[:, :vocabulary]


def warp_logits(scores: Tensor, options: GenerationOptions) -> Tensor:
    """Temperature, top-k, top-p, in this order: scores [R, V], -inf for what must not be drawn."""
    if options.temperature is not None:
        scores = scores / max(
            options.temperature, 1e-4
        )  # below, only the best is left; and nothing overflows
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
    logits: Tensor, seen: Tensor, options: GenerationOptions, *, new_tokens: int, end_ids: Tensor
) -> Tensor:
    """The probabilities [R, V] a sample is drawn from; arguments as for `process_logits`."""
    scores = process_logits(logits, seen, options, new_tokens=new_tokens, end_ids=end_ids)
    return warp_logits(scores, options).softmax(1)


# --- Greedy search and sampling ---


@torch.inference_mode()
def _one_by_one(
    decoding: DecodeState, seen: Tensor, options: GenerationOptions, end_ids: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each step's ids and their log-probabilities under the model, both [B*n]; id -1: row has ended."""
    samples = options.num_return_sequences
    logits = decoding.logits.repeat_interleave(samples, dim=0)  # [B*n, V]
    seen = seen.repeat_interleave(samples, dim=0)
    total = len(seen)
    rows = torch.arange(total, device=seen.device)  # which of all rows are still being decoded
    running = torch.ones_like(rows, dtype=torch.bool)
    noise = uniform_numbers(options, total).to(seen.device) if options.do_sample else None
    for step in range(options.max_new_tokens):
        uniform = None if noise is None else noise[rows, step]
        ids = choose(logits, seen, options, step, end_ids, uniform)
        logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
        yield (
            rows.new_full((total,), _NOTHING).index_copy(0, rows, ids.where(running, _NOTHING)),
            logits.new_zeros(total).index_copy(0, rows, logprobs),
        )
        running = running & ~_is_end(ids, end_ids)
        seen = torch.cat([seen, ids[:, None]], dim=1)
        if step + 1 == options.max_new_tokens:
            return
        alive = running.view(-1, samples).any(1)
        left = int(alive.sum())  # the one wait for the device in a step
        if left == 0:
            return
        if left <= len(alive) // 2:
            prompts = alive.nonzero()[:, 0]
            decoding.keep(prompts)
            kept = (prompts[:, None] * samples + torch.arange(samples, device=prompts.device)).flatten()
            rows, running, seen, ids = rows[kept], running[kept], seen[kept], ids[kept]
        logits = decoding.step(ids)


def choose(
    logits: Tensor,
    seen: Tensor,
    options: GenerationOptions,
    step: int,
    end_ids: Tensor,
    uniform: Tensor | None,
) -> Tensor:
    """The next ids [R]: the likeliest, or drawn with the numbers `uniform` [R]."""
    if uniform is None:
        return process_logits(logits, seen, options, new_tokens=step, end_ids=end_ids).argmax(1)
    chances = sampling_distribution(logits, seen, options, new_tokens=step, end_ids=end_ids)
    return _draw(chances, uniform)


def uniform_numbers(options: GenerationOptions, rows: int) -> Tensor:
    """Uniform numbers [rows, max_new_tokens], a row's own whatever the batch, the same on every device."""
    if options.seed is None:
        return torch.rand(rows, options.max_new_tokens)
    samples = options.num_return_sequences
    generators = [torch.Generator().manual_seed((options.seed + row) % 2**63) for row in range(samples)]
    drawn = torch.stack([torch.rand(options.max_new_tokens, generator=g) for g in generators])
    return drawn.repeat(rows // samples, 1)


def _draw(chances: Tensor, uniform: Tensor) -> Tensor:
    """One id a row: where the running sum of chances [R, V] passes uniform [R], which lies in [0, 1)."""
    running_sum = chances.cumsum(1)
    passed = (running_sum > uniform[:, None] * running_sum[:, -1:]) & (chances > 0)
    # Rounding can leave nothing above the last threshold: then the likeliest id.
    return torch.where(passed.any(1), passed.int().argmax(1), chances.argmax(1))


# --- Beam search ---


class _Texts(NamedTuple):
    """Texts of b prompts, n each, best first; M is max_new_tokens."""

    ids: Tensor  # [b, n, M]
    logprobs: Tensor  # [b, n, M], of each id under the model
    scores: Tensor  # [b, n]; the sum of log-probabilities, once finished / length ** length_penalty
    lengths: Tensor  # [b, n]; what lies behind in ids and logprobs is arbitrary
    real: Tensor  # [b, n]; False where no text stands yet

    def choose(self, index: Tensor) -> _Texts:
        """Of each prompt the texts index [b, m]."""
        deep = index[..., None]
        return _Texts(*(part.take_along_dim(deep if part.dim() == 3 else index, 1) for part in self))

    def of(self, prompts: Tensor) -> _Texts:
        return _Texts(*(part[prompts] for part in self))

    def beside(self, other: _Texts) -> _Texts:
        return _Texts(*(torch.cat(parts, dim=1) for parts in zip(self, other, strict=True)))


class Move(NamedTuple):
    """What a search asks of the decoder: the rows in their new order, then one more token for each."""

    parents: Tensor  # int64 [b * n], the row that each goes on from, of the same prompt
    kept: Tensor | None  # int64 [k], the prompts to go on with after that; None: all
    ids: Tensor  # int64 [k * n]


# Is sent the logits [b * n, V] after each move; ends with the texts.
Search = Generator[Move, Tensor, Generated]


def _search(decoding: DecodeState, seen: Tensor, options: GenerationOptions, end_ids: Tensor) -> Generated:
    search = beam_search(decoding.logits, seen, options, end_ids)
    try:
        move = next(search)
        while True:
            decoding.reorder(move.parents)
            if move.kept is not None:
                decoding.keep(move.kept)
            move = search.send(decoding.step(move.ids))
    except StopIteration as end:
        made: Generated = end.value
        return made


@torch.inference_mode()
def beam_search(logits: Tensor, seen: Tensor, options: GenerationOptions, end_ids: Tensor) -> Search:
    """Search for the best texts of b prompts, one step at a time; what the decoder does between is left to the caller.

    Args:
        logits: float32 [b, V], for the first new token.
        seen: int64 [b, L], what the rules count as said before.
    """
    n, limit, penalty, device = options.num_beams, options.max_new_tokens, options.length_penalty, seen.device
    b, vocabulary = logits.shape
    prompts = list(range(b))  # those not dropped yet
    logits = logits.repeat_interleave(n, dim=0)  # [b*n, V]
    finished = _Texts(
        ids=seen.new_zeros(b, n, limit),
        logprobs=logits.new_zeros(b, n, limit),
        scores=logits.new_full((b, n), _NEVER),
        lengths=seen.new_zeros(b, n),
        real=torch.zeros(b, n, dtype=torch.bool, device=device),
    )
    # A prompt's beams start out equal: only the first may be continued.
    running = finished._replace(scores=(torch.arange(n, device=device) > 0) * _NEVER + logits.new_zeros(b, n))
    searching = torch.ones(b, dtype=torch.bool, device=device)
    results: list[list[_Row]] = [[] for _ in prompts]
    width = max(2, 1 + len(end_ids)) * n  # candidates: however many of them end, n are left to run
    for length in range(1, limit + 1):
        # Grow: the best candidates of all beams.
        new = running.ids[..., : length - 1].flatten(0, 1)
        said = torch.cat([seen.repeat_interleave(n, dim=0), new], dim=1)
        logprobs = logits.log_softmax(1)
        ruled = process_logits(logprobs, said, options, new_tokens=length - 1, end_ids=end_ids)
        sums, index = (running.scores[..., None] + ruled.view(b, n, vocabulary)).flatten(1).topk(width)
        parents, ids = index // vocabulary, index % vocabulary  # [b, width]
        grown = running.choose(parents)
        grown.ids[..., length - 1] = ids
        grown.logprobs[..., length - 1] = logprobs.view(b, -1).gather(1, index)
        stops = _is_end(ids, end_ids) | (length == limit)
        # Finish: an end counts only among the n best candidates.
        ends = stops & (torch.arange(width, device=device) < n) & searching[:, None]
        scores = sums / length**penalty + ~ends * _NEVER
        ended = grown._replace(scores=scores, lengths=torch.full_like(ids, length), real=ends)
        both = finished.beside(ended)
        finished = both.choose(both.scores.topk(n).indices)
        # Run on with the best that have not ended.
        sums, onward = (sums + stops * _NEVER).topk(n)
        running = grown.choose(onward)._replace(scores=sums)
        # Stop where no running text can enter the finished ones any more.
        hoped_length = limit if options.early_stopping == "never" and penalty > 0 else length
        searching = searching & (sums[:, 0] / hoped_length**penalty > finished.scores[:, -1])
        if options.early_stopping is True:
            searching = searching & ~finished.real.all(1)
        left = int(searching.sum()) if length < limit else 0  # the one wait for the device in a step
        if left == 0:
            break
        first_rows = torch.arange(0, b * n, n, device=device)
        rows = (first_rows[:, None] + parents.gather(1, onward)).flatten()
        kept = None
        if left <= b // 2:  # then the cache is worth copying: what is done is no longer decoded along
            _hand_out(finished, prompts, options, results)
            kept = searching.nonzero()[:, 0]
            b, prompts = left, [prompts[i] for i in kept.tolist()]
            seen, searching = seen[kept], searching[kept]
            running, finished = running.of(kept), finished.of(kept)
        logits = yield Move(rows, kept, running.ids[..., length - 1].flatten())
    _hand_out(finished, prompts, options, results)
    return _generated([row for rows in results for row in rows], end_ids)


def _hand_out(
    finished: _Texts, prompts: list[int], options: GenerationOptions, results: list[list[_Row]]
) -> None:
    """Write the texts of each prompt to its place in results; a prompt searched further is written again."""
    ids, logprobs, scores, lengths, _ = (
        part[:, : options.num_return_sequences].tolist() for part in finished
    )
    for i, prompt in enumerate(prompts):
        texts = zip(ids[i], logprobs[i], scores[i], lengths[i], strict=True)
        results[prompt] = [(row[:length], logs[:length], score) for row, logs, score, length in texts]
