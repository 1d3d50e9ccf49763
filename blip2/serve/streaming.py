"""Texts that grow token by token, and server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from blip2.generation.batching import SampledSequence
from blip2.results import StreamDetokenizer
from blip2.serve.batching_engine import EngineError, TextOutput, TopLogprobs
from blip2.serve.errors import logged_api_error

LEAST_LOGPROB = -9999.0  # OpenAI's for a probability of 0: JSON has no infinity


def finite_logprob(logprob: float) -> float:
    """A log-probability as JSON can hold it; not a number stays none, which `json_text` refuses."""
    return LEAST_LOGPROB if logprob < LEAST_LOGPROB else logprob


class GeneratedToken(NamedTuple):
    """A token of a text. `before`: the one before it, without which it may lack its space."""

    id: int
    before: int | None
    logprob: float
    top_logprobs: TopLogprobs


@dataclass
class GrowingText:
    """A text as the client gets it, token by token: cut before a stop string, which may begin within any piece."""

    detokenizer: StreamDetokenizer
    stops: list[str] = field(default_factory=list)
    text: str = ""  # released to the client
    pending: str = ""  # may turn out to begin a stop string
    tokens: list[GeneratedToken] = field(default_factory=list)  # without the end token
    logprobs: list[float] = field(default_factory=list)  # of all generated tokens, the end token included
    finish_reason: Literal["stop", "length"] | None = None
    logprobs_sent: int = 0  # tokens whose log-probabilities a stream has sent

    @classmethod
    def from_output(cls, output: TextOutput, decode: Callable[[list[int]], str]) -> GrowingText:
        """A text that is finished already."""
        ids = output.text.tokens
        top_logprobs = output.top_logprobs or [[] for _ in ids]
        tokens = list(map(_token, ids, (None, *ids), output.text.token_logprobs, top_logprobs))
        return cls(
            StreamDetokenizer(decode),
            text=str(output.text),
            tokens=tokens[:-1] if output.finished else tokens,
            logprobs=list(output.text.token_logprobs),
            finish_reason="stop" if output.finished else "length",
        )

    @property
    def count(self) -> int:
        """Generated tokens, the end token included."""
        return len(self.logprobs)

    def add(self, row: SampledSequence) -> str:
        """What the next token of its row adds to the released text."""
        position, piece = self.count, ""
        self.logprobs.append(row.logprobs[position])
        # in this order: until it is done the row may grow at any moment
        last = row.done and position == len(row.ids) - 1
        if not (last and row.finished):
            token, before = row.ids[position], self.tokens[-1].id if self.tokens else None
            piece = self.detokenizer.add(token)
            top_logprobs = row.tops[position] if row.tops else []
            self.tokens.append(_token(token, before, row.logprobs[position], top_logprobs))
        if last:
            piece += self.detokenizer.end()
            self.finish_reason = "stop" if row.finished else "length"
        self.pending += piece
        places = [place for stop in self.stops if (place := self.pending.find(stop)) >= 0]
        if places:
            released, self.pending, self.finish_reason = self.pending[: min(places)], "", "stop"
        else:
            overlaps = [] if self.finish_reason else [_overlap(self.pending, stop) for stop in self.stops]
            cut = len(self.pending) - max(overlaps, default=0)
            released, self.pending = self.pending[:cut], self.pending[cut:]
        self.text += released
        return released


def _token(id: int, before: int | None, logprob: float, top_logprobs: TopLogprobs) -> GeneratedToken:
    tops = [(other, finite_logprob(value)) for other, value in top_logprobs]
    return GeneratedToken(id, before, finite_logprob(logprob), tops)


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text with which a stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def json_text(content: Any) -> str:
    """JSON as every answer has it. Raises EngineError where a number that the model computed is not finite."""
    try:
        return json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise EngineError("the model computed a number that is not finite") from error


def json_response(content: Any) -> Response:
    """An answer in JSON; raises as `json_text`."""
    return Response(json_text(content), media_type="application/json")


def event_stream(request: Request, bodies: AsyncGenerator[dict[str, Any], None]) -> Response:
    """Each body as an event of JSON, then [DONE]; an error on the way is the last event instead.

    Where the client leaves, the iterator is closed at once.
    """

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(bodies):
                async for body in bodies:
                    yield f"data: {json_text(body)}\n\n"
        except Exception as error:
            yield f"data: {json_text(logged_api_error(request, error).body())}\n\n"
            return
        yield "data: [DONE]\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)
