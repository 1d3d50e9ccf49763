"""One model on one thread, and everybody's requests for it: nothing here knows of HTTP.

Texts are written side by side and join and leave between two steps (`ContinuousBatch`). Whatever else is asked of the
model is computed in slices, one between two steps. What is waiting is bounded, and taken from the clients in turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blip2.generation.batching import BeamSequence, ContinuousBatch, SampledSequence, width
from blip2.generation.options import GenerationOptions
from blip2.images import load_image, to_pixels
from blip2.modeling.kv_cache import concat_prompt_caches
from blip2.predict import Predictor
from blip2.results import EncodedImage, GeneratedText
from blip2.serve.cache import ImageCache
from blip2.serve.limits import Limits

log = logging.getLogger("blip2.serve")

AT_ONCE = 8  # requests begun at a time
BESIDE = 2  # likewise, between two steps of texts that are being written: these must not wait for long

# What a model is asked for that is no text: stops between slices, ends with the result.
Call = Callable[[Predictor], Generator[None, None, Any]]


class BusyError(Exception):
    """The queue is full, or the model is not loaded yet. `wait`: seconds until it makes sense to come again."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class TooLateError(Exception):
    """A request's time ran out."""


class EngineError(Exception):
    """The model failed, and not because of what was asked. The log says how."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on its way to the model: encoded already, or as pixels.

    key: hash of its file. pixels: float32 [1, 3, S, S].
    """

    key: bytes
    size: tuple[int, int]
    pixels: torch.Tensor | None
    encoded: EncodedImage | None


@dataclass(frozen=True, eq=False)
class Writing:
    """Texts asked for: for each prompt, in this order, `options.num_return_sequences` that go on from it.

    top_logprobs: likeliest tokens to note at each place; greedy and sampled texts only.
    """

    picture: Picture
    prompts: tuple[str, ...]
    options: GenerationOptions
    top_logprobs: int = 0

    @property
    def rows(self) -> int:
        return len(self.prompts) * width(self.options)


@dataclass(frozen=True, eq=False)
class Text:
    """A text written: the words, and what `SampledSequence` says of their tokens.

    finished: ended by itself, not at max_new_tokens.
    """

    written: GeneratedText
    finished: bool
    tops: list[list[tuple[int, float]]]


@dataclass(eq=False)
class Job:
    """A request in the engine. `result` is a list of `Text`, or what a call gave; cancelling it frees its place.

    on_step: called on the engine's thread with the rows after each step of a greedy or sampled text.
    """

    asked: Writing | Call
    client: str
    deadline: float
    on_step: Callable[[list[SampledSequence]], None] | None
    result: Future[Any] = field(default_factory=Future)
    texts: list[SampledSequence | BeamSequence] = field(default_factory=list)

    def finish(self, value: Any) -> None:
        if self.result.set_running_or_notify_cancel():
            self.result.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


