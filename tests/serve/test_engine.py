"""The engine without HTTP: the same answers as the Python API, bounded, fair, and never a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

import blip2
from blip2.generation.options import GenerationOptions
from blip2.serve import batching_engine
from blip2.serve.batching_engine import (
    BusyError,
    Engine,
    EngineError,
    GenerateRequest,
    Job,
    ModelCall,
    TooLateError,
)
from blip2.serve.cache import ImageCache, size_of
from blip2.serve.limits import Limits

WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 5},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "temperature": 0.8},
    {"repetition_penalty": 1.5, "max_new_tokens": 12, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 9, "top_p": 0.9, "min_new_tokens": 9, "max_new_tokens": 40},
]


def started(predictor: blip2.Predictor, limits: Limits) -> Engine:
    engine = Engine(lambda: predictor, limits)
    engine.start()
    assert engine.loaded.wait(60)
    return engine


@pytest.fixture
def engine(predictor: blip2.Predictor) -> Iterator[Engine]:
    made = started(predictor, Limits(queue=100))
    yield made
    made.close()


def greedy(engine: Engine, image: bytes, **options: Any) -> GenerateRequest:
    return GenerateRequest(engine.prepare_image(image), ("a photo of",), GenerationOptions(**options))


def test_whatever_else_is_in_the_batch_the_answers_are_those_of_the_python_api(
    engine: Engine, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    cases, jobs = [], []
    for i in range(60):
        image, way = images[i % len(images)], WAYS[i % len(WAYS)]
        prompt = ["a photo of", "", predictor.question_prompt("what is it?")][i % 3]
        cases.append((image, way, prompt))
        jobs.append(
            engine.submit(
                GenerateRequest(engine.prepare_image(image), (prompt,), GenerationOptions(**way)),
                client=str(i % 4),
            )
        )
    for (image, way, prompt), job in zip(cases, jobs, strict=True):
        expected = predictor.caption(image, prompt=prompt, **({"num_beams": 1} | way))
        for text, wanted in zip(
            job.result.result(60), expected if isinstance(expected, list) else [expected], strict=True
        ):
            assert (text.text, text.text.tokens) == (wanted, wanted.tokens)
            assert text.text.score == pytest.approx(wanted.score, abs=1e-4)
            assert text.text.token_logprobs == pytest.approx(wanted.token_logprobs, abs=1e-3)
    assert engine.running == engine.waiting == 0


def test_a_second_question_about_an_image_skips_the_encoder(engine: Engine, images: list[bytes]) -> None:
    calls = []
    vision = engine.predictor.model.vision
    handle = vision.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            engine.submit(greedy(engine, images[0])).result.result(60)
    finally:
        handle.remove()
    assert len(calls) == 1 and engine.cache.hits == 2 and engine.cache.misses == 1


def test_the_cache_is_bounded_and_forgets_the_least_used(
    predictor: blip2.Predictor, images: list[bytes]
) -> None:
    encoded = predictor.encode(images[:3])
    size = size_of(encoded[0])
    cache = ImageCache(2 * size)
    cache.put(b"a", encoded[0])
    cache.put(b"b", encoded[1])
    assert cache.get(b"a") is encoded[0]
    cache.put(b"c", encoded[2])
    assert cache.get(b"b") is None and cache.get(b"a") is encoded[0] and cache.bytes == 2 * size
    nothing = ImageCache(0)
    nothing.put(b"a", encoded[0])
    assert nothing.peek(b"a") is None and nothing.bytes == 0


def call(compute: Callable[[], Any]) -> ModelCall:
    """A call on the model of one slice."""

    def slices(_: blip2.Predictor) -> Generator[None, None, Any]:
        yield
        return compute()

    return slices


class Gate:
    """A call on the model that holds the engine up until it is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, _: blip2.Predictor) -> Generator[None, None, str]:
        self.entered.set()
        assert self.open.wait(60)
        yield
        return "through"


