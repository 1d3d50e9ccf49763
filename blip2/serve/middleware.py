"""What every HTTP request passes on its way to the routes, outermost first: a class for each concern, in pure ASGI."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.batching_engine import BusyError, TooLateError
from blip2.serve.errors import ApiError, as_api_error, logged_api_error
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.logs import log_event
from blip2.serve.metrics import Metrics

OPEN = "/health"  # the only path that needs no key
UNLIMITED = (OPEN, "/ready", "/metrics")  # never refused because of other requests
# After its deadline, until a request that has not reported the delay by itself is answered; and for its work to end.
ANSWERING_SECONDS, ENDING_SECONDS = 0.5, 0.5
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class ResponseHeaders:
    """The request's id (the client's own, where it is harmless) and headers that protect the page, on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = Headers(scope=scope).get("x-request-id", "")
        id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = id
        own = HEADERS | {"x-request-id": id}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(own)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class RequestLog:
    """A log entry and the metrics of every request; the answer where a later middleware refuses it or fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, state = time.monotonic(), scope["state"]
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            api_error = logged_api_error(Request(scope), error)
            if status == 0:  # refused or failed on its way to the routes
                state.pop("client", None)
                await api_error.response()(scope, receive, send_noting_status)
        finally:
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count(route, status or 499, seconds)
            record = {"event": "request", "id": state["id"], "method": scope["method"], "route": route}
            record |= {"status": status or 500, "ms": round(1000 * seconds, 1)}
            log_event(**record, client=state.get("client", "refused"))


class ApiKeys:
    """Names the client: by its key, where the server has keys and so needs one of every request but /health, or else
    by its address."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        client: str | None = str((scope.get("client") or ("", 0))[0])
        if self._keys and scope["path"] != OPEN:
            client = self._keys.holder(headers.getlist("authorization"))
        if client is None:
            is_page = any("text/html" in value for value in headers.getlist("accept"))
            challenge = {"www-authenticate": 'Basic realm="blip2", charset="UTF-8"' if is_page else "Bearer"}
            message = "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        scope["state"]["client"] = client
        await self.app(scope, receive, send)


class SameSite:
    """Refuses the pages of other sites.

    hosts: names that a Host header may hold: a page elsewhere whose name was made to point here (DNS rebinding) must
        not read answers. None: any.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"] != OPEN:
            host_name = re.sub(r":\d*$", "", headers.get("host", "").lower())
            if self._hosts is not None and host_name not in self._hosts:
                message = "this server does not answer to that host name; see blip2 serve --allow-host"
                raise ApiError(403, message)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_cross_site(headers):
                raise ApiError(403, "pages of other sites may not use this server")
        await self.app(scope, receive, send)


class RequestLimits:
    """Bounds the requests at work and the bytes they hold; frees a request's slot at its end."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._limits = app, limits
        self._requests = 0
        self._bytes = 0  # of the bodies of all requests at work, and of the images fetched for them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in UNLIMITED and self._requests >= self._limits.requests:
            raise BusyError("too many requests at once", 1)
        state, own_bytes = scope["state"], 0

        def count_bytes(size: int) -> None:
            """Count what arrived for this request. Raises BusyError where all requests hold too much."""
            nonlocal own_bytes
            own_bytes += size
            self._bytes += size
            if self._bytes > self._limits.bodies_bytes:
                raise BusyError("the requests at work hold as much as this server has room for", 1)

        async def receive_counting() -> Message:
            message = await receive()
            count_bytes(len(message.get("body", b"")))
            return message

        state["count_bytes"] = count_bytes
        self._requests += 1
        try:
            await self.app(scope, receive_counting, send)
        finally:
            self._requests -= 1
            self._bytes -= own_bytes
            if "slot" in state:
                state["slot"].release()


class HeadRequests:
    """Answers HEAD as GET, without the body: the framework's own routes take GET alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"  # for the log


class RequestEnd:
    """Ends a request whose time is up or whose client has left, whatever it waits for then; sets its deadline."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        # where the connection has not noted the request's first byte, it begins now
        state["deadline"] = state.setdefault("began", time.monotonic()) + self._limits.request_seconds
        exchange = _Exchange(receive, send)
        left = asyncio.create_task(exchange.client_left.wait())
        work = asyncio.ensure_future(self.app(scope, exchange.receive, exchange.send))
        try:
            time_left = state["deadline"] + ANSWERING_SECONDS - time.monotonic()
            await asyncio.wait((work, left), timeout=time_left, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait((work,), timeout=ENDING_SECONDS)
            if work.done() and not work.cancelled():
                _raise_as_exception(work.exception())
                return
        finally:
            work.cancel()
            left.cancel()
            exchange.end()
        if exchange.client_left.is_set():
            raise ClientDisconnect
        late = TooLateError("the request took longer than the server allows")
        if not exchange.is_event_stream:
            raise late
        event = f"data: {json.dumps(as_api_error(late).body())}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": False})


class _Exchange:
    """What a request's work may still receive and send; nothing more after `end`."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.client_left = asyncio.Event()
        self.is_event_stream = False  # and it has begun
        self._receive, self._send = receive, send
        self._watching: asyncio.Future[Message] | None = None  # once the body is there
        self._ended = False

    async def receive(self) -> Message:
        if self._watching is None:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.client_left.set()
            elif not message.get("more_body", False):
                self._watching = asyncio.ensure_future(self._receive())  # next is that the client leaves
                self._watching.add_done_callback(lambda _: self.client_left.set())
            return message
        await self.client_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._ended:
            raise ClientDisconnect
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self.is_event_stream = kind.startswith("text/event-stream")
        await self._send(message)

    def end(self) -> None:
        self._ended = True
        if self._watching is not None:
            self._watching.cancel()


def _raise_as_exception(error: BaseException | None) -> None:
    """Raise what a request's work raised; a panic of a library's, which is none, as an `Exception`."""
    if error is not None and not isinstance(error, Exception):
        raise RuntimeError("a library panicked") from error
    if error is not None:
        raise error


def _is_cross_site(headers: Headers) -> bool:
    """Whether, by what the browser states, the request comes from a page of another site."""
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return True
    origin = headers.get("origin", "").lower()
    return bool(origin) and origin.partition("://")[2] != headers.get("host", "").lower()
