"""One model on one thread, and everybody's requests for it: nothing here knows of HTTP.

Texts are written side by side. Greedy and sampled ones join and leave between two steps (`Rows`); beam searches with
equal options begin together and take their steps in turn with the rest; whatever else is asked of the model runs whole
between two steps. What is waiting is bounded, and taken from the clients in turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from blip2.continuous import Row, Rows
from blip2.generate import GenerationOptions, Search, search
from blip2.images import load_image, to_pixels
from blip2.layers import join_contexts
from blip2.predict import Predictor
from blip2.results import Encoded, Written
from blip2.serve.cache import ImageCache
from blip2.serve.limits import Limits

log = logging.getLogger("blip2.serve")

AT_ONCE = 8  # requests begun between two steps: those being answered must not wait for long
SEARCHES = 2  # groups of beam searches side by side; what comes meanwhile makes up the next group


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
    encoded: Encoded | None


@dataclass(frozen=True, eq=False)
class Writing:
    """Texts asked for: `options.num_return_sequences` that go on from `prompt`.

    top_logprobs: likeliest tokens to note at each place; greedy and sampled texts only.
    """

    picture: Picture
    prompt: str
    options: GenerationOptions
    top_logprobs: int = 0


@dataclass(frozen=True, eq=False)
class Text:
    """A text written: the words, and what `Row` says of their tokens.

    finished: ended by itself, not at max_new_tokens.
    """

    written: Written
    finished: bool
    tops: list[list[tuple[int, float]]]


@dataclass(eq=False)
class Job:
    """A request in the engine. `result` is a list of `Text`, or what a call gave; cancelling it frees its place.

    on_step: called on the engine's thread with the rows after each step.
    """

    asked: Writing | Callable[[Predictor], Any]
    client: str
    deadline: float
    on_step: Callable[[list[Row]], None] | None
    result: Future[Any] = field(default_factory=Future)
    rows: list[Row] = field(default_factory=list)

    def finish(self, value: Any) -> None:
        if self.result.set_running_or_notify_cancel():
            self.result.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


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
        self._count = 0
        self._lock = threading.Condition()
        self._closed = False
        self._rows: Rows | None = None
        self._writing: list[Job] = []  # whose rows are in `_rows`
        self._searches: list[tuple[Search, list[Job]]] = []
        self._thread = threading.Thread(target=self._live, name="blip2 engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; whoever still waits gets an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
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
        """Texts being written."""
        searching = sum(self._width(job) for _, jobs in self._searches for job in jobs)
        return (0 if self._rows is None else len(self._rows)) + searching

    def check_room(self) -> None:
        """Raises BusyError where another request would not be taken now."""
        _ = self.predictor
        if self._closed or self._count >= self.limits.queue:
            raise BusyError("too many requests are waiting; try again soon", 1)

    def read(self, content: bytes) -> Picture:
        """A file's image, ready for the model; from the cache where it was seen before. Takes a while: not for a loop.

        Raises:
            ImageError: no image.
        """
        key = hashlib.sha256(content).digest()
        encoded = self.cache.get(key)
        if encoded is not None:
            return Picture(key, encoded.size, None, encoded)
        image = load_image(content, max_pixels=self.limits.pixels)
        return Picture(key, image.size, to_pixels([image], self.predictor.generator.processing), None)

    def submit(
        self,
        asked: Writing | Callable[[Predictor], Any],
        *,
        client: str = "",
        deadline: float | None = None,
        on_step: Callable[[list[Row]], None] | None = None,
    ) -> Job:
        """Ask for texts, or for whatever a call on the model gives.

        Args:
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
            self.check_room()
            self._waiting.setdefault(client, deque()).append(job)
            self._count += 1
            self._lock.notify()
        return job

    def _check(self, asked: Writing) -> None:
        model, new = self.predictor.model, asked.options.max_new_tokens
        length, room = len(self.predictor.generator.tokenizer.encode(asked.prompt)), model.prompt_room(new)
        if length > room:
            raise ValueError(
                f"the prompt has {length} tokens, and beside the image and {new} new ones there is room for "
                f"{max(room, 0)}; shorten it, or ask for fewer new tokens"
            )

    # --- on the engine's thread ---

    def _live(self) -> None:
        try:
            self._predictor = self._load()
            with contextlib.suppress(ValueError):  # a matcher alone writes nothing
                self._rows = Rows(self._predictor.model)
        except BaseException as error:
            self.failure, self._closed = error, True
            self.on_failure()
            return
        self.loaded.set()
        while True:
            with self._lock:
                while not (self._count or self._writing or self._searches or self._closed):
                    self._lock.wait()
                if self._closed:
                    break
                taken = self._take()
            self._begin(taken)
            self._step_rows()
            self._step_searches()
        for job in [*self._taken_all(), *self._writing, *(job for _, jobs in self._searches for job in jobs)]:
            job.fail(EngineError("the server is shutting down"))

    def _taken_all(self) -> list[Job]:
        with self._lock:
            jobs = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
            self._count = 0
        return jobs

    @staticmethod
    def _width(job: Job) -> int:
        """Rows that a job takes."""
        if not isinstance(job.asked, Writing):
            return 0
        return max(job.asked.options.beams, job.asked.options.num_return_sequences)

    def _take(self) -> list[Job]:
        """What begins now: from each client in turn its oldest, as long as they fit."""
        taken: list[Job] = []
        moved = True
        while moved and len(taken) < AT_ONCE:
            moved = False
            for client in list(self._waiting):
                queue = self._waiting[client]
                job = queue[0]
                gone = self._gone(job)
                if len(taken) >= AT_ONCE or not (gone or self._fits(job, taken)):
                    continue
                queue.popleft()
                self._count -= 1
                moved = True
                if not gone:
                    taken.append(job)
                if queue:
                    self._waiting.move_to_end(client)
                else:
                    del self._waiting[client]
        return taken

    def _fits(self, job: Job, taken: list[Job]) -> bool:
        if not isinstance(job.asked, Writing):
            return all(
                isinstance(each.asked, Writing) for each in taken
            )  # one a time: they hold up the others
        searches = job.asked.options.beams > 1
        alike = [
            each
            for each in taken
            if isinstance(each.asked, Writing) and (each.asked.options.beams > 1) == searches
        ]
        used = sum(map(self._width, alike))
        if searches:
            kinds = {each.asked.options for each in alike if isinstance(each.asked, Writing)} | {
                job.asked.options
            }
            if len(self._searches) + len(kinds) > SEARCHES:
                return False
            used += sum(self._width(each) for _, jobs in self._searches for each in jobs)
        else:
            used += 0 if self._rows is None else len(self._rows)
        return used == 0 or used + self._width(job) <= self.limits.rows

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
        for job in jobs:
            if not isinstance(job.asked, Writing):
                try:
                    job.finish(job.asked(self.predictor))
                except Exception as error:
                    self._failed([job], error)
        writings = [job for job in jobs if isinstance(job.asked, Writing)]
        if not writings:
            return
        try:
            encoded = self._encode(writings)
        except Exception as error:
            self._failed(writings, error)
            return
        groups: dict[tuple[Any, ...], list[Job]] = {}
        for job in writings:
            assert isinstance(job.asked, Writing)
            options = job.asked.options
            way = (options,) if options.beams > 1 else (options.max_new_tokens,)
            groups.setdefault(way, []).append(job)
        for group in groups.values():
            try:
                self._start(group, encoded)
            except Exception as error:
                self._failed(group, error)

    @torch.inference_mode()
    def _encode(self, jobs: list[Job]) -> dict[bytes, Encoded]:
        """Every job's image as the language model reads it; each is encoded once."""
        found: dict[bytes, Encoded] = {}
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
            sizes = [picture.size for picture in fresh.values()]
            for key, encoded in zip(fresh, self.predictor.read_pixels(pixels, sizes), strict=True):
                self.cache.put(key, encoded)
                found[key] = encoded
        return found

    def _start(self, jobs: list[Job], encoded: dict[bytes, Encoded]) -> None:
        """Read the prompts of jobs that go the same way."""
        asked = [job.asked for job in jobs if isinstance(job.asked, Writing)]
        images = [encoded[each.picture.key] for each in asked]
        prefix = torch.cat([image.prefix for image in images])
        contexts = [image.context for image in images if image.context is not None]
        context = join_contexts(contexts) if contexts else None
        ids, mask = self.predictor.generator.tokenizer.encode_batch([each.prompt for each in asked])
        ids, mask = ids.to(prefix.device), mask.to(prefix.device)
        options = [each.options for each in asked]
        if options[0].beams > 1:
            started = search(self.predictor.model, prefix, ids, mask, options[0], context=context)
            next(started)
            self._searches.append((started, jobs))
            return
        assert self._rows is not None
        tops = [each.top_logprobs for each in asked]
        made = self._rows.join(prefix, ids, mask, options, tops=tops, context=context)
        for job, rows in zip(jobs, made, strict=True):
            job.rows = rows
        self._writing += jobs

    def _step_rows(self) -> None:
        if not self._writing or self._rows is None:
            return
        try:
            self._rows.choose()
            self.steps += 1
            self.tokens += len(self._rows)
            for job in self._writing:
                if job.on_step is not None:
                    job.on_step(job.rows)
            done = [job for job in self._writing if all(row.done for row in job.rows)]
            for job in done:
                job.finish([self.text_of(row) for row in job.rows])
            gone = [job for job in self._writing if self._gone(job)]  # done, cancelled, or too late
            for row in (row for job in gone for row in job.rows):
                row.dropped = True
            self._writing = [job for job in self._writing if job not in gone]
            self._rows.advance()
        except Exception as error:
            jobs, self._writing = self._writing, []
            self._rows = Rows(self.predictor.model)
            self._failed(jobs, error)

    def text_of(self, row: Row) -> Text:
        words = self._words(row.ids, row.finished)
        return Text(Written(words, row.score, row.ids, row.logprobs), row.finished, row.tops)

    def _words(self, ids: list[int], finished: bool) -> str:
        return self.predictor.generator.tokenizer.decode(ids[:-1] if finished else ids).strip()

    def _step_searches(self) -> None:
        for entry in list(self._searches):
            searching, jobs = entry
            try:
                gone = {place for place, job in enumerate(jobs) if self._gone(job)}
                self.steps += 1
                self.tokens += sum(self._width(job) for job in jobs if not job.result.done())
                if len(gone) < len(jobs):
                    searching.send(gone)
                    continue
                searching.close()
            except StopIteration as end:
                each = len(end.value.ids) // len(jobs)
                rows = list(zip(*(getattr(end.value, name) for name in _PARTS), strict=True))
                for place, job in enumerate(jobs):
                    texts = rows[place * each : (place + 1) * each]
                    job.finish(
                        [
                            Text(Written(self._words(ids, ended), score, ids, logprobs), ended, [])
                            for ids, score, logprobs, ended in texts
                        ]
                    )
            except Exception as error:
                self._failed(jobs, error)
            self._searches.remove(entry)

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        """What was asked for wrongly is told as it is; anything else goes to the log."""
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            for job in jobs:
                job.fail(error)
            return
        log.error("the model failed", exc_info=error)
        for job in jobs:
            job.fail(EngineError("the model failed"))


_PARTS = ("ids", "scores", "token_logprobs", "finished")
