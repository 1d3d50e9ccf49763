"""One request never fails another: whatever breaks in work that several share ends the guilty one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import blip2
from blip2.generation import batching
from blip2.generation.options import GenerationOptions
from blip2.modeling.kv_cache import PromptCache
from blip2.serve.batching_engine import Engine, EngineError, GenerateRequest
from blip2.serve.limits import Limits

LONG = "a photo of " + "many things and " * 12  # of more tokens than any other's prompt and text together
MANY = 38
PHOTO = "a photo of"
HONEST: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"num_beams": 3},
    {"num_beams": 5, "num_return_sequences": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    {"min_new_tokens": 12, "max_new_tokens": 12},
]


class Panic(BaseException):
    """As the panics of libraries in Rust, which are no `Exception`."""


@pytest.fixture
def engine(predictor: blip2.Predictor) -> Iterator[Engine]:
    made = Engine(lambda: predictor, Limits(queue=100, rows=60))
    made.start()
    assert made.loaded.wait(60)
    yield made
    made.close()


def is_guilty(cache: PromptCache) -> Tensor:
    """Which rows have the long prompt."""
    return cache.mask.sum(1) > MANY


def raising_for_long(original: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
    def decode_step(ids: Tensor, prompt_cache: PromptCache, kv_cache: Any) -> Any:
        logits = original(ids, prompt_cache, kv_cache)  # so that the cache has grown already
        if is_guilty(prompt_cache).any():
            raise error("guilty")
        return logits

    return decode_step


def infinite_for_long(original: Callable[..., Any], value: float) -> Callable[..., Any]:
    def decode_step(ids: Tensor, prompt_cache: PromptCache, kv_cache: Any) -> Any:
        return original(ids, prompt_cache, kv_cache).masked_fill(is_guilty(prompt_cache)[:, None], value)

    return decode_step


def prefill_refusing_long(original: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
    def prefill(prefix: Tensor, ids: Tensor, mask: Tensor, **more: Any) -> Any:
        if (mask.sum(1) > MANY).any():
            raise error("guilty")
        return original(prefix, ids, mask, **more)

    return prefill


def choosing_refusing_long(original: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
    def choose_next(logits: Tensor, history: Tensor, *more: Any) -> Any:
        if ((history >= 0).sum(1) > MANY).any():
            raise error("guilty")
        return original(logits, history, *more)

    return choose_next


ERRORS = (RuntimeError, Panic, MemoryError, IndexError)
BREAKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{f"decoding, {e.__name__}": ("decode_step", lambda f, e=e: raising_for_long(f, e)) for e in ERRORS},
    **{f"logits {v}": ("decode_step", lambda f, v=v: infinite_for_long(f, v)) for v in (torch.nan, torch.inf)},
    **{f"prefill, {e.__name__}": ("prefill", lambda f, e=e: prefill_refusing_long(f, e)) for e in ERRORS},
    **{f"choosing, {e.__name__}": ("choose", lambda f, e=e: choosing_refusing_long(f, e)) for e in ERRORS},
}  # fmt: skip


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("guilty", [{"repetition_penalty": 1.5}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_what_breaks_in_a_shared_step_ends_the_guilty_alone(
    engine: Engine,
    predictor: blip2.Predictor,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    guilty: dict[str, Any],
) -> None:
    place, broken = BREAKS[how]
    if place == "choose" and "num_beams" in guilty:
        pytest.skip("a search chooses by itself")
    owner, name = {
        "decode_step": (predictor.model.language, "decode_step"),
        "prefill": (predictor.model, "prefill"),
        "choose": (batching, "choose_next"),
    }[place]
    expected = [texts(predictor.caption(images[0], **({"num_beams": 1} | way))) for way in HONEST]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))

    def request(prompt: str, **options: Any) -> GenerateRequest:
        return GenerateRequest(engine.prepare_image(images[0]), (prompt,), GenerationOptions(**options))

    for _ in range(2):  # the second time with the image's context from the cache
        jobs = [engine.submit(request(PHOTO, **way), client=str(i)) for i, way in enumerate(HONEST)]
        bad = engine.submit(request(LONG, **guilty, min_new_tokens=5), client="bad")
        for job, wanted in zip(jobs, expected, strict=True):
            assert [output.text for output in job.result.result(60)] == wanted
        with pytest.raises(EngineError) as failure:
            bad.result.result(60)
        assert "guilty" not in str(failure.value)
    assert engine.failure is None and engine.running == 0


def texts(captions: str | list[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else [*captions]


@pytest.mark.parametrize("error", [RuntimeError, Panic, KeyError])
@pytest.mark.parametrize("place", ["callback", "text", "image", "call", "slice"])
def test_what_breaks_beside_the_steps_ends_its_request_alone(
    engine: Engine,
    predictor: blip2.Predictor,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    place: str,
) -> None:
    def broken(*_: object) -> Any:
        raise error("guilty")

    def slices(_: blip2.Predictor) -> Iterator[None]:
        yield
        raise error("guilty")

    expected = predictor.caption(images[0], num_beams=1)
    request = GenerateRequest(engine.prepare_image(images[0]), (PHOTO,), GenerationOptions())
    work: Any = GenerateRequest(
        engine.prepare_image(images[1]), (PHOTO,), GenerationOptions(max_new_tokens=9, min_new_tokens=9)
    )
    if place == "text":
        decode = predictor.generator.tokenizer.decode
        monkeypatch.setattr(
            predictor.generator.tokenizer,
            "decode",
            lambda ids, **more: broken() if len(ids) in (8, 9) else decode(ids, **more),
        )
    elif place == "image":
        embed, pixels = predictor.model.embed_image, work.image.pixels
        monkeypatch.setattr(
            predictor.model,
            "embed_image",
            lambda batch: broken() if any(row.equal(pixels[0]) for row in batch) else embed(batch),
        )
    elif place in ("call", "slice"):
        work = {"call": broken, "slice": slices}[place]
    others = [engine.submit(request, client="a")]
    bad = engine.submit(work, client="b", on_step=broken if place == "callback" else None)
    others += [engine.submit(request, client="c") for _ in range(3)]
    assert [job.result.result(60)[0].text for job in others] == [expected] * 4
    with pytest.raises(EngineError):
        bad.result.result(60)
    assert engine.failure is None and engine.running == 0


EXTREMES: list[dict[str, Any]] = [
    {"length_penalty": 50.0, "num_beams": 3},
    {"length_penalty": -50.0, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 60},
    {"length_penalty": 50.0},
    {"length_penalty": -50.0, "min_new_tokens": 200, "max_new_tokens": 200},
    {"length_penalty": -50.0, "num_beams": 2, "min_new_tokens": 120, "max_new_tokens": 120, "early_stopping": "never"},
    {"length_penalty": 50.0, "num_beams": 4, "early_stopping": "never", "max_new_tokens": 100},
    {"repetition_penalty": 1e308},
    {"repetition_penalty": 1e-308},
    {"repetition_penalty": 1e-308, "num_beams": 3},
    {"repetition_penalty": 5e-324, "do_sample": True},
    {"temperature": 1e308, "seed": 2**63 - 1},
    {"temperature": 5e-324, "top_k": 2**62},
    {"top_p": 5e-324, "temperature": 1e308, "num_return_sequences": 8},
    {"no_repeat_ngram_size": 2**62},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 200, "max_new_tokens": 200, "num_beams": 10},
    {"eos_token_id": (), "max_new_tokens": 200, "num_beams": 10},
    {"eos_token_id": 2**62, "min_new_tokens": 3},
    {"eos_token_id": tuple(range(64)), "num_beams": 10, "min_new_tokens": 5},
]  # fmt: skip


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_no_numbers_that_are_let_in_stop_the_engine(
    engine: Engine, predictor: blip2.Predictor, images: list[bytes], options: dict[str, Any]
) -> None:
    """Their request has an answer, of finite numbers, or an error; the others' are what they were."""
    request = GenerateRequest(
        engine.prepare_image(images[0]), (PHOTO,), GenerationOptions(**({"do_sample": None} | options))
    )
    job = engine.submit(request, client="extreme")
    honest = engine.submit(
        GenerateRequest(engine.prepare_image(images[0]), (PHOTO,), GenerationOptions()), client="honest"
    )
    assert honest.result.result(60)[0].text == predictor.caption(images[0], num_beams=1)
    for output in job.result.result(60):
        assert len(output.text.tokens) >= options.get("min_new_tokens", 1)
        numbers = torch.tensor([output.text.score, *output.text.token_logprobs], dtype=torch.float64)
        assert numbers.isfinite().all()
