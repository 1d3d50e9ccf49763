"""The server process: an address, uvicorn, signals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from blip2.predict import Predictor
from blip2.serve.app import LOOPBACK, build_app
from blip2.serve.batching_engine import Engine
from blip2.serve.connections import (
    ACCEPTED_AT_ONCE,
    address_to_open,
    bound_sockets,
    fit_open_files,
    http_protocol,
    is_loopback,
    listen,
)
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.logs import log_event, log_to_stderr, stray_lines_logged


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
        ValueError: an address that others reach, without keys; one that is not this machine's; no such port.
        OSError: the port is taken. This, and the above, before the model is loaded.
        whatever `load` raised: there is nothing to serve then.
    """
    with contextlib.ExitStack() as closing:
        sockets = [closing.enter_context(sock) for sock in bound_sockets(host, port)]
        if not keys and not all(is_loopback(sock.getsockname()[0]) for sock in sockets):
            remedy = "give --api-key-file, or stay on 127.0.0.1 behind a proxy"
            raise ValueError(f"--host {host} lets other machines in: {remedy}")
        listen(sockets)
        log_to_stderr()
        bounds = fit_open_files(limits or Limits(), fetch_urls=fetch_urls)
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
        server.config.backlog = ACCEPTED_AT_ONCE  # which our sockets take for just that

        def stop() -> None:
            server.should_exit = True

        engine.on_failure = stop
        with stray_lines_logged():
            log_event("listening", url=address_to_open(sockets[0]))
            server.run(sockets)
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
            timeout_graceful_shutdown=int(limits.drain_seconds),
        )
    )
