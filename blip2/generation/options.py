"""The decoding options: their only list. Python, the command line, HTTP, evaluation and bulk runs are made from it.

This file needs nothing but the standard library, so that a command's help does not wait for torch.
"""

from __future__ import annotations

import difflib
import operator
import sys
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, Unpack

DEFAULT_NUM_BEAMS = 5  # what the published results were made with
# What differs between the kinds of text: the published captions were scored as they are, answers favour short texts.
LENGTH_PENALTY = {"caption": 1.0, "answer": -1.0}

# By pydantic's names, which are also those of the operators; the words for messages.
_BOUNDS = {"ge": ", {:g} or more", "gt": " above {:g}", "le": ", at most {:g}", "lt": ", below {:g}"}

TextKind = Literal["caption", "answer"]
EarlyStopping = bool | Literal["never"]
TokenIds = int | tuple[int, ...] | list[int]


def _option(default: Any, text: str, **bounds: float) -> Any:
    """A field with its help and its bounds: ge and le (inclusive), gt and lt (exclusive)."""
    return field(default=default, metadata={"help": text, "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How new tokens are chosen: greedy by default, by beam search with `num_beams`, or by sampling.

    Names and meanings are those of transformers; all lengths count new tokens only. `temperature`, `top_k` or `top_p`
    ask for sampling by being given; a temperature of 0 is greedy search. There is no hidden default such as
    transformers' top_k of 50. With `eos_token_id=()` no token ends a text.

    Raises:
        ValueError: an option out of its bounds, or options that contradict each other.

    Options:
    """

    num_beams: int = _option(1, "sequences that beam search follows", ge=1)
    max_new_tokens: int = _option(30, "longest text, in tokens", ge=1)
    min_new_tokens: int = _option(0, "shortest text, in tokens", ge=0)
    length_penalty: float = _option(
        1.0,
        "scores are divided by length ** length_penalty: above 0 favors long texts, below 0 short ones",
        ge=-50,
        le=50,  # a length to a higher power is no float
    )
    early_stopping: EarlyStopping = _option(  # noqa: RUF009 (it makes a field)
        False,
        "when beam search ends: by estimate (false), at num_beams finished texts (true), or never early",
    )
    repetition_penalty: float = _option(1.0, "above 1 makes tokens of the text so far less likely", gt=0)
    no_repeat_ngram_size: int = _option(0, "no sequence of so many tokens twice, 0 for off", ge=0)
    num_return_sequences: int = _option(1, "texts for each image, best first", ge=1)
    do_sample: bool | None = _option(
        None, "draw each token at random; temperature, top_k and top_p ask for it too"
    )
    temperature: float | None = _option(
        None, "of sampling: low is safe, high is wild; 0 is greedy search", ge=0
    )
    top_k: int | None = _option(None, "sample among the k likeliest tokens, 0 for all", ge=0)
    top_p: float | None = _option(
        None, "sample among the likeliest tokens that make up this probability", gt=0, le=1
    )
    seed: int | None = _option(
        None, "makes sampling repeatable: sequence j draws from seed + j", ge=0, lt=2**63
    )
    eos_token_id: TokenIds | None = _option(  # noqa: RUF009 (it makes a field)
        None, "ids that end a text (default: the model's own)", ge=0, lt=2**63
    )

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # as transformers has several; the options stay hashable
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for option in fields(self):
            _check(option, getattr(self, option.name))
        if self.temperature == 0:
            object.__setattr__(self, "do_sample", False)
            for name in ("temperature", "top_k", "top_p"):
                object.__setattr__(self, name, None)
        shaping = (self.temperature, self.top_k, self.top_p)
        if self.do_sample is None:
            object.__setattr__(self, "do_sample", shaping != (None, None, None))
        neutral = all(value in (None, off) for value, off in zip(shaping, (1, 0, 1), strict=True))
        if not self.do_sample and not neutral:
            named = zip(("temperature", "top_k", "top_p"), shaping, strict=True)
            given = ", ".join(f"{name}={value}" for name, value in named if value is not None)
            raise ValueError(
                f"only samples are shaped by {given}: leave out do_sample=False, or leave out the others"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}"
            )
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                f"do_sample needs num_beams=1, got num_beams={self.num_beams}: sample or search, not both"
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: "
                "search with more beams, or sample with do_sample=True"
            )

    @property
    def rows(self) -> int:
        """The rows that a prompt takes."""
        return max(self.num_beams, self.num_return_sequences)

    def end_ids(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """The ids that end a text; `default`: the model's own."""
        ids = default if self.eos_token_id is None else self.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids)


# `help(GenerationOptions)` lists the options with the help of their fields.
GenerationOptions.__doc__ = f"{GenerationOptions.__doc__}" + "".join(
    f"    {option.name}: {option.metadata['help']}.\n    " for option in fields(GenerationOptions)
)


class GenerateKwargs(TypedDict, total=False):
    """The fields of `GenerationOptions` as keywords of `caption`, `ask` and `Chat.send`."""

    num_beams: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    early_stopping: EarlyStopping
    repetition_penalty: float
    no_repeat_ngram_size: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    eos_token_id: TokenIds | None


def make_options(
    kind: TextKind,
    *,
    stream: bool = False,
    num_return_sequences: int | None = None,
    **options: Unpack[GenerateKwargs],
) -> GenerationOptions:
    """The options of a caption or an answer: those passed (None: left out), the rest by the rules all doors share.

    Beam search follows five beams unless sampling, streaming or at temperature 0. The length penalty is 1.0 for
    captions and -1.0 for answers, as in the published results.

    Raises:
        TypeError: an option that does not exist; the message names the one that was probably meant.
        ValueError: as `GenerationOptions`, or beam search or several texts while streaming.
    """
    names = [option.name for option in fields(GenerationOptions)]
    for name in options.keys() - {*names}:
        meant = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(names)}"
        raise TypeError(f"there is no decoding option {name!r}; {hint}")
    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if stream and (chosen.get("num_beams", 1) != 1 or num_return_sequences not in (None, 1)):
        raise ValueError(
            "stream=True writes one text as it comes, but beam search knows its text only at the end: "
            "leave out num_beams and num_return_sequences"
        )
    result = GenerationOptions(**{"length_penalty": LENGTH_PENALTY[kind]} | chosen)
    one_path = stream or result.do_sample or chosen.get("temperature") == 0
    return replace(
        result,
        num_beams=chosen.get("num_beams", 1 if one_path else DEFAULT_NUM_BEAMS),
        num_return_sequences=1 if num_return_sequences is None else num_return_sequences,
    )


def bounds_of(option: Field[Any]) -> dict[str, float]:
    """The bounds of an option's value by pydantic's names: ge, gt, le, lt."""
    bounds: dict[str, float] = option.metadata["bounds"]
    return bounds


def _check(option: Field[Any], value: object) -> None:
    name, kind = option.name, str(option.type)
    if value is None and "None" in kind:
        return
    if name == "early_stopping":
        if not isinstance(value, bool) and value != "never":
            raise ValueError(f"early_stopping must be False, True or 'never', got {value!r}")
    elif name == "do_sample":
        if not isinstance(value, bool):
            raise ValueError(f"do_sample must be True or False, got {value!r}")
    else:
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(name, number, float if kind.startswith("float") else int, bounds_of(option))


def _check_number(name: str, value: Any, kind: type, bounds: dict[str, float]) -> None:
    good = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if (
        good
        and abs(value) <= sys.float_info.max  # false for NaN, and whole numbers can be larger
        and all(getattr(operator, bound)(value, limit) for bound, limit in bounds.items())
    ):
        return
    limits = "".join(_BOUNDS[bound].format(limit) for bound, limit in bounds.items())
    raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number{limits}; got {value!r}")
