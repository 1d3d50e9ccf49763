"""The application: context, routes and middleware put together; the routes that report the server's state; the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import blip2
from blip2.serve import native_api, openai_api, schemas
from blip2.serve.batching_engine import BusyError, Engine, EngineError, TooLateError
from blip2.serve.context import ServerContext, context_of
from blip2.serve.errors import ApiError, error_response
from blip2.serve.fetch import Fetcher
from blip2.serve.keys import Keys
from blip2.serve.metrics import Metrics
from blip2.serve.middleware import (
    ApiKeys,
    HeadRequests,
    RequestEnd,
    RequestLimits,
    RequestLog,
    ResponseHeaders,
    SameSite,
)
from blip2.serve.openapi import documented, openapi_document

PAGE = Path(__file__).parent / "page"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]", "testserver"))

state_routes = APIRouter()


def build_app(
    engine: Engine,
    *,
    model: str,
    keys: Keys | None = None,
    hosts: frozenset[str] | None = LOOPBACK,
    fetch_urls: bool = False,
    log_contents: bool = False,
) -> ASGIApp:
    """The whole ASGI application around an engine, which it starts and closes.

    Args:
        model: the name by which clients know the model.
        keys: None or an empty set: clients need none.
        hosts: host names that clients may use where they need no key; None: any.
        fetch_urls: let clients name images by http(s) URLs.
        log_contents: write prompts and answers to the log.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()

    app = FastAPI(
        title="blip2",
        version=blip2.__version__,
        description="Captions, answers, conversation and matching for images.",
        docs_url=None,  # its page comes from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    limits, metrics = engine.limits, Metrics(engine)
    fetcher = Fetcher(limits.fetch_bytes, limits.fetch_seconds) if fetch_urls else None
    app.state.context = ServerContext(engine, limits, model, metrics, fetcher, log_contents)
    for routes in (native_api.routes, openai_api.routes, state_routes):
        app.include_router(routes)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    engine_errors = (BusyError, TooLateError, EngineError)
    for kind in (ApiError, HTTPException, *engine_errors, ValueError, RuntimeError, OSError, Exception):
        app.add_exception_handler(kind, error_response)
    app.openapi = partial(openapi_document, app)  # type: ignore[method-assign]

    limited = RequestLimits(RequestEnd(HeadRequests(app), limits), limits)
    inner = ApiKeys(SameSite(limited, None if keys else hosts), keys or Keys())
    http = ResponseHeaders(RequestLog(inner, metrics))

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await http(scope, receive, send)
        elif scope["type"] == "lifespan":  # there are no websockets
            await app(scope, receive, send)

    return asgi


@state_routes.get("/health", responses={200: {"model": schemas.State}}, tags=["state"])
async def health(request: Request) -> Response:
    """Whether the process works; its model may still be loading."""
    engine = context_of(request).engine
    failed = engine.failure is not None or not engine.alive
    return JSONResponse({"status": "failed" if failed else "ok"}, 500 if failed else 200)


@state_routes.get("/ready", tags=["state"], **documented(schemas.State))
async def ready(request: Request) -> Response:
    """Whether the model is loaded."""
    _ = context_of(request).engine.predictor
    return JSONResponse({"status": "ready"})


@state_routes.get("/metrics", tags=["state"], responses={200: {"content": {"text/plain": {}}}})
async def prometheus_metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    content = context_of(request).metrics.text()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


@state_routes.get("/", include_in_schema=False)
async def index_page() -> Response:
    return FileResponse(PAGE / "index.html")