def held_up(predictor: blip2.Predictor, queue: int) -> tuple[Engine, Gate, Job]:
    """An engine at work on a call that goes on when the gate is opened."""
    engine = started(predictor, Limits(queue=queue))
    gate = Gate()
    first = engine.submit(gate)
    assert gate.entered.wait(60)
    return engine, gate, first


def test_beyond_the_queue_there_is_no_room(predictor: blip2.Predictor) -> None:
    engine, gate, first = held_up(predictor, queue=3)
    waiting = [engine.submit(call(lambda: "done")) for _ in range(3)]
    for _ in range(20):
        with pytest.raises(BusyError, match="too many"):
            engine.submit(call(lambda: "done"))
    gate.open.set()
    assert first.result.result(60) == "through"
    assert [job.result.result(60) for job in waiting] == ["done"] * 3
    engine.close()
    with pytest.raises(BusyError):
        engine.submit(call(lambda: "done"))


def test_a_slot_is_kept_for_a_request_that_is_still_read(
    predictor: blip2.Predictor, images: list[bytes]
) -> None:
    engine, gate, first = held_up(predictor, queue=2)
    slots = [engine.acquire_slot(), engine.acquire_slot()]
    for ask in (engine.acquire_slot, lambda: engine.submit(call(lambda: "done"))):
        with pytest.raises(BusyError, match="too many"):
            ask()
    slots[0].release()
    slots[0].release()
    second = engine.submit(call(lambda: "done"))
    with pytest.raises(BusyError):
        engine.acquire_slot()
    twice = [engine.submit(call(lambda: "done"), slot=slots[1]) for _ in range(2)]  # two jobs of one request
    gate.open.set()
    assert [job.result.result(60) for job in (first, second, *twice)] == ["through", "done", "done", "done"]
    engine.acquire_slot().release()
    engine.close()
    with pytest.raises(BusyError):
        engine.submit(call(lambda: "done"), slot=slots[1])


def test_a_cancelled_request_leaves_the_queue_at_once(predictor: blip2.Predictor) -> None:
    engine, gate, first = held_up(predictor, queue=2)
    slot = engine.acquire_slot()
    waiting = [engine.submit(call(lambda: "done"), slot=slot), engine.submit(call(lambda: "done"))]
    with pytest.raises(BusyError):
        engine.acquire_slot()
    slot.release()  # its job leaves the queue too
    assert waiting[0].result.cancelled() and engine.waiting == 1
    engine.acquire_slot().release()
    assert waiting[1].result.cancel() and engine.waiting == 0
    waiting = [engine.submit(call(lambda: "done")) for _ in range(2)]  # the model is still held up
    with pytest.raises(BusyError):
        engine.acquire_slot()
    gate.open.set()
    assert [job.result.result(60) for job in (first, *waiting)] == ["through", "done", "done"]
    assert engine.waiting == 0
    engine.close()


def test_a_late_request_fails_before_the_others_have_had_their_turn(engine: Engine) -> None:
    through = threading.Event()

    def slices(_: blip2.Predictor) -> Generator[None, None, str]:
        while not through.is_set():
            time.sleep(0.001)
            yield
        return "through"

    first, second = engine.submit(slices), engine.submit(call(lambda: "done"))
    late = engine.submit(call(lambda: "done"), deadline=time.monotonic() + 0.01)
    with pytest.raises(TooLateError):
        late.result.result(60)
    assert engine.waiting == 1 and not second.result.done()
    through.set()
    assert (first.result.result(60), second.result.result(60)) == ("through", "done")


def test_several_prompts_about_one_image(
    engine: Engine, images: list[bytes], predictor: blip2.Predictor
) -> None:
    prompts = ("a photo of", "", "a photo of a red")
    options: dict[str, Any] = {"do_sample": True, "seed": 5, "num_return_sequences": 2, "max_new_tokens": 8}
    for way in ({"max_new_tokens": 8}, options, {"num_beams": 3, "num_return_sequences": 2}):
        for _ in range(2):  # the second time from the cache
            request = GenerateRequest(engine.prepare_image(images[0]), prompts, GenerationOptions(**way))
            made = [text.text for text in engine.submit(request).result.result(60)]
            expected = []
            for prompt in prompts:
                texts = predictor.caption(images[0], prompt=prompt, **({"num_beams": 1} | way))
                expected += texts if isinstance(texts, list) else [texts]
            assert made == expected
    assert engine.cache.misses == 1


