"""Request bodies: JSON and forms become schemas and the images' files, within the limits of size and time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, get_args, get_origin

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from blip2.serve.context import context_of
from blip2.serve.errors import ApiError
from blip2.serve.schemas import Strict

Schema = TypeVar("Schema", bound=Strict)


async def read_body(request: Request) -> bytes:
    """The body, within its limits of size and time; with it the request gets its slot in the engine's queue."""
    engine, limits = context_of(request).engine, context_of(request).limits
    engine.check_room()  # a full queue is reported before the body has arrived
    closing = {"connection": "close"}
    message = f"the body is larger than {limits.body_bytes:,} bytes; send a smaller image"
    too_large = ApiError(413, message, headers=closing)
    if int(request.headers.get("content-length", "0")) > limits.body_bytes:
        raise too_large
    body = bytearray()
    time_left = request.state.began + limits.body_seconds - time.monotonic()
    try:
        async with asyncio.timeout(max(time_left, 0)):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_seconds:g} s", headers=closing) from None
    request.state.slot = engine.acquire_slot()
    return bytes(body)


async def read_json_body(request: Request, schema: type[Schema]) -> Schema:
    """A JSON body as `schema`."""
    if _content_type(request) != "application/json":
        raise ApiError(415, "send JSON, with Content-Type: application/json")
    return schema.model_validate_json(await read_body(request), strict=True)


async def read_form_or_json(
    request: Request, schema: type[Schema], images: str = "image"
) -> tuple[Schema, list[bytes]]:
    """A body of either kind as `schema`, and the files of its field `images`."""
    if _content_type(request) == "multipart/form-data":
        return await _read_form(request, schema, images)
    context, parsed = context_of(request), await read_json_body(request, schema)
    value = getattr(parsed, images)
    urls = [value] if isinstance(value, str) else value
    context.check_count(images, len(urls), context.limits.images)  # before any of them is fetched
    return parsed, [await read_image_url(request, url) for url in urls]


async def _read_form(request: Request, schema: type[Schema], images: str) -> tuple[Schema, list[bytes]]:
    body = await read_body(request)

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    limits = context_of(request).limits
    parser = MultiPartParser(
        request.headers,
        once(),
        max_files=limits.images,
        max_fields=limits.texts + len(schema.model_fields),
        max_part_size=4 * limits.text_chars + 1024,
    )
    parser.spool_max_size = (
        limits.body_bytes
    )  # the body is in memory as it is: no files, of which there may be few
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError, UnicodeError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "its parts cannot be told apart"
        raise ApiError(400, f"the form cannot be read: {reason}") from None
    repeatable = {name for name, field in schema.model_fields.items() if _takes_list(field.annotation)}
    files: list[bytes] = []
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != images:
                raise ApiError(400, f"a file belongs in the field {images!r}", param=images)
            files.append(await value.read())
        elif name == images:
            raise ApiError(400, f"the field {images!r} of a form is a file", param=images)
        elif name in repeatable:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise ApiError(400, "this field may come once", param=name)
        else:
            values[name] = value
    await form.close()
    many = images in repeatable
    if not many and len(files) != 1:
        raise ApiError(400, f"one file is needed in the field {images!r}; {len(files)} arrived", param=images)
    values[images] = ["file"] * len(files) if many else "file"
    return schema.model_validate(values), files


def _takes_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_takes_list, get_args(annotation)))


async def read_image_url(request: Request, url: str) -> bytes:
    """The file that an image's data: URL holds or, where that is switched on, that its http(s) URL names."""
    if url[:5].lower() == "data:":
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "an image's data: URL reads data:image/...;base64,...", param="image")
        try:  # in lines, as mail has it, or without the padding at its end
            plain = data.encode("ascii").translate(None, b"\r\n\t ").rstrip(b"=")
            return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(400, "the image's base64 is damaged", param="image") from None
    if not url.lower().startswith(("http://", "https://")):
        raise ApiError(400, "an image is a data: URL, such as data:image/png;base64,...", param="image")
    fetcher = context_of(request).fetcher
    if fetcher is None:
        message = "this server fetches no images; send the image itself as a data: URL"
        raise ApiError(400, message, param="image")
    content = await fetcher.fetch(url)
    request.state.count_bytes(len(content))
    return content


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
