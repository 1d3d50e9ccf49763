"""Continuous batching: texts written together that begin and end at different times, as a server needs it.

Ids, log-probabilities and scores are those of `generate` for each prompt alone: the next id is chosen by the same
functions, and padding never changes a result. A row is what the decoder writes one token of in a step: a greedy or
sampled sequence is one row, a beam search has one for each of its beams.

A text that fails fails alone: where a step of several raises an error it is repeated for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from blip2.generation.decoding import (
    BeamSequence,
    choose_next,
    end_ids_of,
    history_before,
    sequence_score,
    uniform_numbers,
)
from blip2.generation.logits import PADDING
from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2
from blip2.modeling.kv_cache import PromptCache
from blip2.modeling.language import DecodeState

Item = TypeVar("Item")


def each_alone(
    items: Sequence[Item], work: Callable[[Sequence[Item]], None]
) -> list[tuple[Item, BaseException]]:
    """Do work that succeeds for all of its items or changes nothing, at once or, where that fails, for each alone.

    Returns those that failed, and why. Whatever is raised counts: a panic of the tokenizer's is no `Exception`.
    """
    try:
        work(items)
    except BaseException as error:
        if len(items) == 1:
            return [(items[0], error)]
        return [failure for item in items for failure in each_alone([item], work)]
    return []


@dataclass(eq=False)
class SampledSequence:
    """One text, greedy or sampled.

    ids: new tokens so far; the end token, if it came, is the last. logprobs: of each, under the model itself.
    tops: for each, the `top` likeliest ids with their log-probabilities.
    done: it has ended, by its end token (`finished`) or at max_new_tokens. dropped: nobody wants more of it.
    error: why it failed; then it is dropped.
    """

    options: GenerationOptions
    history: list[int]  # the ids before the first new token, as the logits processors see them
    noise: list[float] | None
    end_ids: tuple[int, ...]
    top: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    dropped: bool = False
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.end_ids

    @property
    def done(self) -> bool:
        return self.finished or len(self.ids) == self.options.max_new_tokens

    @property
    def score(self) -> float:
        """As `Generated.scores`."""
        return sequence_score(self.logprobs, self.options)

    @property
    def sampling_key(self) -> tuple[object, ...]:
        """Sequences for which this is equal choose their next id together."""
        options = self.options
        return (
            options.repetition_penalty,
            options.no_repeat_ngram_size,
            len(self.ids) < options.min_new_tokens,
            self.end_ids,
            (options.temperature, options.top_k, options.top_p) if options.do_sample else None,
        )


Text = SampledSequence | BeamSequence
Place = tuple[int, Text]  # a text with its first row
SomeText = TypeVar("SomeText", bound=Text)


class ContinuousBatch:
    """All texts being written: `join` adds some, `choose` picks each row's next token, `advance` decodes those tokens.

    Between `choose` and `advance` texts may be dropped; before the next `choose` others may join.
    """

    def __init__(self, model: Blip2) -> None:
        self._model = model
        self._texts: list[Text] = []
        self._decoding: DecodeState | None = None
        self._logits = torch.empty(0)  # float32 [R, V], for the next token of each row
        self._ids = self._parents = torch.empty(
            0
        )  # int64 [R], the tokens chosen, and the rows they go on from

    def __len__(self) -> int:
        return len(self._logits)

    @torch.inference_mode()
    def join(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        options: Sequence[GenerationOptions],
        *,
        tops: Sequence[int],
        prompt_cache: PromptCache | None = None,
    ) -> tuple[list[list[Text]], list[PromptCache | None]]:
        """Begin texts for B prompts.

        Args:
            prefix, input_ids, attention_mask, prompt_cache: as for `generate`.
            options, tops: for each prompt; how many of the likeliest ids to record with each token.

        All prompts must have the same max_new_tokens: positions are counted for the longest prompt with that many.

        Returns:
            for each prompt its `num_return_sequences` sequences, or its one beam search; and the prompt cache of each
            prefix, good for other prompts after it: None where one was given, and with T5, which has none.

        Raises:
            ValueError: more positions than the language model has. Nothing has joined then, nor after another error.
        """
        (limit,) = {option.max_new_tokens for option in options}
        decoding = self._model.prefill(
            prefix, input_ids, attention_mask, max_new_tokens=limit, prompt_cache=prompt_cache
        )
        prefixes: list[PromptCache | None] = [None] * len(prefix)
        if prompt_cache is None:
            prefixes = decoding.prefixes(prefix.shape[1])
        history = history_before(self._model, prefix, input_ids, attention_mask)
        joined = [self._begin(*prompt) for prompt in zip(options, history.split(1), tops, strict=True)]
        prompts = [i for i, option in enumerate(options) for _ in range(option.rows)]
        index = torch.tensor(prompts, device=prefix.device)
        logits = decoding.logits[index]
        if len(prompts) > len(options):
            decoding.batch_select_indices(index)
        if self._decoding is not None:
            logits = torch.cat([self._logits, logits])
            self._decoding.concat(decoding)
            decoding = self._decoding
        self._decoding, self._logits = decoding, logits
        self._texts += [text for texts in joined for text in texts]
        return joined, prefixes

    def _begin(self, options: GenerationOptions, history: Tensor, top: int) -> list[Text]:
        end_ids = end_ids_of(self._model, options, history.device)
        if options.num_beams > 1:
            return [BeamSequence(options, history, end_ids)]
        count = options.num_return_sequences
        noise = uniform_numbers(options, count).tolist() if options.do_sample else [None] * count
        before, ends = [id for id in history[0].tolist() if id != PADDING], tuple(end_ids.tolist())
        return [SampledSequence(options, before, numbers, ends, top) for numbers in noise]

    def _first_rows(self) -> Iterator[Place]:
        """Each text with its first row."""
        row = 0
        for text in self._texts:
            yield row, text
            row += text.options.num_beams

    @torch.inference_mode()
    def choose(self) -> None:
        """One more token for every row."""
        self._ids = torch.zeros(len(self), dtype=torch.int64, device=self._logits.device)
        self._parents = torch.arange(len(self), device=self._logits.device)
        groups: dict[tuple[object, ...], list[tuple[int, SampledSequence]]] = {}
        for row, text in self._first_rows():
            if isinstance(text, SampledSequence):
                groups.setdefault(text.sampling_key, []).append((row, text))
            else:
                _drop_failing([(row, text)], self._move)
        for group in groups.values():
            _drop_failing(group, self._append)

    def _move(self, searches: Sequence[tuple[int, BeamSequence]]) -> None:
        """The next step of searches, each with its first row."""
        for row, search in searches:
            rows = slice(row, row + search.options.num_beams)
            if (move := search.next_move(self._logits[rows])) is not None:
                self._ids[rows], self._parents[rows] = move.ids, move.parents + row
            elif search.generated is not None:
                _check_finite(search.generated.scores)
                _check_finite(list(chain.from_iterable(search.generated.token_logprobs)))

    def _append(self, group: Sequence[tuple[int, SampledSequence]]) -> None:
        """One more token for sequences of one sampling key, each with its row."""
        rows = torch.tensor([row for row, _ in group], device=self._logits.device)
        sequences = [sequence for _, sequence in group]
        logits = self._logits[rows]
        chosen = self._choose_next(logits, sequences)
        logprobs = (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)).tolist()
        _check_finite(logprobs)
        tops = [_likeliest(row, sequence.top) for sequence, row in zip(sequences, logits, strict=True)]
        # from here on nothing fails, so that all sequences get their token or none
        self._ids[rows] = chosen
        for sequence, token, logprob, top in zip(sequences, chosen.tolist(), logprobs, tops, strict=True):
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            if sequence.top:
                sequence.tops.append(top)

    def _choose_next(self, logits: Tensor, sequences: list[SampledSequence]) -> Tensor:
        first, device = sequences[0], logits.device
        options, step = first.options, len(first.ids)
        needed = options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0
        ids = [sequence.history + sequence.ids if needed else [] for sequence in sequences]
        length = max(map(len, ids))
        history = torch.tensor([[PADDING] * (length - len(row)) + row for row in ids], device=device)
        end_ids = torch.tensor(first.end_ids, dtype=torch.int64, device=device)
        numbers = [sequence.noise[len(sequence.ids)] for sequence in sequences if sequence.noise]
        uniform = torch.tensor(numbers, device=device) if options.do_sample else None
        return choose_next(logits, history.long(), options, step, end_ids, uniform)

    @torch.inference_mode()
    def advance(self) -> None:
        """Leave out the texts that are done or dropped, and decode the others' last tokens."""
        left = self._going_on()
        if not left or self._decoding is None:
            self._texts, self._decoding, self._logits = [], None, torch.empty(0)
            return
        try:
            self._leave_out_others(left)
            self._logits = self._decoding.decode_step(self._ids)
        except BaseException:
            self._advance_apart(self._decoding)

    def _going_on(self) -> list[Place]:
        return [(row, text) for row, text in self._first_rows() if not (text.done or text.dropped)]

    def _rows_of(self, places: Sequence[Place]) -> Tensor:
        rows = [row + i for row, text in places for i in range(text.options.num_beams)]
        return torch.tensor(rows, device=self._ids.device)

    def _leave_out_others(self, left: list[Place]) -> None:
        assert self._decoding is not None
        rows = self._rows_of(left)
        if len(rows) < len(self):
            # all beams of a search have the same prompt
            self._decoding.batch_select_indices(self._parents[rows])
        elif any(isinstance(text, BeamSequence) for text in self._texts):
            self._decoding.reorder_cache(self._parents)
        self._texts, self._ids = [text for _, text in left], self._ids[rows]
        self._parents = torch.arange(len(rows), device=self._ids.device)

    def _advance_apart(self, decoding: DecodeState) -> None:
        """What `advance` failed to do, for each text by itself: those that fail again are dropped."""
        apart: list[tuple[Text, DecodeState, Tensor]] = []

        def decode(places: Sequence[Place]) -> None:
            rows = self._rows_of(places)
            state = decoding.select(self._parents[rows])
            apart.extend((text, state, state.decode_step(self._ids[rows])) for _, text in places)

        for place in self._going_on():
            _drop_failing([place], decode)
        self._texts, self._decoding = [text for text, _, _ in apart], None
        self._logits = torch.cat([logits for _, _, logits in apart]) if apart else torch.empty(0)
        for _, state, _ in apart:
            if self._decoding is None:
                self._decoding = state
            else:
                self._decoding.concat(state)


def _drop_failing(
    places: Sequence[tuple[int, SomeText]], work: Callable[[Sequence[tuple[int, SomeText]]], None]
) -> None:
    for (_, text), error in each_alone(places, work):
        text.error, text.dropped = error, True


def _check_finite(numbers: Sequence[float]) -> None:
    if not all(map(math.isfinite, numbers)):
        raise ArithmeticError("the model's scores are no finite numbers")


def _likeliest(logits: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest ids, so many, with their log-probabilities; logits [V]."""
    if not count:
        return []
    best = logits.log_softmax(0).topk(min(count, len(logits)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
