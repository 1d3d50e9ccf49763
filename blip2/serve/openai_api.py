"""/v1: OpenAI's API, as far as a model can follow it that looks at one image.

A conversation is about the latest image in it, and begins with the question that brings it. It becomes the model's own
prompt format. An image alone, with no text, is captioned.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from blip2.results import StreamDetokenizer, token_text
from blip2.serve import schemas
from blip2.serve.batching_engine import GenerateRequest
from blip2.serve.bodies import read_image_url, read_json_body
from blip2.serve.context import ServerContext, context_of
from blip2.serve.errors import ApiError, excerpt
from blip2.serve.native_api import usage
from blip2.serve.openapi import documented
from blip2.serve.streaming import GrowingText, event_stream, json_response
from blip2.text import CAPTION_PROMPT, is_blank

NO_SYSTEM = "system and developer messages are not read: the model's prompt format has no place for them"
DEFAULT_NEW_TOKENS = 30  # where the client names no number, as in Python
STARTED = int(time.time())

routes = APIRouter(prefix="/v1", tags=["OpenAI"])


# --- the two formats of an answer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """A chat completion's choices, whole and in chunks. `decode` keeps special tokens."""

    decode: Callable[[list[int]], str]
    logprobs: bool

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: GrowingText) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        reason, logprobs = text.finish_reason, self._logprobs(text)
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """Those before any text, one for each choice."""
        return [self._chunk(i, {"role": "assistant", "content": "", "refusal": None}) for i in range(count)]

    def chunks(self, index: int, text: GrowingText, piece: str) -> Iterator[dict[str, Any]]:
        if piece:
            yield self._chunk(index, {"content": piece}, self._logprobs(text, text.logprobs_sent))
            text.logprobs_sent = len(text.tokens)
        if text.finish_reason:
            unsent = text.logprobs_sent < len(text.tokens)
            logprobs = self._logprobs(text, text.logprobs_sent) if unsent else None
            yield self._chunk(index, {}, logprobs, text.finish_reason)

    @staticmethod
    def _chunk(index: int, delta: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, text: GrowingText, start: int = 0) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            self._token(token.id, token.before, token.logprob)
            | {"top_logprobs": [self._token(id, token.before, logprob) for id, logprob in token.top_logprobs]}
            for token in text.tokens[start:]
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, before: int | None, logprob: float) -> dict[str, Any]:
        text = token_text(self.decode, token, before)
        encoded = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": encoded}


@dataclass(frozen=True)
class CompletionFormat:
    """A plain completion's choices, whole and in chunks. logprobs: how many of the likeliest; None: no logprobs."""

    decode: Callable[[list[int]], str]
    logprobs: int | None

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: GrowingText, piece: str | None = None) -> dict[str, Any]:
        shown, reason = text.text if piece is None else piece, text.finish_reason
        logprobs = self._logprobs(text) if reason else None
        return {"index": index, "text": shown, "logprobs": logprobs, "finish_reason": reason}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, text: GrowingText, piece: str) -> Iterator[dict[str, Any]]:
        if piece or text.finish_reason:
            yield self.choice(index, text, piece)

    def _logprobs(self, text: GrowingText) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        ids = [token.id for token in text.tokens]
        top_logprobs = [
            {token_text(self.decode, id, token.before): logprob for id, logprob in token.top_logprobs}
            for token in text.tokens
        ]
        return {
            "tokens": [token_text(self.decode, token.id, token.before) for token in text.tokens],
            "token_logprobs": [token.logprob for token in text.tokens],
            "top_logprobs": top_logprobs if self.logprobs else None,
            "text_offset": [len(self.decode(ids[:i]).lstrip()) for i in range(len(ids))],
        }


