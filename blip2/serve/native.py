"""/caption, /ask, /match, /embed, /explain: what the model can do, by the names it has in Python."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from torch import Tensor

from blip2.generation.options import GenerationOptions
from blip2.inputs import in_batches
from blip2.predict import Predictor
from blip2.results import GeneratedText, Match, StreamDetokenizer, token_text
from blip2.serve import schemas
from blip2.serve.context import ApiError, House, told
from blip2.serve.engine import Picture, Text, Writing
from blip2.serve.events import EventStream
from blip2.text import CAPTION_PROMPT

SLICE = 4  # texts matched or embedded between two steps of those that are being written


def body_of(model: type[BaseModel], *files: str) -> dict[str, Any]:
    """The OpenAPI entry of a body that arrives as JSON or as a form whose fields `files` are files."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    }
    if files:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        properties = dict(schema["properties"])
        properties.pop("turns", None)  # a form has no place for them
        for name in files:
            file = {"type": "string", "format": "binary"}
            properties[name] = {"type": "array", "items": file} if properties[name].get("items") else file
        form = {key: schema[key] for key in ("type", "required", "additionalProperties") if key in schema}
        content["multipart/form-data"] = {"schema": form | {"properties": properties}}
    return {"requestBody": {"required": True, "content": content}}


def answers(model: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of what comes back: a result, or any of the errors."""
    good: dict[str, Any] = {"model": model, "description": "the result"}
    if stream:
        event = {"data": {"type": "string"}}
        good["content"] = {
            "text/event-stream": {"schema": {"type": "object", "properties": event, "required": ["data"]}}
        }
    texts = {
        400: "what was asked for cannot be done; the message says why",
        401: "no valid API key",
        403: "a page of another site asked, or another host name",
        404: "no such model or page",
        408: "the body was too slow",
        413: "the body is too large",
        415: "neither JSON nor a form",
        500: "the model failed",
        501: "this server cannot do that",
        503: "too many requests; Retry-After says when to come again",
        504: "out of time",
    }
    found: dict[int | str, dict[str, Any]] = {200: good}
    return found | {status: {"model": schemas.Error, "description": about} for status, about in texts.items()}


def router(house: House) -> APIRouter:
    routes = APIRouter(tags=["native"])
    limits = house.limits

    def check(asked: schemas.Decoding) -> None:
        house.check_count("max_new_tokens", asked.max_new_tokens, limits.new_tokens)
        house.check_count("num_return_sequences", asked.num_return_sequences, limits.sequences)
        house.check_count("num_beams", asked.num_beams or 1, limits.num_beams)

    async def write(
        request: Request, asked: schemas.Decoding, image: bytes, prompt: str, kind: str
    ) -> Response:
        check(asked)
        house.check_texts(prompt)
        options = asked.options()
        writing = Writing(await house.picture(image), (prompt,), options)
        house.log_content(request, {"prompt": prompt})
        if asked.stream:
            return await _stream(house, request, writing, kind)
        texts = await house.result(request, writing)
        result = _result(house, writing, texts, kind)
        house.log_content(request, {kind: [text.written for text in texts]})
        return JSONResponse(result)

    async def prepared(image: bytes) -> Tensor:
        """A file's image, ready for the matcher."""
        matcher = house.engine.predictor.matcher
        return await house.in_thread(lambda: matcher.prepare([house.open(image)]))

    async def own(request: Request, picture: Picture, prompt: str, length_penalty: float) -> GeneratedText:
        """What the model says by itself, as in Python."""
        options = GenerationOptions(num_beams=5, length_penalty=length_penalty)
        (text,) = await house.result(request, Writing(picture, (prompt,), options))
        written: GeneratedText = text.written
        return written

    @routes.post(
        "/caption",
        responses=answers(schemas.Captions, stream=True),
        openapi_extra=body_of(schemas.CaptionRequest, "image"),
    )
    async def caption(request: Request) -> Response:
        """Say what is in an image."""
        asked, (image,) = await house.form_or_json(request, schemas.CaptionRequest)
        return await write(request, asked, image, asked.prompt, "captions")

    @routes.post(
        "/ask",
        responses=answers(schemas.Answers, stream=True),
        openapi_extra=body_of(schemas.AskRequest, "image"),
    )
    async def ask(request: Request) -> Response:
        """Answer a question about an image."""
        asked, (image,) = await house.form_or_json(request, schemas.AskRequest)
        prompt = house.engine.predictor.question_prompt(asked.question)
        return await write(request, asked, image, prompt, "answers")

    @routes.post(
        "/match", responses=answers(schemas.Matches), openapi_extra=body_of(schemas.MatchRequest, "image")
    )
    async def match(request: Request) -> Response:
        """Say how well texts fit an image."""
        asked, (image,) = await house.form_or_json(request, schemas.MatchRequest)
        house.check_count("texts", len(asked.texts), limits.texts)
        house.check_texts(*asked.texts)

        pixels = await prepared(image)

        def compute(model: Predictor) -> Generator[None, None, list[Match]]:
            seen, found = model.matcher.encode_images(pixels), list[Match]()
            for _, some in in_batches(asked.texts, SLICE):
                yield
                found += model.matcher.compare(seen, some)[0]
            return found

        found = await house.result(request, compute)
        matches = [
            {"text": text, "probability": fit.probability, "similarity": fit.similarity}
            for text, fit in zip(asked.texts, found, strict=True)
        ]
        return JSONResponse({"model": house.model, "matches": matches})

    @routes.post(
        "/embed", responses=answers(schemas.Embeddings), openapi_extra=body_of(schemas.EmbedRequest, "images")
    )
    async def embed(request: Request) -> Response:
        """Turn images and texts into vectors for search."""
        asked, images = await house.form_or_json(request, schemas.EmbedRequest, "images")
        house.check_count("images", len(images), limits.images)
        house.check_count("texts", len(asked.texts), limits.texts)
        house.check_texts(*asked.texts)
        if not images and not asked.texts:
            raise ApiError(400, "nothing to embed: give images, or texts")

        pixels = [await prepared(image) for image in images]

        def compute(model: Predictor) -> Generator[None, None, tuple[list[Any], list[Any]]]:
            vectors: list[Any] = []
            words: list[Any] = []
            for each in pixels:
                vectors += model.matcher.encode_images(each).queries.tolist()
                yield
            for _, some in in_batches(asked.texts, SLICE):
                words += model.embed_text(list(some)).tolist()
                yield
            return vectors, words

        vectors, words = await house.result(request, compute)
        return JSONResponse({"model": house.model, "images": vectors, "texts": words})

    @routes.post(
        "/explain",
        responses=answers(schemas.Explained),
        openapi_extra=body_of(schemas.ExplainRequest, "image"),
    )
    async def explain(request: Request) -> Response:
        """Show where in an image each word of a caption or an answer comes from."""
        asked, (image,) = await house.form_or_json(request, schemas.ExplainRequest)
        turns = None if asked.turns is None else [(turn.question, turn.answer) for turn in asked.turns]
        said = [part for turn in turns or () for part in turn]
        house.check_texts(asked.text or "", asked.question or "", asked.answer or "", *said)
        house.check_count("turns", len(said) // 2, limits.turns)
        place = (asked.layer, asked.head, asked.query)
        if any(each is not None for each in place) and None in place:
            raise ApiError(400, "layer, head and query belong together: give all three, or none")
        if asked.question is None and (asked.answer is not None or turns is not None):
            raise ApiError(400, "answer and turns need a question")
        if asked.question is not None and asked.text is not None:
            raise ApiError(400, "text is a caption; give the answer to a question as answer")
        prompt, given, penalty = CAPTION_PROMPT, asked.text, 1.0
        if asked.question is not None:
            prompt = house.engine.predictor.asking_prompt(asked.question, turns, asked.answer)
            given, penalty = asked.answer, -1.0
        picture = await house.picture(image, pixels=True)
        pixels = picture.pixels
        assert pixels is not None
        text = await own(request, picture, prompt, penalty) if given is None else given

        def compute(model: Predictor) -> Generator[None, None, dict[str, Any]]:
            found = yield from model.explain_in_slices(pixels, prompt, text)
            attention = None
            if asked.layer is not None:
                if any(i is not None and i >= n for i, n in zip(place, found.attention.shape)):
                    layers, heads, queries = found.attention.shape[:3]
                    raise ValueError(
                        f"there are {layers} layers, {heads} heads and {queries} queries, from 0"
                    )
                attention = found.attention[place].tolist()
            return {
                "model": house.model,
                "text": found.text,
                "words": [
                    {"text": word.text, "logprob": word.logprob, "heat": word.heat.tolist()}
                    for word in found.words
                ],
                "width": picture.size[0],
                "height": picture.size[1],
                "attention_shape": list(found.attention.shape[:3]),
                "attention": attention,
            }

        return JSONResponse(await house.result(request, compute))

    return routes


def usage(house: House, writing: Writing, completion_tokens: int) -> dict[str, int]:
    """Token counts; the image counts, with each prompt, as the queries that the language model reads of it."""
    predictor = house.engine.predictor
    encode, queries = predictor.generator.tokenizer.encode, predictor.model.config.num_query_tokens
    read = sum(queries + len(encode(prompt)) for prompt in writing.prompts)
    return {
        "prompt_tokens": read,
        "completion_tokens": completion_tokens,
        "total_tokens": read + completion_tokens,
    }


def _result(house: House, writing: Writing, texts: list[Text], kind: str) -> dict[str, Any]:
    decode = house.engine.predictor.generator.tokenizer.decode
    shown = []
    for text in texts:
        noted = list(zip(text.written.tokens, (None, *text.written.tokens), text.written.token_logprobs))
        tokens = [
            {"text": token_text(decode, i, before), "logprob": logprob}
            for i, before, logprob in (noted[:-1] if text.finished else noted)
        ]
        shown.append({"text": str(text.written), "score": text.written.score, "tokens": tokens})
    written = sum(len(text.written.tokens) for text in texts)
    return {"model": house.model, kind: shown, "usage": usage(house, writing, written)}


async def _stream(house: House, request: Request, writing: Writing, kind: str) -> Response:
    """Events {"delta": piece}, then the result as without stream, then [DONE]."""
    pieces = StreamDetokenizer(house.engine.predictor.generator.tokenizer.decode)
    steps = await house.steps(request, writing)

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(steps):  # type: ignore[type-var]
                async for _, row, place in steps:
                    ended = row.done and place == len(row.ids) - 1
                    piece = "" if ended and row.finished else pieces.add(row.ids[place])
                    if ended:
                        piece += pieces.end()
                    if piece:
                        yield json.dumps({"delta": piece})
                    if ended:
                        text = house.engine.text_of(row)
                        house.log_content(request, {kind: [text.written]})
                        yield json.dumps(_result(house, writing, [text], kind))
        except Exception as error:
            yield json.dumps(told(request, error).body())
            return
        yield "[DONE]"

    return EventStream(events())