def test_other_calls_are_computed_in_slices_between_steps(engine: Engine, images: list[bytes]) -> None:
    steps, began = list[int](), threading.Event()

    def slices(_: blip2.Predictor) -> Generator[None, None, str]:
        for _ in range(10):
            steps.append(engine.steps)
            yield
        return "done"

    text = engine.submit(
        greedy(engine, images[0], max_new_tokens=60, min_new_tokens=60), on_step=lambda _: began.set()
    )
    assert began.wait(60)
    calls = [engine.submit(slices) for _ in range(2)]
    assert [job.result.result(60) for job in calls] == ["done"] * 2
    assert not text.result.done()
    assert len(steps) == 20 and all(after > before for before, after in pairwise(steps))
    text.result.result(60)


def test_beam_searches_join_between_steps(
    engine: Engine, images: list[bytes], predictor: blip2.Predictor
) -> None:
    """While a long search goes on, short ones of every kind come and go."""
    long = engine.submit(greedy(engine, images[0], num_beams=3, max_new_tokens=200, min_new_tokens=200))
    while engine.running < 3:
        time.sleep(0.001)
    for num_beams in (5, 2, 5, 1, 4):
        (short,) = engine.submit(
            greedy(engine, images[1], num_beams=num_beams, max_new_tokens=8)
        ).result.result(60)
        assert short.text == predictor.caption(images[1], num_beams=num_beams, max_new_tokens=8)
    assert not long.result.done()
    long.result.cancel()


def test_a_wide_search_is_not_passed_over(predictor: blip2.Predictor, images: list[bytes]) -> None:
    engine = started(predictor, Limits(rows=4))
    order: list[str] = []
    long = engine.submit(greedy(engine, images[0], max_new_tokens=40, min_new_tokens=40))
    while engine.running == 0:
        time.sleep(0.001)
    jobs = {"wide": engine.submit(greedy(engine, images[1], num_beams=5, max_new_tokens=3), client="a")}
    jobs |= {
        f"narrow {i}": engine.submit(greedy(engine, images[1], max_new_tokens=3), client="b")
        for i in range(5)
    }
    for name, job in jobs.items():
        job.result.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
    for job in [long, *jobs.values()]:
        job.result.result(60)
    assert order[0] == "wide" and len(order) == 6
    engine.close()


def test_clients_take_turns(engine: Engine) -> None:
    gate, order = Gate(), list[str]()
    first = engine.submit(gate)
    assert gate.entered.wait(60)
    jobs = [engine.submit(call(partial(order.append, f"a{i}")), client="a") for i in range(5)]
    jobs += [engine.submit(call(partial(order.append, f"b{i}")), client="b") for i in range(2)]
    gate.open.set()
    for job in [first, *jobs]:
        job.result.result(60)
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_cancelled_text_is_gone_within_one_step(
    engine: Engine, images: list[bytes], num_beams: int
) -> None:
    """Texts that never end are cancelled after their first steps: no more tokens are written for them."""
    seen: list[int] = []
    started = threading.Event()
    options: dict[str, Any] = {"max_new_tokens": 150, "min_new_tokens": 150, "num_beams": num_beams}
    before = engine.tokens

    def watch(_: object) -> None:
        seen.append(1)
        started.set()

    jobs = [engine.submit(greedy(engine, images[0], **options), on_step=watch) for _ in range(3)]
    if num_beams == 1:
        assert started.wait(60)
    else:
        while engine.running == 0:
            time.sleep(0.001)
    for job in jobs:
        assert job.result.cancel()
    after = engine.submit(greedy(engine, images[0], max_new_tokens=2))
    after.result.result(60)
    assert engine.running == 0 and engine.tokens - before < 3 * num_beams * 120
    for job in jobs:
        with pytest.raises(CancelledError):
            job.result.result()


