"""The OpenAPI document, with the bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from blip2.serve import schemas

ERRORS = {
    400: "the request cannot be followed; the message says why",
    401: "no valid API key",
    403: "a page of another site, or another host name",
    404: "no such model or page",
    408: "the body was too slow",
    413: "the body is too large",
    415: "neither JSON nor a form",
    500: "the model failed",
    501: "this server cannot do that",
    503: "too many requests; Retry-After says when to try again",
    504: "out of time",
}
_REFERENCE = "#/components/schemas/{model}"
_bodies: list[tuple[type[BaseModel], Literal["validation"]]] = []  # that the documented routes read


def documented(
    result: type[BaseModel], body: type[BaseModel] | None = None, *, files: str = "", stream: bool = False
) -> dict[str, Any]:
    """Keywords for a route's decorator: what it answers, the errors included, and the body that it reads.

    files: the body's field for images; a form, where they are files, is read too. stream: the answer may be events.
    """
    answer: dict[str, Any] = {"model": result, "description": "the result"}
    if stream:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        answer["content"] = {"text/event-stream": {"schema": event}}
    errors = {status: {"model": schemas.Error, "description": reason} for status, reason in ERRORS.items()}
    keywords: dict[str, Any] = {"responses": {200: answer, **errors}}
    if body is not None:
        _bodies.append((body, "validation"))
        content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=body.__name__)}}}
        if files:
            content["multipart/form-data"] = {"schema": _form_schema(body, files)}
        keywords["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return keywords


def _form_schema(body: type[BaseModel], files: str) -> dict[str, Any]:
    document = body.model_json_schema(ref_template=_REFERENCE)
    properties = document["properties"]
    properties.pop("turns", None)  # a form has no place for them
    file = {"type": "string", "format": "binary"}
    properties[files] = {"type": "array", "items": file} if properties[files].get("items") else file
    left_out = ("title", "description", "$defs")
    return {key: value for key, value in document.items() if key not in left_out}


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The document of an application, built on its first use."""
    if app.openapi_schema is None:
        _, document = models_json_schema(_bodies, ref_template=_REFERENCE)
        FastAPI.openapi(app)["components"]["schemas"] |= document["$defs"]
    return FastAPI.openapi(app)
