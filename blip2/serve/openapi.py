"""The OpenAPI document, with the bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from blip2.serve import schemas

BODIES = (
    schemas.CaptionRequest,
    schemas.AskRequest,
    schemas.MatchRequest,
    schemas.EmbedRequest,
    schemas.ExplainRequest,
    schemas.ChatRequest,
    schemas.CompletionRequest,
)
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


def body_of(schema: type[BaseModel], *files: str) -> dict[str, Any]:
    """A route's entry for a body that arrives as JSON, or as a form whose fields `files` are files."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=schema.__name__)}}
    }
    if files:
        document = schema.model_json_schema(ref_template=_REFERENCE)
        properties = dict(document["properties"])
        properties.pop("turns", None)  # a form has no place for them
        for name in files:
            file = {"type": "string", "format": "binary"}
            properties[name] = {"type": "array", "items": file} if properties[name].get("items") else file
        form = {key: document[key] for key in ("type", "required", "additionalProperties") if key in document}
        content["multipart/form-data"] = {"schema": form | {"properties": properties}}
    return {"requestBody": {"required": True, "content": content}}


def responses_of(schema: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """A route's entry for what it answers: a result, or any of the errors."""
    result: dict[str, Any] = {"model": schema, "description": "the result"}
    if stream:
        event = {"data": {"type": "string"}}
        result["content"] = {
            "text/event-stream": {"schema": {"type": "object", "properties": event, "required": ["data"]}}
        }
    responses: dict[int | str, dict[str, Any]] = {200: result}
    return responses | {
        status: {"model": schemas.Error, "description": why} for status, why in ERRORS.items()
    }


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        components = document.setdefault("components", {}).setdefault("schemas", {})
        for model in BODIES:
            schema = model.model_json_schema(ref_template=_REFERENCE)
            components |= schema.pop("$defs", {})
            components[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema
