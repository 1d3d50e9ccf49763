"""The application's state in one object, and how a request's work reaches the engine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from blip2.generation.batching import SampledSequence
from blip2.serve.batching_engine import Engine, GenerateRequest, Job, OnStep, PreparedImage, Work
from blip2.serve.errors import ApiError
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics

log = logging.getLogger("blip2.serve")

DECODERS = 2  # images decoded at a time: one of the largest takes hundreds of MB

Result = TypeVar("Result")


class NewToken(NamedTuple):
    """A token of a text that is being generated: number `position` of `row`, the request's text number `text`."""

    text: int
    row: SampledSequence
    position: int


@dataclass(frozen=True, eq=False)
class ServerContext:
    """What the routes of one application share.

    model_name: by which clients know the model. fetcher: None where image URLs are off.
    decoders: bounds the images decoded at a time. log_contents: prompts and texts go to the log.
    """

    engine: Engine
    limits: Limits
    model_name: str
    metrics: Metrics
    fetcher: Fetcher | None = None
    log_contents: bool = False
    decoders: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(DECODERS))

    @property
    def decode(self) -> Callable[[list[int]], str]:
        """Token ids to text."""
        return self.engine.predictor.generator.tokenizer.decode

    def log_content(self, request: Request, content: dict[str, Any]) -> None:
        """Write a prompt or texts to the log, where that is switched on."""
        if self.log_contents:
            log.info("%s", json.dumps({"event": "content", "id": request.state.id} | content))

    def check_texts(self, *texts: str) -> None:
        """Raises ApiError where texts are longer, together, than this server reads."""
        length, limit = sum(map(len, texts)), self.limits.text_chars
        if length > limit:
            raise ApiError(400, f"the text has {length:,} characters; this server reads {limit:,}")

    def check_count(self, name: str, value: int, limit: int) -> None:
        """Raises ApiError where a request's number is above a limit."""
        if value > limit:
            raise ApiError(400, f"{name} is {value}; this server allows {limit}", param=name)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run work on images on another thread than the event loop's."""
        return await anyio.to_thread.run_sync(work, limiter=self.decoders)

    async def prepare_image(self, content: bytes, *, pixels: bool = False) -> PreparedImage:
        """A file's image, ready for the model; `pixels` as for `Engine.prepare_image`."""
        return await self.in_thread(lambda: self.engine.prepare_image(content, pixels=pixels))

    def submit(self, request: Request, work: Work, on_step: OnStep | None = None) -> Job:
        """Queue an HTTP request's work for the engine, in the slot that the request has."""
        state = request.state
        return self.engine.submit(
            work, slot=state.slot, client=state.client, deadline=state.deadline, on_step=on_step
        )

    async def result(self, request: Request, work: Work) -> Any:
        """The engine's result. Where the client leaves first, the job is cancelled."""
        result = asyncio.wrap_future(self.submit(request, work).result)
        disconnect = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({result, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            disconnect.cancel()
            result.cancel()

    async def tokens(self, request: Request, work: GenerateRequest) -> AsyncIterator[NewToken]:
        """Tokens as they are chosen. Closing the iterator cancels the job.

        The job is queued before the first token is awaited, so that an error in the request gets its own status.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[NewToken] | None]()
        counts: dict[int, int] = {}

        def on_step(rows: list[SampledSequence]) -> None:
            tokens: list[NewToken] = []
            for i, row in enumerate(rows):
                count = len(row.ids)
                tokens += [NewToken(i, row, position) for position in range(counts.get(i, 0), count)]
                counts[i] = count
            loop.call_soon_threadsafe(queue.put_nowait, tokens)

        job = self.submit(request, work, on_step)
        job.result.add_done_callback(lambda _: loop.call_soon_threadsafe(queue.put_nowait, None))

        async def follow() -> AsyncIterator[NewToken]:
            try:
                while (tokens := await queue.get()) is not None:
                    for token in tokens:
                        yield token
                job.result.result()  # raises the job's error
            finally:
                job.result.cancel()

        return follow()


def context_of(request: Request) -> ServerContext:
    """The context of the application that a request came to."""
    context: ServerContext = request.app.state.context
    return context


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
