"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.responses import StreamingResponse


class EventStream(StreamingResponse):
    """Each text of `events` as an event. Where the client leaves, the iterator is closed at once."""

    def __init__(self, events: AsyncIterator[str]) -> None:
        async def lines() -> AsyncIterator[str]:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    yield f"data: {event}\n\n"

        super().__init__(
            lines(),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
