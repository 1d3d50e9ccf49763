"""The application: all routes, behind the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

import blip2
from blip2.serve import native, openai_api, schemas
from blip2.serve.context import ApiError, House, told
from blip2.serve.engine import BusyError, Engine
from blip2.serve.fetch import Fetcher
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics
from blip2.serve.middleware import Guard, log_content

PAGE = Path(__file__).parent / "page"
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]", "testserver"))
DECODERS = 2  # images decoded at a time: one of the largest takes hundreds of MB


def build(
    engine: Engine,
    *,
    model: str,
    limits: Limits,
    keys: Keys | None = None,
    hosts: frozenset[str] | None = LOOPBACK,
    fetch_urls: bool = False,
    log_contents: bool = False,
) -> Guard:
    """The whole ASGI application around an engine, which it starts and closes.

    Args:
        model: the name by which clients know the model.
        keys: None or none in it: no key is asked for.
        hosts: host names the server answers to where no key is asked for; None: any.
        fetch_urls: let clients name images by http(s) URLs.
        log_contents: write prompts and answers to the log.
    """
    metrics = Metrics(engine)

    def write_down(request: Request, content: dict[str, Any]) -> None:
        if log_contents:
            log_content(request.state.id, content)

    house = House(
        engine,
        limits,
        model,
        Fetcher(limits.fetch_bytes, limits.fetch_seconds) if fetch_urls else None,
        anyio.CapacityLimiter(DECODERS),
        write_down,
    )

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()

    app = FastAPI(
        title="blip2",
        version=blip2.__version__,
        description="Captions, answers, conversation and matching for images.",
        docs_url=None,  # its page comes from another host
        redoc_url=None,
        lifespan=life,
    )
    app.include_router(native.router(house))
    app.include_router(openai_api.router(house))

    @app.get("/health", responses={200: {"model": schemas.State}}, tags=["state"])
    async def health() -> Response:
        """The process answers."""
        failed = engine.failure is not None or not engine.alive
        return JSONResponse({"status": "failed" if failed else "ok"}, 500 if failed else 200)

    @app.get("/ready", responses=native.answers(schemas.State), tags=["state"])
    async def ready() -> Response:
        """The model is loaded."""
        _ = engine.predictor
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["state"], responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if (PAGE / "index.html").is_file():

        @app.get("/", include_in_schema=False)
        async def page() -> Response:
            return FileResponse(PAGE / "index.html")

        app.mount("/page", StaticFiles(directory=PAGE), name="page")

    async def tell(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            raise error
        return told(request, error).response()

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "there is no such page here", 405: "this page is not asked for in that way"}
        return ApiError(
            error.status_code, said.get(error.status_code, error.detail), headers=dict(error.headers or {})
        ).response()

    for kind in (ApiError, BusyError, ValueError, RuntimeError, OSError, Exception):
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(HTTPException, tell_http)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return Guard(app, keys=keys or Keys(), limits=limits, metrics=metrics, hosts=None if keys else hosts)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        known = found.setdefault("components", {}).setdefault("schemas", {})
        for model in (
            schemas.CaptionRequest,
            schemas.AskRequest,
            schemas.MatchRequest,
            schemas.EmbedRequest,
            schemas.ExplainRequest,
            schemas.ChatRequest,
            schemas.CompletionRequest,
        ):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            known |= schema.pop("$defs", {})
            known[model.__name__] = schema
        app.openapi_schema = found
    return app.openapi_schema
