"""Texts written side by side that begin and end at different times: what a server decodes with.

Greedy and sampled texts. Ids, rules, log-probabilities and scores are those of `generate` for each prompt alone: the
next id is chosen by the same functions, and padding never changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip2.generate import (
    GenerationOptions,
    choose,
    end_ids_of,
    said_before,
    scored,
    uniform_numbers,
)
from blip2.layers import Context
from blip2.model import Blip2, Decoding


@dataclass(eq=False)
class Row:
    """One text.

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
    def way(self) -> tuple[object, ...]:
        """Rows for which this is equal choose their next id in one go."""
        options = self.options
        return (
            options.repetition_penalty,
            options.no_repeat_ngram_size,
            len(self.ids) < options.min_new_tokens,
            self.ends,
            (options.temperature, options.top_k, options.top_p) if options.do_sample else None,
        )


class Rows:
    """All texts being written. `choose` gives each its next token, `advance` reads those tokens; between the two
    texts may be dropped, and before the next `choose` others may join."""

    def __init__(self, model: Blip2) -> None:
        self._model = model
        self._rows: list[Row] = []
        self._decoding: Decoding | None = None
        self._logits: Tensor | None = None  # float32 [R, V], for the next token of each row

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def join(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        options: Sequence[GenerationOptions],
        *,
        tops: Sequence[int],
        context: Context | None = None,
    ) -> list[list[Row]]:
        """Begin texts for B prompts; arguments as for `generate`, options and tops for each prompt.

        All prompts must have the same max_new_tokens: positions are counted for the longest prompt with that many.

        Returns:
            for each prompt its `num_return_sequences` rows.

        Raises:
            ValueError: more positions than the language model has; nothing has joined then.
        """
        (limit,) = {each.max_new_tokens for each in options}
        decoding = self._model.start(prefix, input_ids, attention_mask, max_new_tokens=limit, context=context)
        said = said_before(self._model, prefix, input_ids, attention_mask).tolist()
        made: list[list[Row]] = []
        for each, top, before in zip(options, tops, said, strict=True):
            count = each.num_return_sequences
            noise = uniform_numbers(each, count).tolist() if each.do_sample else [None] * count
            ends = tuple(end_ids_of(self._model, each, input_ids.device).tolist())
            kept = [i for i in before if i >= 0]
            made.append([Row(each, kept, numbers, ends, top) for numbers in noise])
        places = [i for i, rows in enumerate(made) for _ in rows]
        index = torch.tensor(places, device=prefix.device)
        logits = decoding.logits[index]
        if places != list(range(len(made))):
            decoding.keep(index)
        if self._decoding is None or self._logits is None:
            self._decoding, self._logits = decoding, logits
        else:
            self._decoding.join(decoding)
            self._logits = torch.cat([self._logits, logits])
        self._rows += [row for rows in made for row in rows]
        return made

    @torch.inference_mode()
    def choose(self) -> None:
        """One more token for every row."""
        assert self._logits is not None
        ways: dict[tuple[object, ...], list[int]] = {}
        for place, row in enumerate(self._rows):
            ways.setdefault(row.way, []).append(place)
        ids = torch.empty(len(self._rows), dtype=torch.int64, device=self._logits.device)
        for places in ways.values():
            index = torch.tensor(places, device=ids.device)
            ids[index] = self._choose(self._logits[index], [self._rows[place] for place in places])
        logprobs = self._logits.gather(1, ids[:, None])[:, 0] - self._logits.logsumexp(1)
        self._note_tops()
        for row, token, logprob in zip(self._rows, ids.tolist(), logprobs.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)

    def _choose(self, logits: Tensor, rows: list[Row]) -> Tensor:
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

    def _note_tops(self) -> None:
        assert self._logits is not None
        for place, row in enumerate(self._rows):
            if row.top:
                best = self._logits[place].log_softmax(0).topk(min(row.top, self._logits.shape[1]))
                row.tops.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    @torch.inference_mode()
    def advance(self) -> None:
        """Leave out the rows that are done or dropped, and read the others' last tokens."""
        kept = [place for place, row in enumerate(self._rows) if not (row.done or row.dropped)]
        if not kept or self._decoding is None:
            self._rows, self._decoding, self._logits = [], None, None
            return
        if len(kept) < len(self._rows):
            assert self._logits is not None
            self._decoding.keep(torch.tensor(kept, device=self._logits.device))
            self._rows = [self._rows[place] for place in kept]
        device = self._logits.device if self._logits is not None else None
        self._logits = self._decoding.step(torch.tensor([row.ids[-1] for row in self._rows], device=device))
