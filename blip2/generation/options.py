"""The decoding options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How new tokens are chosen. `beams=1` is greedy, or sampling with `do_sample`."""

    beams: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0  # no end token among the first so many
    length_penalty: float = 1.0  # a score is divided by length ** length_penalty: above 0 favours long texts
    early_stopping: bool | Literal["never"] = False  # beams: True stops at `beams` finished texts
    repetition_penalty: float = (
        1.0  # above 1: ids of the text so far, with OPT of the prompt too, less likely
    )
    no_repeat_ngram_size: int = 0  # 0 is off
    num_return_sequences: int = 1  # the best so many beams, or so many independent samples
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    seed: int | None = None  # sample j of every prompt draws from seed + j; None: from torch's generator
    eos_token_id: int | tuple[int, ...] | list[int] | None = None  # None: the model's own; (): none

    def __post_init__(self) -> None:
        for name in ("beams", "max_new_tokens", "num_return_sequences"):
            _require_int(name, getattr(self, name), 1)
        for name in ("min_new_tokens", "no_repeat_ngram_size", "top_k"):
            _require_int(name, getattr(self, name), 0)
        for name in ("repetition_penalty", "temperature", "top_p"):
            _require_number(name, getattr(self, name), 0.0)
        _require_number("length_penalty", self.length_penalty, -math.inf)
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
        if isinstance(self.eos_token_id, list):  # as transformers has several; the options stay hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for end_id in () if self.eos_token_id is None else _as_tuple(self.eos_token_id):
            _require_int("eos_token_id", end_id, 0)
        if self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be False, True or 'never', got {self.early_stopping!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}"
            )
        if self.do_sample and self.beams > 1:
            raise ValueError(f"do_sample needs beams=1, got beams={self.beams}: sample or search, not both")
        if not self.do_sample and (self.temperature != 1 or self.top_k != 0 or self.top_p != 1):
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p} shape only samples: "
                "set do_sample=True, or leave them at 1.0, 0, 1.0"
            )
        if not self.do_sample and self.num_return_sequences > self.beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is more than beams={self.beams}: "
                "search with more beams, or set do_sample=True"
            )


def _as_tuple(ids: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def _require_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")


def _require_number(name: str, value: float, above: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= above:
        limit = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{name} must be a number{limit}, got {value!r}")
