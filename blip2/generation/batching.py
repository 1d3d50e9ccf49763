"""Continuous batching: texts written together that begin and end at different times, as a server needs it.

Ids, log-probabilities and scores are those of `generate` for each prompt alone: the next id is chosen by the same
functions, and padding never changes a result. A row is what the decoder writes one token of in a step: a greedy or
sampled sequence is one row, a beam search has one for each of its beams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class SampledSequence:
    """One text, greedy or sampled.

    ids: new tokens so far; the end token, if it came, is the last. logprobs: of each, under the model itself.
    tops: for each, the `top` likeliest ids with their log-probabilities.
    done: it has ended, by its end token (`finished`) or at max_new_tokens.
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


class ContinuousBatch:
    """All texts being written: `join` adds some, `choose` picks each row's next token, `advance` decodes those tokens.

    Between `choose` and `advance` texts may be dropped; before the next `choose` others may join.
    """

    def __init__(self, model: Blip2) -> None:
        self._model = model
        self._texts: list[SampledSequence | BeamSequence] = []
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
    ) -> tuple[list[list[SampledSequence | BeamSequence]], list[PromptCache | None]]:
        """Begin texts for B prompts.

        Args:
            prefix, input_ids, attention_mask, prompt_cache: as for `generate`.
            options, tops: for each prompt; how many of the likeliest ids to record with each token.

        All prompts must have the same max_new_tokens: positions are counted for the longest prompt with that many.

        Returns:
            for each prompt its `num_return_sequences` sequences, or its one beam search; and the prompt cache of each
            prefix, good for other prompts after it: None where one was given, and with T5, which has none.

        Raises:
            ValueError: more positions than the language model has; nothing has joined then.
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
            self._decoding.concat(decoding)
            decoding, logits = self._decoding, torch.cat([self._logits, logits])
        self._decoding, self._logits = decoding, logits
        self._texts += [text for texts in joined for text in texts]
        return joined, prefixes

    def _begin(
        self, options: GenerationOptions, history: Tensor, top: int
    ) -> list[SampledSequence | BeamSequence]:
        end_ids = end_ids_of(self._model, options, history.device)
        if options.num_beams > 1:
            return [BeamSequence(options, history, end_ids)]
        count = options.num_return_sequences
        noise = uniform_numbers(options, count).tolist() if options.do_sample else [None] * count
        before, ends = [id for id in history[0].tolist() if id != PADDING], tuple(end_ids.tolist())
        return [SampledSequence(options, before, numbers, ends, top) for numbers in noise]

    def _first_rows(self) -> Iterator[tuple[int, SampledSequence | BeamSequence]]:
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
            rows = slice(row, row + text.options.num_beams)
            if isinstance(text, SampledSequence):
                groups.setdefault(text.sampling_key, []).append((row, text))
            elif (move := text.next_move(self._logits[rows])) is not None:
                self._ids[rows], self._parents[rows] = move.ids, move.parents + row
        for group in groups.values():
            self._append(torch.tensor([row for row, _ in group]), [sequence for _, sequence in group])

    def _append(self, rows: Tensor, sequences: list[SampledSequence]) -> None:
        """One more token for sequences of one sampling key, which are these rows (int64 [r])."""
        rows = rows.to(self._logits.device)
        logits = self._logits[rows]
        ids = self._choose_next(logits, sequences)
        self._ids[rows] = ids
        logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
        tokens = zip(sequences, logits, ids.tolist(), logprobs.tolist(), strict=True)
        for sequence, token_logits, token, logprob in tokens:
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            if sequence.top:
                best = token_logits.log_softmax(0).topk(min(sequence.top, len(token_logits)))
                sequence.tops.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

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
        left = [(row, text) for row, text in self._first_rows() if not (text.done or text.dropped)]
        if not left or self._decoding is None:
            self._texts, self._decoding, self._logits = [], None, torch.empty(0)
            return
        rows = [row + i for row, text in left for i in range(text.options.num_beams)]
        index = torch.tensor(rows, device=self._ids.device)
        if len(rows) < len(self):
            # all beams of a search have the same prompt
            self._decoding.batch_select_indices(self._parents[index])
            self._texts = [text for _, text in left]
        elif any(isinstance(text, BeamSequence) for text in self._texts):
            self._decoding.reorder_cache(self._parents)
        self._logits = self._decoding.decode_step(self._ids[index])