@routes.post("/chat/completions", **documented(schemas.ChatCompletion, schemas.ChatRequest, stream=True))
async def create_chat_completion(request: Request) -> Response:
    """The next answer of a conversation about an image."""
    context, body = context_of(request), await read_json_body(request, schemas.ChatRequest)
    _check(context, body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    new_tokens = _new_tokens(context, body.max_completion_tokens or body.max_tokens)
    url, prompt = _chat_prompt(context, body, new_tokens)
    image = await context.prepare_image(request, await read_image_url(request, url))
    work = GenerateRequest(image, (prompt,), body.options(new_tokens), body.top_logprobs or 0)
    context.log_content(request, {"prompt": prompt})
    decode = partial(context.engine.predictor.generator.tokenizer.decode, skip_special=False)
    form = ChatFormat(decode, bool(body.logprobs))
    system = any(message.role in ("system", "developer") for message in body.messages)
    if body.stream and not system:
        return await _respond(request, body, work, form)
    return await _respond(request, body, work, form, warnings=[NO_SYSTEM] if system else None)


@routes.post("/completions", **documented(schemas.Completion, schemas.CompletionRequest, stream=True))
async def create_completion(request: Request) -> Response:
    """Continue a prompt, or each of several, about the image in the extra field `image`."""
    context, body = context_of(request), await read_json_body(request, schemas.CompletionRequest)
    _check(context, body)
    if body.image is None:
        client = 'extra_body={"image": "data:image/png;base64,..."}'
        raise _image_required("image", f"put one in the field image (with the openai client: {client})")
    prompts = body.prompts()
    texts = len(prompts) * (body.n or 1)
    context.check_count("the number of prompts times n", texts, context.limits.sequences)
    context.check_texts(*prompts)
    options = body.options(_new_tokens(context, body.max_tokens, prompts))
    image = await context.prepare_image(request, await read_image_url(request, body.image))
    work = GenerateRequest(image, prompts, options, body.logprobs or 0)
    context.log_content(request, {"prompts": prompts})
    return await _respond(request, body, work, CompletionFormat(context.decode, body.logprobs))


@routes.get("/models", **documented(schemas.ModelList))
async def list_models(request: Request) -> Response:
    """The model that this server has."""
    return json_response({"object": "list", "data": [_model_entry(context_of(request))]})


@routes.get("/models/{model}", **documented(schemas.Model))
async def retrieve_model(request: Request, model: str) -> Response:
    """The same, by name."""
    context = context_of(request)
    if model != context.model_name:
        raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
    return json_response(_model_entry(context))


def _model_entry(context: ServerContext) -> dict[str, Any]:
    return {"id": context.model_name, "object": "model", "created": STARTED, "owned_by": "blip2"}


# --- from a request to the engine's work ----------------------------------------------------------------------------


def _check(context: ServerContext, body: schemas.CompletionSettings) -> None:
    if body.model != context.model_name:
        message = (
            f"there is no model {excerpt(body.model)} here; this server has {excerpt(context.model_name)}"
        )
        raise ApiError(404, message, param="model", code="model_not_found")
    context.check_count("n", body.n or 1, context.limits.sequences)
    context.check_texts(*body.stops())
    if "" in body.stops():
        raise ApiError(400, "a stop string is empty", param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options are for stream: true", param="stream_options")


def _new_tokens(context: ServerContext, requested: int | None, prompts: Sequence[str] = ()) -> int:
    """As many as requested, allowed by the server, and possible beside the longest prompt."""
    new_tokens = min(requested or DEFAULT_NEW_TOKENS, context.limits.new_tokens)
    predictor = context.engine.predictor
    room = predictor.model.prompt_room(0)
    if prompts:
        room -= max(len(predictor.generator.tokenizer.encode(prompt)) for prompt in prompts)
    else:
        room //= 2  # a conversation keeps at least half of it
    return max(1, min(new_tokens, room))


def _chat_prompt(context: ServerContext, body: schemas.ChatRequest, new_tokens: int) -> tuple[str, str]:
    """The URL of a conversation's image, and the prompt of its next answer."""
    if (count := len(body.messages)) > context.limits.turns:
        raise ApiError(400, f"{count} messages; this server reads {context.limits.turns}")
    turns: list[tuple[str, str]] = []
    question: str | None = None
    image: str | None = None
    for i, message in enumerate(body.messages):
        text, images = message.text_and_images()
        if len(images) > 1:
            raise ApiError(400, "a message may hold one image: the model looks at one", param=f"messages.{i}")
        if message.role == "user":
            if is_blank(text or "") and (text is not None or not images):
                reason = "the message has neither text nor image" if text is None else "the question is empty"
                raise ApiError(400, f"{reason}; write some words", param=f"messages.{i}")
            if images:  # an unanswered question before the image is about it
                image, turns = images[0], []
            text = text or ""
            question = text if question is None else f"{question} {text}".strip()
        elif message.role == "assistant":
            if images:
                raise ApiError(400, "only a user's message brings an image", param=f"messages.{i}")
            if question is not None:
                turns.append((question, text or ""))
                question = None
    if image is None:
        part = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
        raise _image_required("messages", f"add a content part {part}")
    if question is None:
        raise ApiError(400, "the last message must be the user's", param="messages")
    context.check_texts(question, *(text for turn in turns for text in turn))
    if not question.strip():
        return image, CAPTION_PROMPT
    turns = [turn for turn in turns if turn[0].strip()]
    return image, context.engine.predictor.chat_prompt(turns, question, new_tokens)


def _image_required(param: str, remedy: str) -> ApiError:
    message = f"this model writes about an image, and none arrived: {remedy}"
    return ApiError(400, message, param=param, code="image_required")


# --- from the engine's texts to a response --------------------------------------------------------------------------


async def _respond(
    request: Request,
    body: schemas.CompletionSettings,
    work: GenerateRequest,
    form: ChatFormat | CompletionFormat,
    **extra: Any,
) -> Response:
    """All choices in one object, or their chunks as events; with include_usage a last event that counts tokens."""
    context, stops = context_of(request), body.stops()
    kind = form.chunk_object if body.stream else form.object
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    head |= {"model": context.model_name, **extra}

    def count(texts: list[GrowingText]) -> dict[str, int]:
        context.log_content(request, {"answers": [text.text for text in texts]})
        return usage(context, work, sum(text.count for text in texts))

    def doubts(texts: list[GrowingText]) -> dict[str, list[str]]:
        """What to warn of, once a caption of a calibrated model is written; answers are not judged."""
        if {*work.prompts} != {CAPTION_PROMPT} or not all(text.finish_reason for text in texts):
            return {}
        _, warnings = context.judge([text.logprobs for text in texts])
        return {"warnings": [*(extra.get("warnings") or ()), *warnings]} if warnings else {}

    async def bodies() -> AsyncGenerator[dict[str, Any], None]:
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        no_usage = {"usage": None} if counted else {}
        async with aclosing(pieces):
            for chunk in form.first_chunks(len(texts)):
                yield head | {"choices": [chunk]} | no_usage
            async for index, piece in pieces:
                for chunk in form.chunks(index, texts[index], piece):
                    warned = doubts(texts) if chunk["finish_reason"] else {}
                    yield head | {"choices": [chunk]} | no_usage | warned
        total = count(texts)
        if counted:
            yield head | {"choices": [], "usage": total}

    if body.stream or stops:
        texts = [GrowingText(StreamDetokenizer(context.decode), stops) for _ in range(work.rows)]
        _, pieces = context.follow(request, work, texts)
        if body.stream:
            return event_stream(request, bodies())
        async for _ in pieces:
            pass
    else:
        outputs = await context.result(request, work)
        texts = [GrowingText.from_output(output, context.decode) for output in outputs]
    choices = [form.choice(i, text) for i, text in enumerate(texts)]
    return json_response(head | {"choices": choices, "usage": count(texts)} | doubts(texts))
