"""Errors as clients get them: OpenAI's shape, the right status, nothing of the server's inside."""

from __future__ import annotations

import logging
import re
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from blip2.images import ImageError
from blip2.serve import schemas
from blip2.serve.batching_engine import BusyError, EngineError, TooLateError
from blip2.serve.fetch import FetchError

log = logging.getLogger("blip2.serve")

TYPES = {  # OpenAI's names for kinds of errors; any other of the client's is an invalid_request_error
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    501: "not_implemented_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_HTTP_MESSAGES = {404: "there is no such page here", 405: "this page does not support that HTTP method"}
_JSON_WORDS = {"False": "false", "True": "true", "None": "null"}
_SHOWN = 80  # characters of a client's text in a message
_KINDS = ("str", "bool", "int", "constrained-int")  # in a fault's place: the kind of value that was tried


def excerpt(text: str) -> str:
    """A client's text within a message: without what is not printable, and the beginning of a long one."""
    shown = "".join(char if char.isprintable() else "\ufffd" for char in text[:_SHOWN])
    return f'"{shown}{"..." if len(text) > _SHOWN else ""}"'


class ApiError(Exception):
    """An error whose message the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What the client gets for an error: its own mistakes in full, the server's without any detail."""
    match error:
        case ApiError():
            return error
        case BusyError():
            return ApiError(503, str(error), code="overloaded", headers={"retry-after": str(error.wait)})
        case TooLateError():
            return ApiError(504, str(error), code="timeout")
        case FetchError():
            return ApiError(400, str(error), param="image", code="invalid_image_url")
        case ImageError():
            return ApiError(400, str(error), param="image", code="invalid_image")
        case EngineError():
            return ApiError(500, f"{error}; the server's log has the details under this request's id")
        case HTTPException():  # refused by the framework: no such route, no such method
            message = _HTTP_MESSAGES.get(error.status_code, error.detail)
            return ApiError(error.status_code, message, headers=dict(error.headers or {}))
        case ValidationError():
            return _invalid_body(error)
        case ValueError() if not isinstance(error, UnicodeError):  # whose messages are Python's
            return ApiError(400, _in_json_words(str(error)))
    return ApiError(500, "something went wrong; the server's log has the details under this request's id")


def logged_api_error(request: Request, error: BaseException) -> ApiError:
    """As `as_api_error`; the server's own failures go to the log with their traceback."""
    api_error = as_api_error(error)
    if api_error.status == 500:
        log.error("request %s failed", request.state.id, exc_info=error)
    return api_error


def _invalid_body(error: ValidationError) -> ApiError:
    """The most telling fault of a body: rather than of which kind a value should be, what is wrong with it."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    ranks = [
        (
            fault["type"].endswith(("_type", "_parsing")) or fault["type"] == "literal_error",
            -len(fault["loc"]),
        )
        for fault in faults
    ]
    fields = [_field(fault["loc"]) for fault in faults]
    chosen = ranks.index(min(ranks))
    field, rank = fields[chosen], ranks[chosen]
    same = [faults[i]["msg"] for i in range(len(faults)) if (fields[i], ranks[i]) == (field, rank)]
    message = ", or ".join(dict.fromkeys(same))  # a field may take several kinds of value
    message = _in_json_words(message)
    if faults[chosen]["type"] == "extra_forbidden":
        meant = get_close_matches(field, vars(schemas)[error.title].model_fields, n=1)
        message = f"there is no such field here{f'; did you mean {meant[0]}?' if meant else ''}"
    return ApiError(
        400, f"{field}: {message}" if field else message, param=field or None, code="invalid_value"
    )


def _in_json_words(message: str) -> str:
    """A message of pydantic's or of Python's API, for who sent JSON."""
    return re.sub(r"\b(False|True|None)\b", lambda match: _JSON_WORDS[match[0]], message)


def _field(loc: tuple[int | str, ...]) -> str:
    path: list[str] = []
    for part in map(str, loc):
        if part not in _KINDS and "[" not in part and part not in path[-1:]:  # a kind's name may come twice
            path.append(excerpt(part).strip('"'))
    return ".".join(path)


async def error_response(request: Request, error: Exception) -> Response:
    """The application's handler of all exceptions."""
    if isinstance(error, ClientDisconnect):
        raise error  # there is nobody to answer
    return logged_api_error(request, error).response()
