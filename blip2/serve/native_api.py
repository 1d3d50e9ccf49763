"""/caption, /ask, /match, /embed, /explain: what the model can do, by the names it has in Python."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from torch import Tensor

from blip2.generation.options import make_options
from blip2.inputs import in_batches
from blip2.predict import Predictor
from blip2.results import Match, StreamDetokenizer, token_text
from blip2.serve import schemas
from blip2.serve.batching_engine import GenerateRequest, TextOutput
from blip2.serve.bodies import read_form_or_json
from blip2.serve.context import ServerContext, context_of
from blip2.serve.errors import ApiError
from blip2.serve.openapi import documented
from blip2.serve.streaming import GrowingText, event_stream, finite_logprob, json_response
from blip2.text import CAPTION_PROMPT

SLICE = 4  # texts matched or embedded between two decoding steps of other requests

routes = APIRouter(tags=["native"])


@routes.post("/caption", **documented(schemas.Captions, schemas.CaptionRequest, files="image", stream=True))
async def post_caption(request: Request) -> Response:
    """Say what is in an image."""
    body, (image,) = await read_form_or_json(request, schemas.CaptionRequest)
    return await _generate(request, body, image, body.prompt, "captions")


@routes.post("/ask", **documented(schemas.Answers, schemas.AskRequest, files="image", stream=True))
async def post_ask(request: Request) -> Response:
    """Answer a question about an image."""
    body, (image,) = await read_form_or_json(request, schemas.AskRequest)
    prompt = context_of(request).engine.predictor.question_prompt(body.question)
    return await _generate(request, body, image, prompt, "answers")


async def _generate(
    request: Request, body: schemas.TextRequest, image: bytes, prompt: str, key: str
) -> Response:
    """The texts that continue a prompt, under `key` of the answer; as a stream, events {"delta": piece} come first."""
    context = context_of(request)
    options, limits = body.options(), context.limits
    context.check_count("max_new_tokens", options.max_new_tokens, limits.new_tokens)
    context.check_count("num_return_sequences", options.num_return_sequences, limits.sequences)
    context.check_count("num_beams", body.num_beams or 1, limits.num_beams)
    context.check_texts(prompt)
    work = GenerateRequest(await context.prepare_image(request, image), (prompt,), options)
    context.log_content(request, {"prompt": prompt})

    def result(outputs: list[TextOutput]) -> dict[str, Any]:
        context.log_content(request, {key: [output.text for output in outputs]})
        texts: list[dict[str, Any]] = []
        for output in outputs:
            tokens = [
                {"text": token_text(context.decode, token.id, token.before), "logprob": token.logprob}
                for token in GrowingText.from_output(output, context.decode).tokens
            ]
            logprob = sum(map(finite_logprob, output.text.token_logprobs))
            scores = {"score": output.text.score, "logprob": logprob}
            texts.append({"text": str(output.text), **scores, "tokens": tokens})
        captions = [output.text.token_logprobs for output in outputs]
        probabilities, warnings = context.judge(captions) if key == "captions" else ([], [])
        for text, probability in zip(texts, probabilities):
            text["probability_right"] = probability
        count = sum(len(output.text.tokens) for output in outputs)
        answer = {"model": context.model_name, key: texts, "usage": usage(context, work, count)}
        return answer | ({"warnings": warnings} if warnings else {})

    if not body.stream:
        return json_response(result(await context.result(request, work)))
    job, pieces = context.follow(request, work, [GrowingText(StreamDetokenizer(context.decode))])

    async def bodies() -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(pieces):
            async for _, piece in pieces:
                if piece:
                    yield {"delta": piece}
        yield result(job.result.result())

    return event_stream(request, bodies())


def usage(context: ServerContext, work: GenerateRequest, completion_tokens: int) -> dict[str, int]:
    """Token counts; the image counts, with each prompt, as the queries that the language model reads of it."""
    predictor = context.engine.predictor
    encode, queries = predictor.generator.tokenizer.encode, predictor.model.config.num_query_tokens
    read = sum(queries + len(encode(prompt)) for prompt in work.prompts)
    total = read + completion_tokens
    return {"prompt_tokens": read, "completion_tokens": completion_tokens, "total_tokens": total}


@routes.post("/match", **documented(schemas.Matches, schemas.MatchRequest, files="image"))
async def post_match(request: Request) -> Response:
    """Say how well texts fit an image."""
    context = context_of(request)
    body, (image,) = await read_form_or_json(request, schemas.MatchRequest)
    context.check_count("texts", len(body.texts), context.limits.texts)
    context.check_texts(*body.texts)
    pixels = await _matcher_pixels(request, image)

    def compute(model: Predictor) -> Generator[None, None, list[Match]]:
        folded = model.matcher.image_processor.fold(pixels)
        features, fits = model.matcher.encode_images(folded), list[Match]()
        for _, texts in in_batches(body.texts, SLICE):
            yield
            fits += model.matcher.compare(features, texts)[0]
        return fits

    fits = await context.result(request, compute)
    matches = [{"text": text, **asdict(fit)} for text, fit in zip(body.texts, fits, strict=True)]
    return json_response({"model": context.model_name, "matches": matches})


@routes.post("/embed", **documented(schemas.Embeddings, schemas.EmbedRequest, files="images"))
async def post_embed(request: Request) -> Response:
    """Turn images and texts into vectors for search."""
    context = context_of(request)
    body, images = await read_form_or_json(request, schemas.EmbedRequest, "images")
    context.check_count("images", len(images), context.limits.images)
    context.check_count("texts", len(body.texts), context.limits.texts)
    context.check_texts(*body.texts)
    if not images and not body.texts:
        raise ApiError(400, "nothing to embed: give images, or texts")
    pixels = [await _matcher_pixels(request, image) for image in images]

    def compute(model: Predictor) -> Generator[None, None, tuple[list[Any], list[Any]]]:
        image_vectors: list[Any] = []
        text_vectors: list[Any] = []
        for image in pixels:
            folded = model.matcher.image_processor.fold(image)
            image_vectors += model.matcher.encode_images(folded).queries.tolist()
            yield
        for _, texts in in_batches(body.texts, SLICE):
            text_vectors += model.embed_text(list(texts)).tolist()
            yield
        return image_vectors, text_vectors

    image_vectors, text_vectors = await context.result(request, compute)
    return json_response({"model": context.model_name, "images": image_vectors, "texts": text_vectors})


async def _matcher_pixels(request: Request, image: bytes) -> Tensor:
    """A file's image for the matcher, before any stem: float32 [1, 3, S, S]."""
    engine = context_of(request).engine
    processor = engine.predictor.matcher.image_processor
    pixels, _ = await context_of(request).in_thread(
        request, lambda pending: engine.load_pixels(image, processor, pending)
    )
    return pixels


@routes.post("/explain", **documented(schemas.ExplanationSchema, schemas.ExplainRequest, files="image"))
async def post_explain(request: Request) -> Response:
    """Show where in an image each word of a caption or an answer comes from."""
    context = context_of(request)
    body, (content,) = await read_form_or_json(request, schemas.ExplainRequest)
    turns = _checked_turns(context, body)
    prompt, text, options = CAPTION_PROMPT, body.text, make_options("caption")
    if body.question is not None:
        prompt = context.engine.predictor.asking_prompt(body.question, turns, body.answer)
        text, options = body.answer, make_options("answer")
    image = await context.prepare_image(request, content, pixels=True)
    if text is None:  # the model's own, as in Python
        (output,) = await context.result(request, GenerateRequest(image, (prompt,), options))
        text = output.text
    pixels = image.pixels
    assert pixels is not None

    def compute(model: Predictor) -> Generator[None, None, dict[str, Any]]:
        folded = model.generator.image_processor.fold(pixels)
        explanation = yield from model.explain_in_slices(folded, prompt, text)
        words = [vars(word) | {"heat": word.heat.tolist()} for word in explanation.words]
        return {
            "model": context.model_name,
            "text": explanation.text,
            "words": words,
            "width": image.size[0],
            "height": image.size[1],
            "attention_shape": list(explanation.attention.shape[:3]),
            "attention": _attention_map(body, explanation.attention),
        }

    return json_response(await context.result(request, compute))


def _checked_turns(context: ServerContext, body: schemas.ExplainRequest) -> list[tuple[str, str]] | None:
    """The turns before the question, where the request as a whole makes sense."""
    turns = None if body.turns is None else [(turn.question, turn.answer) for turn in body.turns]
    texts = [text for turn in turns or () for text in turn]
    context.check_texts(body.text or "", body.question or "", body.answer or "", *texts)
    context.check_count("turns", len(turns or ()), context.limits.turns)
    missing = [number is None for number in (body.layer, body.head, body.query)]
    if any(missing) and not all(missing):
        raise ApiError(400, "layer, head and query belong together: give all three, or none")
    if body.question is None and (body.answer is not None or turns is not None):
        raise ApiError(400, "answer and turns need a question")
    if body.question is not None and body.text is not None:
        raise ApiError(400, "text is a caption; give the answer to a question as answer")
    return turns


def _attention_map(body: schemas.ExplainRequest, attention: NDArray[np.float32]) -> Any:
    """The raw attention of the layer, head and query that a request names: rows of the grid; None where it has none."""
    if body.layer is None or body.head is None or body.query is None:
        return None
    layers, heads, queries = attention.shape[:3]
    if body.layer >= layers or body.head >= heads or body.query >= queries:
        raise ValueError(f"there are {layers} layers, {heads} heads and {queries} queries, from 0")
    return attention[body.layer, body.head, body.query].tolist()
