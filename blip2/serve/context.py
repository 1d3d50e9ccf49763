"""What every route of the server shares: the engine, the limits, errors, and how a request is read and answered."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_origin

import anyio.to_thread
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from blip2.generation.batching import SampledSequence
from blip2.images import ImageError, load_image
from blip2.serve.engine import BusyError, Call, Engine, EngineError, Job, Picture, TooLateError, Writing
from blip2.serve.fetch import Fetcher, FetchError
from blip2.serve.limits import Limits
from blip2.serve.schemas import Strict

log = logging.getLogger("blip2.serve")

Asked = TypeVar("Asked", bound=Strict)
Result = TypeVar("Result")

TYPES = {  # OpenAI's names for kinds of errors
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    501: "not_implemented_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error a client is told about."""

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
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error: what it did wrong in full, what we did wrong without any detail."""
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
        case ValueError():
            return ApiError(400, str(error))
    return ApiError(500, "something went wrong; the server's log has the details under this request's id")


def told(request: Request, error: BaseException) -> ApiError:
    """As `as_api_error`; what was our fault goes to the log."""
    found = as_api_error(error)
    if found.status == 500:
        log.error("request %s failed", request.state.id, exc_info=error)
    return found


@dataclass(frozen=True, eq=False)
class House:
    """What the routes stand on. `model`: the name clients use. `fetcher`: None where image URLs are off."""

    engine: Engine
    limits: Limits
    model: str
    fetcher: Fetcher | None
    decoders: anyio.CapacityLimiter  # images decoded at a time
    log_content: Callable[[Request, dict[str, Any]], None]

    # --- reading a request ---

    async def body(self, request: Request) -> bytes:
        """The body, within its limits of size and time. With it the request has its place in the engine."""
        self.engine.check_room()  # told before the body has arrived
        closing = {"connection": "close"}
        too_large = ApiError(
            413,
            f"the body is larger than {self.limits.body_bytes:,} bytes; send a smaller image",
            headers=closing,
        )
        if int(request.headers.get("content-length", "0")) > self.limits.body_bytes:
            raise too_large
        body = bytearray()
        left = request.state.began + self.limits.body_seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the body took longer than {self.limits.body_seconds:g} s", headers=closing
            ) from None
        request.state.place = self.engine.enter()
        return bytes(body)

    async def json(self, request: Request, model: type[Asked]) -> Asked:
        """A JSON body as `model`."""
        if _content_type(request) != "application/json":
            raise ApiError(415, "send JSON, with Content-Type: application/json")
        return self._validate(
            lambda body: model.model_validate_json(body, strict=True), await self.body(request)
        )

    async def form_or_json(
        self, request: Request, model: type[Asked], images: str = "image"
    ) -> tuple[Asked, list[bytes]]:
        """A body of either kind as `model`, and the files in its field `images`."""
        if _content_type(request) == "multipart/form-data":
            return await self._form(request, model, images)
        asked = await self.json(request, model)
        given = getattr(asked, images)
        urls = [given] if isinstance(given, str) else given
        self.check_count(images, len(urls), self.limits.images)  # before any of them is fetched
        return asked, [await self.image_at(request, url) for url in urls]

    async def _form(self, request: Request, model: type[Asked], images: str) -> tuple[Asked, list[bytes]]:
        body = await self.body(request)

        async def once() -> AsyncGenerator[bytes, None]:
            yield body

        limits = self.limits
        parser = MultiPartParser(
            request.headers,
            once(),
            max_files=limits.images,
            max_fields=limits.texts + len(model.model_fields),
            max_part_size=4 * limits.text_chars + 1024,
        )
        try:
            form = await parser.parse()
        except (MultiPartException, ValueError, KeyError, UnicodeError) as error:
            said = (
                error.message if isinstance(error, MultiPartException) else "its parts cannot be told apart"
            )
            raise ApiError(400, f"the form cannot be read: {said}") from None
        lists = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is list}
        files: list[bytes] = []
        values: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != images:
                    raise ApiError(400, f"a file belongs in the field {images!r}", param=images)
                files.append(await value.read())
            elif name == images:
                raise ApiError(400, f"the field {images!r} of a form is a file", param=images)
            elif name in lists:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise ApiError(400, "this field may come once", param=name)
            else:
                values[name] = value
        await form.close()
        many = images in lists
        if not many and len(files) != 1:
            raise ApiError(
                400, f"one file is needed in the field {images!r}; {len(files)} arrived", param=images
            )
        values[images] = ["file"] * len(files) if many else "file"
        return self._validate(model.model_validate, values), files

    @staticmethod
    def _validate(read: Callable[[Any], Asked], given: Any) -> Asked:
        try:
            return read(given)
        except ValidationError as error:
            raise _told(error) from None

    async def image_at(self, request: Request, url: str) -> bytes:
        """The file that an image's URL holds or, where switched on, names."""
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
        if self.fetcher is None:
            raise ApiError(
                400, "this server fetches no images; send the image itself as a data: URL", param="image"
            )
        content = await self.fetcher.fetch(url)
        request.state.hold(len(content))
        return content

    async def picture(self, content: bytes, *, pixels: bool = False) -> Picture:
        """A file's image, ready for the model; `pixels` as for `Engine.read`."""
        return await self.in_thread(lambda: self.engine.read(content, pixels=pixels))

    def open(self, content: bytes) -> Image.Image:
        """A file's image. Takes a while: not for a loop."""
        return load_image(content, max_pixels=self.limits.pixels)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Work on images, beside the loop."""
        return await anyio.to_thread.run_sync(work, limiter=self.decoders)

    # --- what may be asked for ---

    def check_texts(self, *texts: str) -> None:
        length = sum(map(len, texts))
        if length > self.limits.text_chars:
            raise ApiError(
                400, f"the text has {length:,} characters; this server reads {self.limits.text_chars:,}"
            )

    def check_count(self, name: str, value: int, limit: int) -> None:
        if value > limit:
            raise ApiError(400, f"{name} is {value}; this server allows {limit}", param=name)

    # --- asking the engine ---

    def submit(
        self,
        request: Request,
        asked: Writing | Call,
        on_step: Callable[[list[SampledSequence]], None] | None = None,
    ) -> Job:
        return self.engine.submit(
            asked,
            place=request.state.place,
            client=request.state.client,
            deadline=request.state.deadline,
            on_step=on_step,
        )

    async def result(self, request: Request, asked: Writing | Call) -> Any:
        """The engine's result; where the client leaves before, the job goes with it."""
        job = self.submit(request, asked)
        result = asyncio.wrap_future(job.result)
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({result, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            leaving.cancel()
            result.cancel()

    async def steps(
        self, request: Request, asked: Writing
    ) -> AsyncIterator[tuple[int, SampledSequence, int]]:
        """Tokens as they are chosen: (text, its row, place of the token in it). Leaving the loop frees the slot.

        The slot is asked for before the first step, so that what is wrong with a request is told in its status.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, SampledSequence, int] | None]()
        counts: dict[int, int] = {}

        def tell(events: list[tuple[int, SampledSequence, int] | None]) -> None:
            for event in events:
                queue.put_nowait(event)

        def on_step(rows: list[SampledSequence]) -> None:
            events: list[tuple[int, SampledSequence, int] | None] = []
            for i, row in enumerate(rows):
                events += [(i, row, place) for place in range(counts.get(i, 0), len(row.ids))]
                counts[i] = len(row.ids)
            loop.call_soon_threadsafe(tell, events)

        job = self.submit(request, asked, on_step)
        over: list[tuple[int, SampledSequence, int] | None] = [None]
        job.result.add_done_callback(lambda _: loop.call_soon_threadsafe(tell, over))

        async def follow() -> AsyncIterator[tuple[int, SampledSequence, int]]:
            try:
                while (event := await queue.get()) is not None:
                    yield event
                job.result.result()  # raises what went wrong
            finally:
                job.result.cancel()

        return follow()


def _told(error: ValidationError) -> ApiError:
    """The one of a body's faults that says most: of a field that may be of several kinds, not that it is no text."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    fault = min(found, key=lambda each: (each["type"] == "string_type", -len(each["loc"])))
    place: list[str] = []
    for part in map(str, fault["loc"]):
        if (
            part != "str" and "[" not in part and part not in place[-1:]
        ):  # not the kinds, nor a kind's name twice
            place.append(part)
    said = "there is no such field here" if fault["type"] == "extra_forbidden" else fault["msg"]
    where = ".".join(place)
    return ApiError(400, f"{where}: {said}" if where else said, param=where or None, code="invalid_value")


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