def test_deadlines(engine: Engine, images: list[bytes]) -> None:
    late = engine.submit(greedy(engine, images[0]), deadline=time.monotonic() - 1)
    with pytest.raises(TooLateError):
        late.result.result(60)
    long = greedy(engine, images[0], max_new_tokens=200, min_new_tokens=200)
    with pytest.raises(TooLateError):
        engine.submit(long, deadline=time.monotonic() + 0.05).result.result(60)
    assert engine.submit(greedy(engine, images[0])).result.result(60)


def test_what_fails_fails_alone(
    engine: Engine, images: list[bytes], monkeypatch: pytest.MonkeyPatch, predictor: blip2.Predictor
) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    with pytest.raises(EngineError) as failure:
        engine.submit(call(broken)).result.result(60)
    assert "secret" not in str(failure.value)
    with pytest.raises(ValueError, match="room"):
        engine.submit(GenerateRequest(engine.prepare_image(images[0]), ("word " * 400,), GenerationOptions()))
    with monkeypatch.context() as patch:
        patch.setattr(predictor.model.language, "decode_step", lambda *_: broken())
        with pytest.raises(EngineError):
            engine.submit(greedy(engine, images[0], min_new_tokens=5)).result.result(60)
        with pytest.raises(EngineError):
            engine.submit(greedy(engine, images[0], num_beams=2, min_new_tokens=5)).result.result(60)
    good = engine.submit(greedy(engine, images[0])).result.result(60)[0].text
    assert good == predictor.caption(images[0], num_beams=1)


def test_a_model_that_does_not_load_is_reported() -> None:
    def load() -> blip2.Predictor:
        raise ValueError("no such model")

    failed = threading.Event()
    engine = Engine(load, Limits())
    engine.on_failure = failed.set
    engine.start()
    assert failed.wait(60) and str(engine.failure) == "no such model"
    with pytest.raises(BusyError):
        engine.check_room()
    engine.close()


def test_an_engine_that_breaks_leaves_nobody_waiting(
    predictor: blip2.Predictor, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    engine = started(predictor, Limits())
    engine.on_failure = failed.set
    gate = Gate()
    engine.submit(gate)
    assert gate.entered.wait(60)
    monkeypatch.setattr(engine, "_take", lambda: 1 / 0)
    job = engine.submit(greedy(engine, images[0]))
    gate.open.set()
    with pytest.raises(EngineError):
        job.result.result(60)
    assert failed.is_set() and isinstance(engine.failure, ZeroDivisionError)
    with pytest.raises(BusyError):
        engine.acquire_slot()
    engine.close()


def test_closing_does_not_wait_for_a_model_that_is_still_loaded(predictor: blip2.Predictor) -> None:
    here = threading.Event()

    def load() -> blip2.Predictor:
        assert here.wait(60)
        return predictor

    engine = Engine(load, Limits())
    engine.start()
    engine.close()
    assert engine.alive
    here.set()
    assert engine.loaded.wait(60)
    with pytest.raises(BusyError):
        engine.submit(call(lambda: "done"))


def test_closing_leaves_nobody_waiting(predictor: blip2.Predictor, images: list[bytes]) -> None:
    engine = started(predictor, Limits())
    jobs = [
        engine.submit(greedy(engine, images[0], max_new_tokens=200, min_new_tokens=200)) for _ in range(3)
    ]
    engine.close()
    for job in jobs:
        with pytest.raises(EngineError):
            job.result.result(1)


def test_limits() -> None:
    limits = Limits().changed(["queue=7", "body-seconds=2.5"])
    assert (limits.queue, limits.body_seconds) == (7, 2.5)
    for wrong in ("nonsense=1", "queue", "queue=x", "queue=-1", "rows=0", "body_seconds=nan"):
        with pytest.raises(ValueError):
            Limits().changed([wrong])


def test_closing_does_not_wait_for_a_step_that_hangs(
    predictor: blip2.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching_engine, "CLOSING_SECONDS", 0.1)
    engine, gate, first = held_up(predictor, queue=1)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5 and engine.alive and not first.result.done()
    gate.open.set()
    with pytest.raises(EngineError):
        first.result.result(60)
