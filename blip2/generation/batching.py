"""Texts written side by side that begin and end at different times: what a server decodes with.

Ids, rules, log-probabilities and scores are those of `generate` for each prompt alone: the next id is chosen by the
same functions, and padding never changes a result. A row is what the decoder writes one token of in a step: a greedy or
sampled text is one row, a beam search has one for each of its beams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip2.generation.decoding import (
    Generated,
    Move,
    Search,
    beam_search,
    choose,
    end_ids_of,
    said_before,
    scored,
    uniform_numbers,
)
from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2, DecodeState
from blip2.modeling.kv_cache import PromptCache


@dataclass(eq=False)
class SampledSequence:
    """One text, greedy or sampled.

    ids: new tokens so far; the end token, if it came, is the last. logprobs: of each, under the model itself.
    tops: for each, the `top` likeliest ids with their log-probabilities.
    done: it has ended, by its end token (`finished`) or at max_new_tokens.
    """

    options: GenerationOptions
    before: list[int]  # what the rules count as said before
    noise: list[float] | None
    ends: tuple[int, ...]
    top: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    dropped: bool = False

    @property
    def finished(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.ends

    @property
    def done(self) -> bool:
        return self.finished or len(self.ids) == self.options.max_new_tokens

    @property
    def score(self) -> float:
        """As `Generated.scores`."""
        return scored(self.ids, self.logprobs, self.options)[2]

    @property
    def sampling_key(self) -> tuple[object, ...]:
        """Rows for which this is equal choose their next id in one go."""
        options = self.options
        return (
            options.repetition_penalty,
            options.no_repeat_ngram_size,
            len(self.ids) < options.min_new_tokens,
            self.ends,
            (options.temperature, options.top_k, options.top_p) if options.do_sample else None,
        )


@dataclass(eq=False)
class BeamSequence:
    """A beam search for one prompt. `found`: its texts, once it is done."""

    options: GenerationOptions
    seen: Tensor  # int64 [1, L]
    ends: Tensor  # int64 [E]
    found: Generated | None = None
    dropped: bool = False
    _search: Search | None = None

    @property
    def done(self) -> bool:
        return self.found is not None

    def move(self, logits: Tensor) -> Move | None:
        """The next step of the search, given the logits [n, V] of the last; None: it is done."""
        try:
            if self._search is None:  # the rows are still one and the same
                self._search = beam_search(logits[:1], self.seen, self.options, self.ends)
                return next(self._search)
            return self._search.send(logits)
        except StopIteration as end:
            self.found = end.value
            return None


def width(options: GenerationOptions) -> int:
    """The rows that a prompt takes."""
    return max(options.num_beams, options.num_return_sequences)


class ContinuousBatch:
    """All texts being written. `choose` gives each row its next token, `advance` reads those tokens; between the two
    texts may be dropped, and before the next `choose` others may join."""

    def __init__(self, model: Blip2) -> None:
        self._model = model
        self._texts: list[SampledSequence | BeamSequence] = []
        self._decoding: DecodeState | None = None
        self._logits: Tensor | None = None  # float32 [R, V], for the next token of each row
        self._ids: Tensor | None = None  # int64 [R], the tokens chosen
        self._parents: Tensor | None = None  # int64 [R], the rows they go on from

    def __len__(self) -> int:
        return 0 if self._logits is None else len(self._logits)

    @torch.inference_mode()
    def join(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        options: Sequence[GenerationOptions],
        *,
        tops: Sequence[int],
        context: PromptCache | None = None,
    ) -> tuple[list[list[SampledSequence | BeamSequence]], list[PromptCache | None]]:
        """Begin texts for B prompts; arguments as for `generate`, options and tops for each prompt.

        All prompts must have the same max_new_tokens: positions are counted for the longest prompt with that many.

        Returns:
            for each prompt its `num_return_sequences` rows, or its one search; and the context of each prefix, good
            for other prompts after it: None where one was given, and with T5, which has none.

        Raises:
            ValueError: more positions than the language model has; nothing has joined then.
        """
        (limit,) = {each.max_new_tokens for each in options}
        decoding = self._model.start(prefix, input_ids, attention_mask, max_new_tokens=limit, context=context)
        read: list[PromptCache | None] = [None] * len(prefix)
        if context is None:
            read = decoding.prefixes(prefix.shape[1])
        said = said_before(self._model, prefix, input_ids, attention_mask)
        made: list[list[SampledSequence | BeamSequence]] = []
        for i, (each, top) in enumerate(zip(options, tops, strict=True)):
            ends = end_ids_of(self._model, each, input_ids.device)
            if each.num_beams > 1:
                made.append([BeamSequence(each, said[i : i + 1], ends)])
                continue
            count = each.num_return_sequences
            noise = uniform_numbers(each, count).tolist() if each.do_sample else [None] * count
            before = [id for id in said[i].tolist() if id >= 0]
            made.append(
                [SampledSequence(each, before, numbers, tuple(ends.tolist()), top) for numbers in noise]
            )
        places = [i for i, each in enumerate(options) for _ in range(width(each))]
        index = torch.tensor(places, device=prefix.device)
        logits = decoding.logits[index]
        if len(places) > len(options):
            decoding.keep(index)
        if self._decoding is None or self._logits is None:
            self._decoding, self._logits = decoding, logits
        else:
            self._decoding.join(decoding)
            self._logits = torch.cat([self._logits, logits])
        self._texts += [text for texts in made for text in texts]
        return made, read

    def _placed(self) -> Iterator[tuple[int, SampledSequence | BeamSequence]]:
        """Each text and its first row."""
        place = 0
        for text in self._texts:
            yield place, text
            place += text.options.num_beams

    @torch.inference_mode()
    def choose(self) -> None:
        """One more token for every row."""
        assert self._logits is not None
        self._ids = torch.zeros(len(self), dtype=torch.int64, device=self._logits.device)
        self._parents = torch.arange(len(self), device=self._logits.device)
        ways: dict[tuple[object, ...], list[tuple[int, SampledSequence]]] = {}
        for place, text in self._placed():
            if isinstance(text, SampledSequence):
                ways.setdefault(text.sampling_key, []).append((place, text))
                continue
            these = slice(place, place + text.options.num_beams)
            move = text.move(self._logits[these])
            if move is not None:
                self._ids[these], self._parents[these] = move.ids, move.parents + place
        for placed in ways.values():
            self._write(torch.tensor([place for place, _ in placed]), [row for _, row in placed])

    def _write(self, places: Tensor, rows: list[SampledSequence]) -> None:
        """One more token for rows that go the same way."""
        assert self._logits is not None and self._ids is not None
        places = places.to(self._logits.device)
        logits = self._logits[places]
        ids = self._choose(logits, rows)
        self._ids[places] = ids
        logprobs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
        for i, (row, token, logprob) in enumerate(zip(rows, ids.tolist(), logprobs.tolist(), strict=True)):
            row.ids.append(token)
            row.logprobs.append(logprob)
            if row.top:
                best = logits[i].log_softmax(0).topk(min(row.top, logits.shape[1]))
                row.tops.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def _choose(self, logits: Tensor, rows: list[SampledSequence]) -> Tensor:
        options, step, device = rows[0].options, len(rows[0].ids), logits.device
        said: list[list[int]] = [[] for _ in rows]
        if options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0:
            said = [row.before + row.ids for row in rows]
        length = max(map(len, said))
        seen = torch.tensor([[-1] * (length - len(each)) + each for each in said], device=device)
        ends = torch.tensor(rows[0].ends, dtype=torch.int64, device=device)
        uniform = None
        if options.do_sample:
            uniform = torch.tensor([(row.noise or [])[len(row.ids)] for row in rows], device=device)
        return choose(logits, seen.long(), options, step, ends, uniform)

    @torch.inference_mode()
    def advance(self) -> None:
        """Leave out the texts that are done or dropped, and read the others' last tokens."""
        placed = [(place, text) for place, text in self._placed() if not (text.done or text.dropped)]
        if not placed or self._decoding is None:
            self._texts, self._decoding, self._logits = [], None, None
            return
        assert self._ids is not None and self._parents is not None
        rows = [place + i for place, text in placed for i in range(text.options.num_beams)]
        index = torch.tensor(rows, device=self._ids.device)
        if len(rows) < len(self):
            self._decoding.keep(self._parents[index])  # a search's rows have all read the same prompt
            self._texts = [text for _, text in placed]
        elif any(isinstance(text, BeamSequence) for text in self._texts):
            self._decoding.reorder(self._parents)
        self._logits = self._decoding.step(self._ids[index])
