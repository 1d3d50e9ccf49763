"""The server process: uvicorn with deadlines for headers and unread answers, signals, logs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import sys
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2.predict import Predictor
from blip2.serve.app import LOOPBACK, build_app
from blip2.serve.batching_engine import Engine
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits


def http_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with two deadlines it lacks: for a request's headers, and for a client that does not read."""

    class Deadlines(H11Protocol):
        _timers: dict[str, asyncio.TimerHandle]
        _idle = False  # all requests so far are answered

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._timers = {}
            super().connection_made(transport)
            self._begin_request()
            self._start_header_timer()

        def data_received(self, data: bytes) -> None:
            if self._idle:
                self._begin_request()
            super().data_received(data)
            self._start_header_timer()

        def on_response_complete(self) -> None:
            self._begin_request()
            self._idle = True
            super().on_response_complete()  # which may begin the next request
            self._stop_timer("header")
            self._start_header_timer()

        def _begin_request(self) -> None:
            """A request's time counts from now; it finds this in its state."""
            self._idle = False
            self.app_state = self.app_state | {"began": time.monotonic()}

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer("header")
            self._stop_timer("write")
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_timer("write", limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_timer("write")

        def _start_header_timer(self) -> None:
            """Once a request is being handled its own deadlines count."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer("header")
            else:
                self._start_timer("header", limits.header_seconds, self.transport.close)

        def _start_timer(self, name: str, seconds: float, end: Callable[[], None]) -> None:
            if name not in self._timers:
                self._timers[name] = self.loop.call_later(seconds, end)

        def _stop_timer(self, name: str) -> None:
            if timer := self._timers.pop(name, None):
                timer.cancel()

    return Deadlines


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def run_server(
    load: Callable[[], Predictor],
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Keys | None = None,
    limits: Limits | None = None,
    allow_hosts: tuple[str, ...] = (),
    fetch_urls: bool = False,
    log_contents: bool = False,
) -> None:
    """Serve a model until SIGTERM or SIGINT; requests accepted by then are answered.

    Args:
        load: returns the model; called on the engine's thread, while /health already answers.
        others: as for `build_app`.

    Raises:
        ValueError: an address that others reach, without keys.
        whatever `load` raised: there is nothing to serve then.
    """
    bounds = limits or Limits()
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets other machines in: give --api-key-file, or stay on 127.0.0.1 behind a proxy"
        )
    log_to_stderr()
    engine = Engine(load, bounds)
    app = build_app(
        engine,
        model=model,
        keys=keys,
        hosts=LOOPBACK | {name.lower() for name in allow_hosts},
        fetch_urls=fetch_urls,
        log_contents=log_contents,
    )
    server = uvicorn_server(app, host=host, port=port, limits=bounds)

    def stop() -> None:
        server.should_exit = True

    engine.on_failure = stop
    server.run()
    if engine.failure is not None:
        raise engine.failure


def uvicorn_server(app: ASGIApp, *, host: str, port: int, limits: Limits) -> uvicorn.Server:
    """uvicorn with the limits that are its part, not yet running."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=http_protocol(limits),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_seconds),
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=int(limits.drain_seconds),
        )
    )


def log_to_stderr() -> None:
    """Log to standard error, one JSON object a line: the server's entries and uvicorn's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in ("blip2.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        entry = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname}
        entry |= json.loads(text) if text.startswith("{") else {"event": "message", "message": text}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)