class Place:
    """A request's place in the engine: first among those that wait for the model, then with what it asked.

    To be left in any case.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._job: Job | None = None

    def give(self, job: Job) -> None:
        """To what the request asks; the place among those that have not asked yet is given back."""
        self._job = job
        self._give_back()

    def leave(self) -> None:
        """Give back whatever is held: nobody waits for it any more."""
        self._give_back()
        if self._job is not None:
            self._job.result.cancel()

    def _give_back(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine._give_back()


class Engine:
    """Loads a model on a thread of its own and answers there."""

    def __init__(self, load: Callable[[], Predictor], limits: Limits) -> None:
        self.limits = limits
        self.cache = ImageCache(limits.cache_bytes)
        self.loaded = threading.Event()
        self.failure: BaseException | None = None  # why there is no model
        self.on_failure: Callable[[], None] = lambda: None
        self.steps = self.tokens = 0
        self._load = load
        self._predictor: Predictor | None = None
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._count = 0  # jobs in `_waiting`
        self._promised = 0  # places of requests that are still being read
        self._lock = threading.Condition()
        self._closed = False
        self._rows: ContinuousBatch | None = None
        self._writing: list[Job] = []  # whose texts are in `_rows`
        self._call: tuple[Job, Generator[None, None, Any]] | None = None  # the one that has begun
        self._thread = threading.Thread(target=self._live, name="blip2 engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; whoever still waits gets an error. A model that is still being loaded is not waited for."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        if self.loaded.is_set() or self.failure is not None:
            self._thread.join()

    @property
    def predictor(self) -> Predictor:
        """The model. Raises BusyError while it is being loaded."""
        if self._predictor is None:
            raise BusyError("the model is still being loaded; try again soon", 5)
        return self._predictor

    @property
    def alive(self) -> bool:
        """Whether the thread is there to answer."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self._count

    @property
    def running(self) -> int:
        """Texts being written, all beams counted."""
        texts = [text for job in self._writing for text in job.texts]
        return sum(text.options.num_beams for text in texts if not text.done)

    def check_room(self) -> None:
        """Raises BusyError where another request would not be taken now."""
        _ = self.predictor
        if self._closed or self._count + self._promised >= self.limits.queue:
            raise BusyError("too many requests are waiting; try again soon", 1)

    def enter(self) -> Place:
        """A place among those that wait, for a request that is still being read.

        Raises:
            BusyError: there is none.
        """
        with self._lock:
            self.check_room()
            self._promised += 1
        return Place(self)

    def _give_back(self) -> None:
        with self._lock:
            self._promised -= 1

    def read(self, content: bytes, *, pixels: bool = False) -> Picture:
        """A file's image, ready for the model; from the cache where it was seen before. Takes a while: not for a loop.

        Args:
            pixels: they are needed even where the cache has the image.

        Raises:
            ImageError: no image.
        """
        key = hashlib.sha256(content).digest()
        encoded = self.cache.get(key)
        if encoded is not None and not pixels:
            return Picture(key, encoded.size, None, encoded)
        image = load_image(content, max_pixels=self.limits.pixels)
        return Picture(key, image.size, to_pixels([image], self.predictor.generator.image_processor), encoded)

    def submit(
        self,
        asked: Writing | Call,
        *,
        place: Place | None = None,
        client: str = "",
        deadline: float | None = None,
        on_step: Callable[[list[SampledSequence]], None] | None = None,
    ) -> Job:
        """Ask for texts, or for whatever a call on the model gives.

        Args:
            place: from `enter`; may be used again by a request that asks twice. None: there must be room now.
            client: whose request this is; clients take turns.
            deadline: on time.monotonic's clock; None: `request_seconds` from now.

        Raises:
            BusyError: the queue is full.
            ValueError: a prompt that with its new tokens is too long for the model.
        """
        if isinstance(asked, Writing):
            self._check(asked)
        until = time.monotonic() + self.limits.request_seconds if deadline is None else deadline
        job = Job(asked, client, until, on_step)
        with self._lock:
            if place is None or self._closed:
                self.check_room()
            if place is not None:
                place.give(job)
            self._waiting.setdefault(client, deque()).append(job)
            self._count += 1
            self._lock.notify()
        job.result.add_done_callback(lambda result: self._remove(job) if result.cancelled() else None)
        return job

    def _remove(self, job: Job) -> None:
        """Out of the queue, where it is there."""
        with self._lock:
            queue = self._waiting.get(job.client, ())
            if job not in queue:
                return
            self._waiting[job.client].remove(job)
            self._count -= 1
            if not queue:
                del self._waiting[job.client]

    def _check(self, asked: Writing) -> None:
        encode, new = self.predictor.generator.tokenizer.encode, asked.options.max_new_tokens
        length = max(len(encode(prompt)) for prompt in asked.prompts)
        room = self.predictor.model.prompt_room(new)
        if length > room:
            raise ValueError(
                f"the prompt has {length} tokens, and beside the image and {new} new ones there is room for "
                f"{max(room, 0)}; shorten it, or ask for fewer new tokens"
            )

    # --- on the engine's thread ---

    def _live(self) -> None:
        try:
            loaded = self._load()
            with contextlib.suppress(ValueError):  # a matcher alone writes nothing
                self._rows = ContinuousBatch(loaded.model)
            with contextlib.suppress(ValueError):  # not every model comes with one
                _ = loaded.matcher
            self._predictor = loaded
            self.loaded.set()
            while self._turn():
                pass
        except BaseException as error:  # whoever waits is told, and the process may be started anew
            self.failure, self._closed = error, True
            self.on_failure()
        begun = [] if self._call is None else [self._call[0]]
        for job in [*self._taken_all(), *self._writing, *begun]:
            job.fail(EngineError("the server is shutting down"))

    def _turn(self) -> bool:
        """A step of everything there is to do; waits where there is nothing. False: the engine was closed."""
        with self._lock:
            while not (self._count or self._writing or self._call or self._closed):
                self._lock.wait()
            if self._closed:
                return False
            taken = self._take()
        self._begin(taken)
        self._step_rows()
        self._step_call()
        return True

    def _taken_all(self) -> list[Job]:
        with self._lock:
            jobs = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
            self._count = 0
        return jobs

    def _take(self) -> list[Job]:
        """What begins now: from each client in turn its oldest, as long as they fit. What is next and does not fit is
        waited for: others of its kind do not slip past it."""
        for job in [job for queue in self._waiting.values() for job in queue]:
            if self._gone(job):
                self._remove(job)
        taken: list[Job] = []
        rows, calling = self.running, self._call is not None
        full: set[bool] = set()  # texts (True), calls (False): one that waits for room was met
        most = BESIDE if self._writing else AT_ONCE
        while True:
            before = len(taken)
            for client in list(self._waiting):
                job = self._waiting[client][0]
                text, wanted = (True, job.asked.rows) if isinstance(job.asked, Writing) else (False, 0)
                if calling if not text else rows and rows + wanted > self.limits.rows:
                    full.add(text)
                if text in full or len(taken) == most:
                    continue
                rows, calling = rows + wanted, calling or not text
                taken.append(job)
                self._remove(job)
                if client in self._waiting:
                    self._waiting.move_to_end(client)
            if len(taken) == before:
                return taken

    @staticmethod
    def _gone(job: Job) -> bool:
        """Whether nobody waits for a job any more: cancelled, or its time is over."""
        if job.result.done():
            return True
        if time.monotonic() > job.deadline:
            job.fail(TooLateError("the request took longer than the server allows"))
            return True
        return False

    def _begin(self, jobs: list[Job]) -> None:
        writings = []
        for job in jobs:
            if isinstance(job.asked, Writing):
                writings.append(job)
            else:
                self._call = job, job.asked(self.predictor)
        if not writings:
            return
        try:
            encoded = self._encode(writings)
        except Exception as error:
            self._failed(writings, error)
            return
        groups: dict[tuple[int, bool], list[Job]] = {}
        for job in writings:
            assert isinstance(job.asked, Writing)
            kind = job.asked.options.max_new_tokens, encoded[job.asked.picture.key].context is None
            groups.setdefault(kind, []).append(job)
        for group in groups.values():
            try:
                self._start(group, encoded)
            except Exception as error:
                self._failed(group, error)

    @torch.inference_mode()
    def _encode(self, jobs: list[Job]) -> dict[bytes, EncodedImage]:
        """Every job's image for the language model; each is encoded once. One that is new has no context yet."""
        found: dict[bytes, EncodedImage] = {}
        fresh: dict[bytes, Picture] = {}
        for job in jobs:
            assert isinstance(job.asked, Writing)
            picture = job.asked.picture
            held = picture.encoded or self.cache.peek(picture.key)
            if held is not None:
                found[picture.key] = held
            else:
                fresh[picture.key] = picture
        if fresh:
            pixels = torch.cat([picture.pixels for picture in fresh.values() if picture.pixels is not None])
            prefixes = self.predictor.model.embed_image(pixels.to(self.predictor.device)).split(1)
            for (key, picture), prefix in zip(fresh.items(), prefixes, strict=True):
                found[key] = EncodedImage(prefix.clone(), None, picture.size)
        return found

    def _start(self, jobs: list[Job], encoded: dict[bytes, EncodedImage]) -> None:
        """Read the prompts of jobs with the same max_new_tokens, whose images all have a context or all have none."""
        assert self._rows is not None
        asked = [
            (job.asked, prompt)
            for job in jobs
            if isinstance(job.asked, Writing)
            for prompt in job.asked.prompts
        ]
        keys = [each.picture.key for each, _ in asked]
        images = [encoded[key] for key in keys]
        prefix = torch.cat([image.prefix for image in images])
        contexts = [image.context for image in images if image.context is not None]
        context = concat_prompt_caches(contexts) if contexts else None
        ids, mask = self.predictor.generator.tokenizer.encode_batch([prompt for _, prompt in asked])
        ids, mask = ids.to(prefix.device), mask.to(prefix.device)
        options, tops = [each.options for each, _ in asked], [each.top_logprobs for each, _ in asked]
        made, read = self._rows.join(prefix, ids, mask, options, tops=tops, prompt_cache=context)
        for key, image, context in zip(keys, images, read, strict=True):
            self.cache.put(key, replace(image, context=context) if image.context is None else image)
        texts = iter(made)
        for job in jobs:
            assert isinstance(job.asked, Writing)
            job.texts = [text for _ in job.asked.prompts for text in next(texts)]
        self._writing += jobs

    def _step_rows(self) -> None:
        if not self._writing or self._rows is None:
            return
        try:
            self.steps += 1
            self.tokens += len(self._rows)
            self._rows.choose()
            for job in self._writing:
                if job.on_step is not None:
                    job.on_step([text for text in job.texts if isinstance(text, SampledSequence)])
            done = [job for job in self._writing if all(text.done for text in job.texts)]
            gone = [job for job in self._writing if job in done or self._gone(job)]
            for text in (text for job in gone for text in job.texts):
                text.dropped = True
            self._writing = [job for job in self._writing if job not in gone]
            for job in done:
                job.finish([written for text in job.texts for written in self._written(text)])
            self._rows.advance()
        except Exception as error:
            jobs, self._writing = self._writing, []
            self._rows = ContinuousBatch(self.predictor.model)
            self._failed(jobs, error)

    def _written(self, text: SampledSequence | BeamSequence) -> list[Text]:
        if isinstance(text, SampledSequence):
            return [self.text_of(text)]
        assert text.generated is not None
        found = zip(*(getattr(text.generated, name) for name in _PARTS), strict=True)
        return [
            Text(GeneratedText(self._words(ids, ended), score, ids, logprobs), ended, [])
            for ids, score, logprobs, ended in found
        ]

    def text_of(self, row: SampledSequence) -> Text:
        words = self._words(row.ids, row.finished)
        return Text(GeneratedText(words, row.score, row.ids, row.logprobs), row.finished, row.tops)

    def _words(self, ids: list[int], finished: bool) -> str:
        return self.predictor.generator.tokenizer.decode(ids[:-1] if finished else ids).strip()

    def _step_call(self) -> None:
        if self._call is None:
            return
        job, slices = self._call
        try:
            if self._gone(job):
                slices.close()
            else:
                next(slices)
                return
        except StopIteration as end:
            job.finish(end.value)
        except Exception as error:
            self._failed([job], error)
        self._call = None

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        """What was asked for wrongly is told as it is; anything else goes to the log."""
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            for job in jobs:
                job.fail(error)
            return
        log.error("the model failed", exc_info=error)
        for job in jobs:
            failure = EngineError("the model failed")
            failure.__cause__ = error  # for whoever writes it down beside the request's id
            job.fail(failure)


_PARTS = ("ids", "scores", "token_logprobs", "finished")
