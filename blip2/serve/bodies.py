"""Request bodies: JSON and forms become schemas and the images' files, within the limits of size and time."""

from __future__ import annotations

import asyncio
import base64
import codecs
import re
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, get_args, get_origin

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from blip2.serve.context import context_of
from blip2.serve.errors import ApiError, excerpt
from blip2.serve.schemas import Strict

MAX_VALUES = 10_000  # in one body of JSON; a comma or bracket in a text counts too, so that those come on top
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\";\s]*)\"?", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*; *base64", re.IGNORECASE)
_OUTSIDE_BASE64 = re.compile(r"[^A-Za-z0-9+/]")

Schema = TypeVar("Schema", bound=Strict)


async def read_body(request: Request) -> bytes:
    """The body, within its limits of size and time; with it the request gets its slot in the engine's queue."""
    engine, limits = context_of(request).engine, context_of(request).limits
    engine.check_room()  # a full queue is reported before the body has arrived
    closing = {"connection": "close"}
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body is compressed; send it as it is", headers=closing)
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
    body = (await read_body(request)).removeprefix(codecs.BOM_UTF8)
    # Each value that is wrong would be a fault of its own, of a kilobyte: a body of commas takes gigabytes.
    limit = MAX_VALUES + context_of(request).limits.text_chars
    if sum(map(body.count, (b",", b"[", b"{"))) > limit:
        raise ApiError(400, f"the JSON has more than {limit:,} values")
    return schema.model_validate_json(body, strict=True)


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


class _FormParser(MultiPartParser):
    """Notes whether a form's end was there, which the framework's does without."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _read_form(request: Request, schema: type[Schema], images: str) -> tuple[Schema, list[bytes]]:
    body = await read_body(request)

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    limits, content_type = context_of(request).limits, request.headers["content-type"]
    charset = _CHARSET.search(content_type)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(400, f"a form is read as UTF-8, not as {excerpt(charset[1])}")
    parser = _FormParser(
        # which keeps every byte: what is no UTF-8 would be guessed
        Headers({"content-type": f"{_CHARSET.sub('', content_type)}; charset=latin-1"}),
        once(),
        max_files=limits.images,
        max_fields=limits.texts + len(schema.model_fields),
        max_part_size=4 * limits.text_chars + 1024,
    )
    parser.spool_max_size = (
        limits.body_bytes
    )  # which are in memory as it is: no files, of which there may be few
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError, UnicodeError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "its parts cannot be told apart"
        if reason.startswith("Part exceeded"):
            reason = f"a text in it is too long; an image has a file name (curl -F {images}=@FILE)"
        raise ApiError(400, f"the form cannot be read: {reason}") from None
    if not parser.ended:  # its last parts would be left out in silence
        raise ApiError(400, "the form cannot be read: it was cut, or does not end with its boundary")
    repeatable = {name for name, field in schema.model_fields.items() if _takes_list(field.annotation)}
    files: list[bytes] = []
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        name = _utf8(name)
        if isinstance(value, UploadFile):
            if name != images:
                raise ApiError(400, f"a file belongs in the field {images}", param=images)
            files.append(await value.read())
        elif name == images:
            raise ApiError(400, f"the field {images} of a form is a file", param=images)
        elif name in repeatable:
            values.setdefault(name, []).append(_utf8(value, name))
        elif name in values:
            raise ApiError(400, "this field may come once", param=name)
        else:
            values[name] = _utf8(value, name)
    await form.close()
    many = images in repeatable
    if not many and len(files) != 1:
        raise ApiError(400, f"one file is needed in the field {images}; {len(files)} arrived", param=images)
    values[images] = ["file"] * len(files) if many else "file"
    return schema.model_validate(values), files


def _utf8(text: str, field: str | None = None) -> str:
    """What a form's parser read as Latin-1."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise ApiError(400, "this part of the form is not UTF-8", param=field) from None


def _takes_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_takes_list, get_args(annotation)))


async def read_image_url(request: Request, url: str) -> bytes:
    """The file that an image's data: URL holds or, where that is switched on, that its http(s) URL names."""
    if url[:5].lower() == "data:":
        head, comma, data = url.partition(",")
        if not comma or not _DATA_URL.fullmatch(head):
            raise ApiError(400, "an image's data: URL reads data:image/...;base64,...", param="image")
        return _decode_base64(data)
    if not url.lower().startswith(("http://", "https://")):
        raise ApiError(400, "an image is a data: URL, such as data:image/png;base64,...", param="image")
    fetcher = context_of(request).fetcher
    if fetcher is None:
        message = "this server fetches no images; send the image itself as a data: URL"
        raise ApiError(400, message, param="image")
    content = await fetcher.fetch(url)
    request.state.count_bytes(len(content))
    return content


def _decode_base64(text: str) -> bytes:
    """The bytes that base64 stands for: in lines, as mail has it, and with all of its padding or none.

    Raises ApiError where anything else is in it: what came through damaged may still decode, to another file.
    """
    text = text.replace("\r\n", "").replace("\n", "")
    plain = text.rstrip("=")
    padding = "=" * (-len(plain) % 4)
    try:
        if text not in (plain, plain + padding):
            raise ValueError
        return base64.b64decode(plain + padding, validate=True)
    except ValueError:
        odd = _OUTSIDE_BASE64.search(plain)
        reason = "it was cut, or its padding is wrong"
        if odd is not None:
            reason = f"character {odd.start() + 1} is {excerpt(odd[0])}, but base64 has only A-Z, a-z, 0-9, + and /"
        raise ApiError(400, f"the image's base64 is damaged: {reason}", param="image") from None


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
