"""The application's state in one object, and how a request's work reaches the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from starlette.requests import Request

from blip2.generation.batching import SampledSequence
from blip2.imagefiles.workers import PendingImage
from blip2.serve.batching_engine import Engine, GenerateRequest, Job, OnStep, PreparedImage, Work
from blip2.serve.errors import ApiError
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits
from blip2.serve.logs import log_event
from blip2.serve.metrics import Metrics
from blip2.serve.streaming import GrowingText

Result = TypeVar("Result")
Pieces = AsyncGenerator[tuple[int, str], None]  # each of the request's text of that number


@dataclass(frozen=True, eq=False)
class ServerContext:
    """What the routes of one application share.

    model_name: by which clients know the model. fetcher: None where image URLs are off.
    log_contents: prompts and texts go to the log.
    """

    engine: Engine
    limits: Limits
    model_name: str
    metrics: Metrics
    fetcher: Fetcher | None = None
    log_contents: bool = False

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """For work on images, which waits for an image worker: one for each request."""
        return ThreadPoolExecutor(self.limits.requests, "blip2 images")

    @property
    def decode(self) -> Callable[[list[int]], str]:
        """Token ids to text."""
        return self.engine.predictor.generator.tokenizer.decode

    def log_content(self, request: Request, content: dict[str, Any]) -> None:
        """Write a prompt or texts to the log, where that is switched on."""
        if self.log_contents:
            log_event("content", id=request.state.id, **content)

    def judge(self, captions: Sequence[Sequence[float]]) -> tuple[list[float], list[str]]:
        """How likely an image's captions are right, each by its tokens' log-probabilities, and what to warn of.

        Both are empty where the model is not calibrated.
        """
        calibration = self.engine.predictor.generator.calibration
        if calibration is None:
            return [], []
        probabilities = [calibration.probability_right(logprobs) for logprobs in captions]
        return probabilities, list(calibration.warnings(probabilities))

    def check_texts(self, *texts: str) -> None:
        """Raises ApiError where texts are longer, together, than this server reads."""
        length, limit = sum(map(len, texts)), self.limits.text_chars
        if length > limit:
            raise ApiError(400, f"the text has {length:,} characters; this server reads {limit:,}")

    def check_count(self, name: str, value: int, limit: int) -> None:
        """Raises ApiError where a request's number is above a limit."""
        if value > limit:
            raise ApiError(400, f"{name} is {value}; this server allows {limit}", param=name)

    async def in_thread(self, request: Request, work: Callable[[PendingImage], Result]) -> Result:
        """Run work on an image on another thread than the event loop's. It is given up where the request ends first."""
        pending = PendingImage(request.state.client)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, work, pending)
        finally:
            pending.cancel()

    async def prepare_image(self, request: Request, content: bytes, *, pixels: bool = False) -> PreparedImage:
        """A request's image, ready for the model; `pixels` as for `Engine.prepare_image`."""
        return await self.in_thread(
            request, lambda pending: self.engine.prepare_image(content, pending, pixels=pixels)
        )

    def submit(self, request: Request, work: Work, on_step: OnStep | None = None) -> Job:
        """Queue an HTTP request's work for the engine, in the slot that the request has."""
        state = request.state
        return self.engine.submit(work, state.slot, state.client, state.deadline, on_step)

    async def result(self, request: Request, work: Work) -> Any:
        """The engine's result. Where the request ends first, the job is cancelled."""
        return await asyncio.wrap_future(self.submit(request, work).result)

    def follow(self, request: Request, work: GenerateRequest, texts: list[GrowingText]) -> tuple[Job, Pieces]:
        """The job of a request's texts and, as its tokens are chosen, what each adds to one of the texts.

        Closing the iterator cancels the job, which is queued before the first token is awaited, so that an error in
        the request gets its own status.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[tuple[SampledSequence, int]] | None]()

        def on_step(rows: list[SampledSequence]) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, [(row, len(row.ids)) for row in rows])

        job = self.submit(request, work, on_step)
        job.result.add_done_callback(lambda _: loop.call_soon_threadsafe(queue.put_nowait, None))

        async def pieces() -> Pieces:
            try:
                while (rows := await queue.get()) is not None:
                    for i, (row, length) in enumerate(rows):
                        while texts[i].count < length and texts[i].finish_reason is None:
                            yield i, texts[i].add(row)
                    if texts[0].stops and all(text.finish_reason for text in texts):
                        return  # the job would go on
                job.result.result()  # raises the job's error
            finally:
                job.result.cancel()

        return job, pieces()


def context_of(request: Request) -> ServerContext:
    """The context of the application that a request came to."""
    context: ServerContext = request.app.state.context
    return context
