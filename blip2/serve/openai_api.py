"""/v1: the API that people's clients already speak, as far as it is true of a model that looks at one image.

A conversation is about the latest image in it, and begins with the question that brings it. It becomes the model's own
prompt format. An image alone, with no text, is captioned.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from blip2.generation.batching import SampledSequence
from blip2.generation.options import GenerationOptions
from blip2.results import StreamDetokenizer, token_text
from blip2.serve import schemas
from blip2.serve.context import ApiError, House, told
from blip2.serve.engine import Writing
from blip2.serve.events import EventStream
from blip2.serve.native import answers, body_of, usage
from blip2.text import CAPTION_PROMPT

NO_SYSTEM = "system and developer messages are not read: the model's prompt format has no place for them"
USUAL_NEW_TOKENS = 30  # where the client names none, as in Python


@dataclass
class Choice:
    """A text as the client gets it, growing token by token: cut before a stop string, which may begin in any piece."""

    pieces: StreamDetokenizer
    stops: list[str]
    text: str = ""  # handed out
    waiting: str = ""  # may turn out to begin a stop string
    tokens: list[tuple[int, float, list[tuple[int, float]]]] = field(default_factory=list)
    count: int = 0  # tokens written, the end token included
    reason: str | None = None  # why it ended

    def take(self, row: SampledSequence, place: int) -> str:
        """What a token adds to what may be shown."""
        self.count += 1
        last = (
            row.done and place == len(row.ids) - 1
        )  # in this order: until it is done the row may grow at any moment
        ended = last and row.finished
        piece = "" if ended else self.pieces.add(row.ids[place])
        if not ended:
            self.tokens.append((row.ids[place], row.logprobs[place], row.tops[place] if row.tops else []))
        if last:
            piece += self.pieces.end()
            self.reason = "stop" if row.finished else "length"
        return self._show(piece)

    def _show(self, piece: str) -> str:
        self.waiting += piece
        found = [place for stop in self.stops if (place := self.waiting.find(stop)) >= 0]
        if found:
            shown, self.waiting, self.reason = self.waiting[: min(found)], "", "stop"
        else:
            held = 0 if self.reason else max((_overlap(self.waiting, stop) for stop in self.stops), default=0)
            cut = len(self.waiting) - held
            shown, self.waiting = self.waiting[:cut], self.waiting[cut:]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text with which a stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def router(house: House) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    created = int(time.time())

    def check(asked: schemas.Sampling) -> None:
        if asked.model != house.model:
            raise ApiError(
                404,
                f"there is no model {asked.model!r} here; this server has {house.model!r}",
                param="model",
                code="model_not_found",
            )
        house.check_count("n", asked.n or 1, house.limits.sequences)
        house.check_texts(*asked.stops())
        if "" in asked.stops():
            raise ApiError(400, "a stop string is empty", param="stop")
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options are for stream: true", param="stream_options")

    def new_tokens(asked: int | None, prompts: Sequence[str] = ()) -> int:
        """As many as asked for, the server allows, and fit beside the longest prompt."""
        wanted = min(asked or USUAL_NEW_TOKENS, house.limits.new_tokens)
        room, encode = (
            house.engine.predictor.model.prompt_room(0),
            house.engine.predictor.generator.tokenizer.encode,
        )
        if prompts:
            room -= max(len(encode(prompt)) for prompt in prompts)
        else:
            room //= 2  # a conversation keeps at least half of it
        return max(1, min(wanted, room))

    async def about(
        request: Request, url: str, prompts: tuple[str, ...], options: GenerationOptions, tops: int
    ) -> Writing:
        picture = await house.picture(await house.image_at(request, url))
        return Writing(picture, prompts, options, tops)

    async def run(
        request: Request, writing: Writing, stops: list[str]
    ) -> tuple[list[Choice], AsyncIterator[tuple[int, str, SampledSequence, int]]]:
        """The choices, and an iterator that fills them: (choice, what to show, row, place)."""
        decode = house.engine.predictor.generator.tokenizer.decode
        choices = [Choice(StreamDetokenizer(decode), stops) for _ in range(writing.rows)]
        steps = await house.steps(request, writing)

        async def follow() -> AsyncIterator[tuple[int, str, SampledSequence, int]]:
            async with aclosing(steps):  # type: ignore[type-var]
                async for i, row, place in steps:
                    if choices[i].reason is None:
                        shown = choices[i].take(row, place)
                        yield i, shown, row, place
                    if all(choice.reason for choice in choices):
                        return

        return choices, follow()

    async def fill(request: Request, writing: Writing, stops: list[str]) -> list[Choice]:
        """The choices when they are done."""
        if not stops:
            house_texts = await house.result(request, writing)
            decode = house.engine.predictor.generator.tokenizer.decode
            made = []
            for text in house_texts:
                tokens = text.written.tokens
                tops = text.tops or [[] for _ in tokens]
                noted = list(zip(tokens, text.written.token_logprobs, tops, strict=True))
                choice = Choice(StreamDetokenizer(decode), [], str(text.written), count=len(tokens))
                choice.tokens = noted[:-1] if text.finished else noted
                choice.reason = "stop" if text.finished else "length"
                made.append(choice)
            return made
        choices, steps = await run(request, writing, stops)
        async with aclosing(steps):  # type: ignore[type-var]
            async for _ in steps:
                pass
        return choices

    def note(request: Request, choices: list[Choice]) -> None:
        house.log_content(request, {"answers": [choice.text for choice in choices]})

    def prompt_of(asked: schemas.ChatRequest, new: int) -> tuple[str, str, list[str]]:
        """The image's URL, the prompt, and warnings."""
        if len(asked.messages) > house.limits.turns:
            raise ApiError(400, f"{len(asked.messages)} messages; this server reads {house.limits.turns}")
        warnings = [NO_SYSTEM] if any(each.role in ("system", "developer") for each in asked.messages) else []
        turns: list[tuple[str, str]] = []
        question: str | None = None
        image: str | None = None
        for i, message in enumerate(asked.messages):
            text, images = _content(message)
            if len(images) > 1:
                raise ApiError(
                    400, "a message may hold one image: the model looks at one", param=f"messages.{i}"
                )
            if message.role == "user":
                if images:  # what was asked before it and not answered is asked about it
                    image, turns = images[0], []
                question = text if question is None else f"{question} {text}".strip()
            elif message.role == "assistant":
                if images:
                    raise ApiError(400, "only a user's message brings an image", param=f"messages.{i}")
                if question is not None:
                    turns.append((question, text))
                    question = None
        if image is None:
            raise ApiError(
                400,
                "this model answers about an image, and none arrived: add a content part "
                '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}',
                param="messages",
                code="image_required",
            )
        if question is None:
            raise ApiError(400, "the last message must be the user's", param="messages")
        house.check_texts(question, *(part for turn in turns for part in turn))
        if not question.strip():
            return image, CAPTION_PROMPT, warnings
        asked_before = [turn for turn in turns if turn[0].strip()]
        return image, house.engine.predictor.chat_prompt(asked_before, question, new), warnings

    @routes.post(
        "/chat/completions",
        responses=answers(schemas.ChatCompletion, stream=True),
        openapi_extra=body_of(schemas.ChatRequest),
    )
    async def chat(request: Request) -> Response:
        """The next answer of a conversation about an image."""
        asked = await house.json(request, schemas.ChatRequest)
        check(asked)
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        new = new_tokens(asked.max_completion_tokens or asked.max_tokens)
        url, prompt, warnings = prompt_of(asked, new)
        writing = await about(request, url, (prompt,), asked.options(new), asked.top_logprobs or 0)
        house.log_content(request, {"prompt": prompt})
        id, at = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        whole = partial(house.engine.predictor.generator.tokenizer.decode, skip_special=False)

        def logprobs(choice: Choice, since: int = 0) -> dict[str, Any] | None:
            if not asked.logprobs:
                return None
            befores = [None, *(i for i, _, _ in choice.tokens)]
            content = [
                _token(whole, i, before, logprob)
                | {"top_logprobs": [_token(whole, top, before, share) for top, share in tops]}
                for before, (i, logprob, tops) in list(zip(befores, choice.tokens))[since:]
            ]
            return {"content": content, "refusal": None}

        if asked.stream:
            head = {"id": id, "object": "chat.completion.chunk", "created": at, "model": house.model}
            head |= {"warnings": warnings} if warnings else {}
            choices, steps = await run(request, writing, asked.stops())

            def chunk(
                i: int, delta: dict[str, Any], given: Any = None, reason: str | None = None
            ) -> dict[str, Any]:
                return {"index": i, "delta": delta, "logprobs": given, "finish_reason": reason}

            async def bodies() -> AsyncIterator[list[dict[str, Any]]]:
                for i in range(len(choices)):
                    yield [chunk(i, {"role": "assistant", "content": "", "refusal": None})]
                async with aclosing(steps):  # type: ignore[type-var]
                    given = [0] * len(choices)
                    async for i, shown, _, _ in steps:
                        fresh = logprobs(choices[i], given[i]) if shown else None
                        given[i] = len(choices[i].tokens) if shown else given[i]
                        if shown:
                            yield [chunk(i, {"content": shown}, fresh)]
                        if choices[i].reason:
                            rest = (
                                logprobs(choices[i], given[i]) if given[i] < len(choices[i].tokens) else None
                            )
                            yield [chunk(i, {}, rest, choices[i].reason)]
                note(request, choices)

            return _chunks(request, asked, head, bodies(), lambda: _usage(house, writing, choices))
        choices = await fill(request, writing, asked.stops())
        result = {
            "id": id,
            "object": "chat.completion",
            "created": at,
            "model": house.model,
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "finish_reason": choice.reason,
                    "logprobs": logprobs(choice),
                }
                for i, choice in enumerate(choices)
            ],
            "usage": _usage(house, writing, choices),
            "warnings": warnings or None,
        }
        note(request, choices)
        return JSONResponse(result)

    @routes.post(
        "/completions",
        responses=answers(schemas.Completion, stream=True),
        openapi_extra=body_of(schemas.CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Go on from a prompt, or from each of several, about the image in the extra field `image`."""
        asked = await house.json(request, schemas.CompletionRequest)
        check(asked)
        if asked.image is None:
            raise ApiError(
                400,
                "this model writes about an image, and none arrived: put one in the field image "
                '(with the openai client: extra_body={"image": "data:image/png;base64,..."})',
                param="image",
                code="image_required",
            )
        prompts = asked.prompts()
        house.check_count(
            "the number of prompts times n", len(prompts) * (asked.n or 1), house.limits.sequences
        )
        house.check_texts(*prompts)
        options = asked.options(new_tokens(asked.max_tokens, prompts))
        writing = await about(request, asked.image, prompts, options, asked.logprobs or 0)
        house.log_content(request, {"prompts": prompts})
        id, at = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        head = {"id": id, "object": "text_completion", "created": at, "model": house.model}
        decode = house.engine.predictor.generator.tokenizer.decode

        def logprobs(choice: Choice) -> dict[str, Any] | None:
            if asked.logprobs is None:
                return None
            ids = [i for i, _, _ in choice.tokens]
            befores = [None, *ids]
            tops = [
                {token_text(decode, i, before): logprob for i, logprob in tops}
                for before, (_, _, tops) in zip(befores, choice.tokens)
            ]
            return {
                "tokens": [token_text(decode, i, before) for i, before in zip(ids, befores)],
                "token_logprobs": [logprob for _, logprob, _ in choice.tokens],
                "top_logprobs": tops if asked.logprobs else None,
                "text_offset": [len(decode(ids[:i]).lstrip()) for i in range(len(ids))],
            }

        def shape(i: int, text: str, given: Any, reason: str | None) -> dict[str, Any]:
            return {"index": i, "text": text, "logprobs": given, "finish_reason": reason}

        if asked.stream:
            choices, steps = await run(request, writing, asked.stops())

            async def bodies() -> AsyncIterator[list[dict[str, Any]]]:
                async with aclosing(steps):  # type: ignore[type-var]
                    async for i, shown, _, _ in steps:
                        reason = choices[i].reason
                        if shown or reason:
                            yield [shape(i, shown, logprobs(choices[i]) if reason else None, reason)]
                note(request, choices)

            return _chunks(request, asked, head, bodies(), lambda: _usage(house, writing, choices))
        choices = await fill(request, writing, asked.stops())
        shapes = [shape(i, choice.text, logprobs(choice), choice.reason) for i, choice in enumerate(choices)]
        note(request, choices)
        return JSONResponse(head | {"choices": shapes, "usage": _usage(house, writing, choices)})

    def entry() -> dict[str, Any]:
        return {"id": house.model, "object": "model", "created": created, "owned_by": "blip2"}

    @routes.get("/models", responses=answers(schemas.ModelList))
    async def models() -> Response:
        """The model that this server has."""
        return JSONResponse({"object": "list", "data": [entry()]})

    @routes.get("/models/{model}", responses=answers(schemas.Model))
    async def model(model: str) -> Response:
        """The same, by name."""
        if model != house.model:
            raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
        return JSONResponse(entry())

    return routes


def _content(message: schemas.Message) -> tuple[str, list[str]]:
    """A message's text and its images' URLs."""
    if message.content is None or isinstance(message.content, str):
        return message.content or "", []
    texts = [part.text for part in message.content if isinstance(part, schemas.TextPart)]
    images = [part.image_url.url for part in message.content if isinstance(part, schemas.ImagePart)]
    return " ".join(texts), images


def _token(decode: Any, token: int, before: int | None, logprob: float) -> dict[str, Any]:
    text = token_text(decode, token, before)
    raw = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}


def _usage(house: House, writing: Writing, choices: list[Choice]) -> dict[str, int]:
    return usage(house, writing, sum(choice.count for choice in choices))


def _chunks(
    request: Request, asked: schemas.Sampling, head: dict[str, Any], bodies: AsyncIterator[Any], used: Any
) -> Response:
    """Choices as they come -> the events of a stream; with include_usage a last one that counts."""
    counted = asked.stream_options is not None and asked.stream_options.include_usage
    extra = {"usage": None} if counted else {}

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(bodies):  # type: ignore[type-var]
                async for choices in bodies:
                    yield json.dumps(head | {"choices": choices} | extra)
        except Exception as error:
            yield json.dumps(told(request, error).body())
            return
        if counted:
            yield json.dumps(head | {"choices": [], "usage": used()})
        yield "[DONE]"

    return EventStream(events())
