"""What a model gives back: text with a score, an image already read, a match; and text in pieces."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from blip2.modeling.kv_cache import PromptCache


class GeneratedText(str):
    """Text that a model wrote: a str, and how sure the model was.

    score: sum of the log-probabilities of its tokens / number of tokens ** length_penalty.
    tokens: the ids, the end token included.
    token_logprobs: the natural logarithm of each token's probability under the model.
    """

    score: float
    tokens: tuple[int, ...]
    token_logprobs: tuple[float, ...]

    def __new__(
        cls,
        text: str,
        score: float = math.nan,
        tokens: Sequence[int] = (),
        token_logprobs: Sequence[float] = (),
    ) -> Self:
        self = super().__new__(cls, text)
        self.score, self.tokens, self.token_logprobs = score, tuple(tokens), tuple(token_logprobs)
        return self

    def _repr_html_(self) -> str:
        return _html(self, score=self.score)


class Caption(GeneratedText):
    """What is in an image: a str with .score, .tokens and .token_logprobs (see `GeneratedText`).

    probability_right: 0..1, how likely it is right, by the model's calibration.json; None where the model has none.
    warnings: why it may well be wrong, in words; empty where nothing speaks against it, or nothing is known.
    """

    probability_right: float | None = None
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        probability = math.nan if self.probability_right is None else self.probability_right
        return _html(self, score=self.score, probability_right=probability)


class Answer(GeneratedText):
    """The answer to a question: a str with .score, .tokens and .token_logprobs (see `GeneratedText`)."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image as the language model reads it: paid for once, good for any number of questions to the same model.

    prefix: [1, Q, W], the projected queries.
    prompt_cache: what the language model has read of the prefix; None with T5, which reads it with each prompt.
    size: width and height of the image in pixels.
    """

    prefix: Tensor
    prompt_cache: PromptCache | None
    size: tuple[int, int]

    def __repr__(self) -> str:
        return f"EncodedImage({self.size[0]}x{self.size[1]} px, {self.prefix.shape[1]} queries)"


@dataclass(frozen=True)
class Match:
    """How well a text fits an image.

    probability: 0..1, from the matching head, which reads image and text together (ITM).
    similarity: -1..1, cosine between the text's embedding and the closest of the image's (ITC): quicker, coarser.
    """

    probability: float
    similarity: float

    def _repr_html_(self) -> str:
        return _html("", probability=self.probability, similarity=self.similarity)


@dataclass(frozen=True)
class Ranked:
    """One of several answers to a question.

    probability: 0..1, this one's among all that were offered; together they make 1.
    logprob: the natural logarithm of the probability that the model writes this answer and ends.
    """

    answer: str
    probability: float
    logprob: float

    def _repr_html_(self) -> str:
        return _html(self.answer, probability=self.probability, logprob=self.logprob)


def _html(text: str, **figures: float) -> str:
    """What a notebook shows of a result: its text, and its figures small beside it."""
    shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if not math.isnan(value))
    words = html.escape(text) + " " if text else ""
    return f"<div>{words}<small>{shown}</small></div>"


def token_text(decode: Callable[[list[int]], str], token: int, before: int | None) -> str:
    """A token as part of a text: with its space, which T5's tokenizer writes only after another token."""
    if before is not None:
        first, both = decode([before]), decode([before, token])
        if both.startswith(first) and "\ufffd" not in both:
            return both[len(first) :]
    return decode([token])


class StreamDetokenizer:
    """Ids as they come -> pieces of text that add up to `decode(ids).strip()`.

    A token may end within a character: what decodes to the replacement character waits for the tokens that complete it,
    and white space waits for the word after it, since it is stripped from the end of a text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._ids, self._emitted = decode, list[int](), 0

    def add(self, token: int) -> str:
        """What the next token adds; "" where it has to wait."""
        self._ids.append(token)
        return self._more(self._decode(self._ids).strip().rstrip("\ufffd").rstrip())

    def end(self) -> str:
        """The rest, which was still waiting."""
        return self._more(self._decode(self._ids).strip())

    def _more(self, text: str) -> str:
        more = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return more


def detokenize_stream(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """The pieces of a text whose ids come one by one; see `StreamDetokenizer`."""
    pieces = StreamDetokenizer(decode)
    yield from filter(None, map(pieces.add, ids))
    if rest := pieces.end():
        yield rest
