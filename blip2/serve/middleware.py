"""What every request passes first: who asks, is there room, and what is written down about it."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.serve.context import ApiError
from blip2.serve.engine import BusyError
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.metrics import Metrics

log = logging.getLogger("blip2.serve")

OPEN = "/health"  # the only path that needs no key
ALWAYS = (OPEN, "/ready", "/metrics")  # answered however full the house is
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """The ASGI application around the application.

    hosts: names that a Host header may hold, where no key is asked for: a page elsewhere whose name was made to
        point here (DNS rebinding) must not read answers. None: any.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Keys, limits: Limits, metrics: Metrics, hosts: frozenset[str] | None
    ) -> None:
        self._app, self._keys, self._limits, self._metrics, self._hosts = app, keys, limits, metrics, hosts
        self._inside = 0
        self._bytes = 0  # of the bodies of all requests inside, and of the images fetched for them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets here
        headers = _headers(scope)
        began = time.monotonic()
        given = (headers.get(b"x-request-id") or [b""])[0].decode("latin-1")
        id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {
            "id": id,
            "began": state.get("began", began),
            "deadline": began + self._limits.request_seconds,
        }
        status = held = 0

        def hold(size: int) -> None:
            """Count what arrived for this request. Raises BusyError where all requests hold too much."""
            nonlocal held
            held += size
            self._bytes += size
            if self._bytes > self._limits.bodies_bytes:
                raise BusyError("the requests at work hold as much as this server has room for", 1)

        state["hold"] = hold

        async def take() -> Message:
            message = await receive()
            hold(len(message.get("body", b"")))
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = HEADERS | {"x-request-id": id}
                kept = [pair for pair in message.get("headers", []) if pair[0].decode() not in extra]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in extra.items()]
            await send(message)

        self._inside += 1
        gone = False
        try:
            state["client"] = self._let_in(scope, headers)
            await self._app(scope, take, answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except ClientDisconnect:
            gone = True
        except Exception:
            log.exception("request %s failed", id)
            if status == 0:
                await ApiError(500, "something went wrong; the log has the details").response()(
                    scope, receive, answer
                )
        finally:
            self._inside -= 1
            self._bytes -= held
            if "place" in state:
                state["place"].leave()
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count(route, status or 499, seconds)
            record = {
                "event": "request",
                "id": id,
                "method": scope["method"],
                "route": route,
                "status": status or (499 if gone else 500),
                "ms": round(1000 * seconds, 1),
                "client": state.get("client", "refused"),
            }
            log.info("%s", json.dumps(record))

    def _let_in(self, scope: Scope, headers: dict[bytes, list[bytes]]) -> str:
        """Whose request this is. Raises ApiError where it stays outside."""
        path, address = scope["path"], (scope.get("client") or ("", 0))[0]
        if path == OPEN:
            return str(address)
        if self._keys:
            holder = self._keys.holder(headers.get(b"authorization", []))
            if holder is None:
                page = any(b"text/html" in value for value in headers.get(b"accept", []))
                challenge = 'Basic realm="blip2", charset="UTF-8"' if page else "Bearer"
                raise ApiError(
                    401,
                    "an API key is needed: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": challenge},
                )
        elif self._hosts is not None and _host(headers) not in self._hosts:
            raise ApiError(403, "this server does not answer to that host name; see blip2 serve --allow-host")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _from_elsewhere(headers):
            raise ApiError(403, "pages of other sites may not use this server")
        if path not in ALWAYS and self._inside > self._limits.requests:
            raise ApiError(503, "too many requests at once", code="overloaded", headers={"retry-after": "1"})
        return holder if self._keys and holder else str(address)


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _host(headers: dict[bytes, list[bytes]]) -> str:
    """The host name that the client believes it talks to."""
    value = (headers.get(b"host") or [b""])[0].decode("latin-1").lower()
    return value.rpartition(":")[0] if re.search(r":\d*$", value) else value


def _from_elsewhere(headers: dict[bytes, list[bytes]]) -> bool:
    """Whether a browser says that a page of another site is asking."""
    if (headers.get(b"sec-fetch-site") or [b"none"])[0] in (b"cross-site", b"same-site"):
        return True
    origin = headers.get(b"origin")
    if not origin:
        return False
    host = (headers.get(b"host") or [b""])[0].lower()
    return origin[0].lower().partition(b"://")[2] != host


def log_content(id: str, content: dict[str, Any]) -> None:
    """Write down what was asked and answered; only where the server was told to."""
    log.info("%s", json.dumps({"event": "content", "id": id} | content, ensure_ascii=True))
