"""The server process: uvicorn with deadlines for headers and unread answers, signals, logs."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2.predict import Predictor
from blip2.serve.app import LOOPBACK, build
from blip2.serve.engine import Engine
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.middleware import Guard

log = logging.getLogger("blip2.serve")


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with two deadlines it lacks: for a request's headers, and for a client that does not read."""

    class Deadlines(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None  # for a request
        _idle = False  # answered all that came
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._begin()
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self._idle:
                self._begin()
            super().data_received(data)
            self._wait()

        def on_response_complete(self) -> None:
            self._begin()
            self._idle = True
            super().on_response_complete()  # which may begin the next request
            self._stop_waiting()
            self._wait()

        def _begin(self) -> None:
            """From now on a request counts its time; it finds this in its state."""
            self._idle = False
            self.app_state = self.app_state | {"began": time.monotonic()}

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self._read_again()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self._stuck or self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._read_again()

        def _wait(self) -> None:
            """Once a request is under way its own deadlines count."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(limits.header_seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _read_again(self) -> None:
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None

    return Deadlines


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
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
    """Serve a model until SIGTERM or SIGINT; what was accepted by then is answered.

    Args:
        load: gives the model; called on the engine's thread while /health answers already.
        others: as for `build`.

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
    app = build(
        engine,
        model=model,
        limits=bounds,
        keys=keys,
        hosts=LOOPBACK | {each.lower() for each in allow_hosts},
        fetch_urls=fetch_urls,
        log_contents=log_contents,
    )
    server = listener(app, host=host, port=port, limits=bounds)

    def stop() -> None:
        server.should_exit = True

    engine.on_failure = stop
    server.run()
    if engine.failure is not None:
        raise engine.failure


def listener(app: Guard, *, host: str, port: int, limits: Limits) -> uvicorn.Server:
    """The server process's HTTP side, not yet running."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=protocol(limits),
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
    """One JSON object a line for what happens here, and uvicorn's own lines beside it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name in ("blip2.serve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        import json

        text = record.getMessage()
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
        }
        entry |= json.loads(text) if text.startswith("{") else {"event": "message", "message": text}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)
