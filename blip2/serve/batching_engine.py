"""Where requests become batches: one model on one thread, and the queue of all clients' requests for it.

Nothing here knows of HTTP. Texts are generated side by side and join and leave between two decoding steps
(`ContinuousBatch`). Anything else that a request needs from the model is computed in slices, one between two steps. The
queue is bounded, and clients take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blip2.generation.batching import ContinuousBatch, SampledSequence, each_alone
from blip2.generation.decoding import BeamSequence
from blip2.generation.options import GenerationOptions
from blip2.imagefiles.workers import ImageWorkers, PendingImage
from blip2.images import ImageProcessor, normalized_pixels
from blip2.modeling.kv_cache import concat_prompt_caches
from blip2.predict import Predictor
from blip2.results import EncodedImage, GeneratedText
from blip2.serve.cache import ImageCache
from blip2.serve.limits import Limits
from blip2.serve.logs import log_event

log = logging.getLogger("blip2.serve")

# Requests started at a time, and while texts are being generated, whose next step must not wait for long.
MAX_STARTS, MAX_STARTS_BETWEEN_STEPS = 8, 2

IMAGE_WORKERS = 3  # two for any one client
CLOSING_SECONDS = 5.0  # that a step may still take when the server ends

# Any other computation with the model: a generator that yields between slices and returns the result.
ModelCall = Callable[[Predictor], Generator[None, None, Any]]


class BusyError(Exception):
    """The queue is full, or the model is not loaded yet. `wait`: seconds after which a retry makes sense."""

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait


class TooLateError(Exception):
    """A request's deadline passed."""


class EngineError(Exception):
    """The model failed, and not because of the request. The log has the details."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image ready for the model: encoded already, or as pixels.

    key: hash of its file. size: width and height in pixels. pixels: before any stem, float32 [1, 3, S, S].
    """

    key: bytes
    size: tuple[int, int]
    pixels: torch.Tensor | None
    encoded: EncodedImage | None


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """Texts to generate: for each prompt, in this order, `options.num_return_sequences` that continue it.

    top_logprobs: likeliest tokens to record at each position; greedy and sampled texts only.
    """

    image: PreparedImage
    prompts: tuple[str, ...]
    options: GenerationOptions
    top_logprobs: int = 0

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes: one for each text, or for each beam."""
        return len(self.prompts) * self.options.rows


# What a job computes; and its callback after each step of its greedy or sampled texts, on the engine's thread.
Work = GenerateRequest | ModelCall
OnStep = Callable[[list[SampledSequence]], None]


TopLogprobs = list[tuple[int, float]]  # the likeliest ids at a position, with their log-probabilities


@dataclass(frozen=True, eq=False)
class TextOutput:
    """A generated text.

    finished: it ended by its end token, not at max_new_tokens.
    top_logprobs: for each token; empty where none were requested.
    """

    text: GeneratedText
    finished: bool
    top_logprobs: list[TopLogprobs]


@dataclass(eq=False)
class Job:
    """Work in the engine. `result`: a list of `TextOutput`, or what a call returned; cancelling it ends the job."""

    work: Work
    client: str
    deadline: float
    on_step: OnStep | None
    result: Future[Any] = field(default_factory=Future)
    sequences: list[SampledSequence | BeamSequence] = field(default_factory=list)

    def finish(self, value: Any) -> None:
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


TextJob = tuple[Job, GenerateRequest]


class Slot:
    """A request's place in the queue: reserved while its body is read, then that of its job. Always to be released."""

    def __init__(self, reserved: set[Slot]) -> None:
        self._reserved = reserved
        self._job: Job | None = None
        reserved.add(self)

    def assign(self, job: Job) -> None:
        """From now on the job counts in the queue, and the reservation no more."""
        self._job = job
        self._reserved.discard(self)

    def release(self) -> None:
        """Leave the queue: a job that still waits or runs is cancelled."""
        self._reserved.discard(self)
        if self._job is not None:
            self._job.result.cancel()


class Engine:
    """Loads a model on a thread of its own and runs all requests there."""

    def __init__(self, load: Callable[[], Predictor], limits: Limits) -> None:
        self.limits = limits
        self.cache = ImageCache(limits.cache_bytes)
        self.workers = ImageWorkers(IMAGE_WORKERS)
        self.loaded = threading.Event()
        self.failure: BaseException | None = None  # why there is no model
        self.on_failure: Callable[[], None] = lambda: None
        self.steps = self.tokens = 0
        self._load = load
        self._predictor: Predictor | None = None
        self._waiting: dict[str, deque[Job]] = {}  # clients in the order of their turns
        self._reserved: set[Slot] = set()  # of requests whose bodies are still being read
        self._lock = threading.Condition()
        self._closed = False
        self._batch: ContinuousBatch | None = None
        self._generating: list[Job] = []  # whose texts are in `_batch`
        self._call: tuple[Job, Generator[None, None, Any]] | None = None  # the one that has started
        self._thread = threading.Thread(target=self._run, name="blip2 engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread, which starts the processes that decode images and loads the model first."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; all jobs fail. Neither a model that is still being loaded is waited for nor a step that
        hangs."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self.workers.close()
        if self.loaded.is_set() or self.failure is not None:
            self._thread.join(CLOSING_SECONDS)

    @property
    def predictor(self) -> Predictor:
        """The model. Raises BusyError while it is being loaded."""
        if self._predictor is None:
            raise BusyError("the model is still being loaded; try again soon", 5)
        return self._predictor

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Texts being generated, all beams counted."""
        sequences = [sequence for job in self._generating for sequence in job.sequences]
        return sum(sequence.options.num_beams for sequence in sequences if not sequence.done)

    def check_room(self) -> None:
        """Raises BusyError where another request would be refused now."""
        _ = self.predictor
        if self._closed or self.waiting + len(self._reserved) >= self.limits.queue:
            raise BusyError("too many requests are waiting; try again soon", 1)

    def acquire_slot(self) -> Slot:
        """A slot in the queue, for a request that is still being read. Raises BusyError where none is free."""
        with self._lock:
            self.check_room()
            return Slot(self._reserved)

    def prepare_image(
        self, content: bytes, pending: PendingImage | None = None, *, pixels: bool = False
    ) -> PreparedImage:
        """A file's image, ready for the model; from the cache where it has it, unless `pixels` are needed too.

        Slow: not for an event loop's thread. `pending` and errors: as for `ImageWorkers.decode`.
        """
        key = hashlib.sha256(content).digest()
        encoded = self.cache.get(key)
        if encoded is not None and not pixels:
            return PreparedImage(key, encoded.size, None, encoded)
        tensor, size = self.load_pixels(content, self.predictor.generator.image_processor, pending)
        return PreparedImage(key, size, tensor, encoded)

    def load_pixels(
        self, content: bytes, processor: ImageProcessor, pending: PendingImage | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """A file's image before any stem, float32 [1, 3, S, S], and its own width and height.

        As `prepare_image`, without the cache.
        """
        resize, limit = (processor.size, processor.resample), self.limits.pixels
        decoded = self.workers.decode(content, resize=resize, max_pixels=limit, pending=pending)
        return normalized_pixels([decoded.image], processor), decoded.size

    def submit(
        self,
        work: Work,
        slot: Slot | None = None,
        client: str = "",
        deadline: float | None = None,
        on_step: OnStep | None = None,
    ) -> Job:
        """Queue work.

        Args:
            slot: from `acquire_slot`; may be used again by an HTTP request that needs two jobs. None: there must be
                room now.
            client: whose request this is; clients take turns.
            deadline: on time.monotonic's clock; None: `request_seconds` from now.

        Raises:
            BusyError: the queue is full.
            ValueError: a prompt that with its new tokens is too long for the model.
        """
        if isinstance(work, GenerateRequest):
            self._check_prompts(work)
        if deadline is None:
            deadline = time.monotonic() + self.limits.request_seconds
        job = Job(work, client, deadline, on_step)
        with self._lock:
            if slot is None or self._closed:
                self.check_room()
            if slot is not None:
                slot.assign(job)
            self._waiting.setdefault(client, deque()).append(job)
            self._lock.notify()
        job.result.add_done_callback(lambda result: self._remove(job) if result.cancelled() else None)
        return job

    def _remove(self, job: Job) -> None:
        """Take a job out of the queue, if it is there."""
        with self._lock:
            queue = self._waiting.get(job.client)
            if queue and job in queue:
                queue.remove(job)
                if not queue:
                    del self._waiting[job.client]

    def _check_prompts(self, request: GenerateRequest) -> None:
        encode, new = self.predictor.generator.tokenizer.encode, request.options.max_new_tokens
        length = max(len(encode(prompt)) for prompt in request.prompts)
        room = self.predictor.model.prompt_room(new)
        if length > room:
            raise ValueError(
                f"the prompt has {length} tokens, and beside the image and {new} new ones there is room for "
                f"{max(room, 0)}; shorten it, or request fewer new tokens"
            )

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            self.workers.start()
            predictor = self._load()
            with contextlib.suppress(ValueError):  # a matcher alone generates no text
                self._batch = ContinuousBatch(predictor.model)
            with contextlib.suppress(ValueError):  # not every model comes with a matcher
                _ = predictor.matcher
            self._predictor = predictor
            self.loaded.set()
            log_event("ready")
            while self._step():
                pass
        except BaseException as error:  # all clients get an error, and the process may be restarted
            self.failure, self._closed = error, True
            self.on_failure()
        with self._lock:
            jobs = [job for queue in self._waiting.values() for job in queue]
            self._waiting.clear()
        if self._call is not None:
            jobs.append(self._call[0])
        for job in jobs + self._generating:
            job.fail(EngineError("the server is shutting down"))

    def _step(self) -> bool:
        """Start jobs, then one step of all texts and one slice of a call; waits where there are no jobs.

        Returns False when the engine is closed.
        """
        with self._lock:
            while not (self._waiting or self._generating or self._call or self._closed):
                self._lock.wait()
            if self._closed:
                return False
            jobs = self._take()
        self._start(jobs)
        self._step_texts()
        self._step_call()
        return True

    def _take(self) -> list[Job]:
        """The jobs that start now: the oldest of each client in turn, as long as they fit. One that is next and does
        not fit holds up all later ones of its kind."""
        for job in [job for queue in self._waiting.values() for job in queue]:
            if self._expired(job):
                self._remove(job)
        jobs: list[Job] = []
        rows, calling = self.running, self._call is not None
        held_up: set[bool] = set()  # kinds of which one waits for room: texts (True), calls (False)
        most = MAX_STARTS_BETWEEN_STEPS if self._generating else MAX_STARTS
        while True:
            before = len(jobs)
            for client in list(self._waiting):
                job = self._waiting[client][0]
                new_rows = job.work.rows if isinstance(job.work, GenerateRequest) else 0
                is_text = new_rows > 0
                fits = not rows or rows + new_rows <= self.limits.rows if is_text else not calling
                if not fits:
                    held_up.add(is_text)
                if is_text in held_up or len(jobs) == most:
                    continue
                rows, calling = rows + new_rows, calling or not is_text
                jobs.append(job)
                self._remove(job)
                if client in self._waiting:
                    self._waiting[client] = self._waiting.pop(client)  # its next turn is after the others'
            if len(jobs) == before:
                return jobs

    @staticmethod
    def _expired(job: Job) -> bool:
        """Whether nobody waits for a job any more: it was cancelled, or its deadline passed."""
        if job.result.done():
            return True
        if time.monotonic() > job.deadline:
            job.fail(TooLateError("the request took longer than the server allows"))
            return True
        return False

    def _start(self, jobs: list[Job]) -> None:
        generating = list[TextJob]()
        for job in jobs:
            if isinstance(job.work, GenerateRequest):
                generating.append((job, job.work))
            else:
                with self._failing_alone(job):
                    self._call = job, job.work(self.predictor)
        images: dict[bytes, EncodedImage] = {}
        self._together(
            generating, lambda texts: images.update(self._encode([text.image for _, text in texts]))
        )
        groups = defaultdict[tuple[int, bool], list[TextJob]](list)
        for job, request in generating:
            if not job.result.done():
                kind = request.options.max_new_tokens, images[request.image.key].prompt_cache is None
                groups[kind].append((job, request))
        for group in groups.values():
            self._together(group, lambda texts: self._join(texts, images))

    def _together(self, jobs: Sequence[TextJob], work: Callable[[Sequence[TextJob]], None]) -> None:
        """Do work for several jobs; where that fails, for each alone, so that none fails because of another."""
        if jobs:
            for (job, _), error in each_alone(jobs, work):
                self._fail(job, error)

    @contextlib.contextmanager
    def _failing_alone(self, job: Job) -> Iterator[None]:
        """Whatever is raised within ends this job, and nothing else."""
        try:
            yield
        except BaseException as error:
            self._fail(job, error)

    @torch.inference_mode()
    def _encode(self, images: list[PreparedImage]) -> dict[bytes, EncodedImage]:
        """The images for the language model, by key; each is encoded once. A new one has no context yet."""
        encoded: dict[bytes, EncodedImage] = {}
        fresh: dict[bytes, PreparedImage] = {}
        for image in images:
            if cached := image.encoded or self.cache.peek(image.key):
                encoded[image.key] = cached
            else:
                fresh[image.key] = image
        if fresh:
            pixels = torch.cat([image.pixels for image in fresh.values() if image.pixels is not None])
            pixels = self.predictor.generator.image_processor.fold(pixels).to(self.predictor.device)
            prefixes = self.predictor.model.embed_image(pixels).split(1)
            for (key, image), prefix in zip(fresh.items(), prefixes, strict=True):
                encoded[key] = EncodedImage(prefix.clone(), None, image.size)
        return encoded

    def _join(self, jobs: Sequence[TextJob], encoded: dict[bytes, EncodedImage]) -> None:
        """Jobs with the same max_new_tokens, whose images all have a context or all have none, join the batch."""
        assert self._batch is not None
        prompts = [(request, prompt) for _, request in jobs for prompt in request.prompts]
        keys = [request.image.key for request, _ in prompts]
        images = [encoded[key] for key in keys]
        prefix = torch.cat([image.prefix for image in images])
        caches = [image.prompt_cache for image in images if image.prompt_cache is not None]
        prompt_cache = concat_prompt_caches(caches) if caches else None
        ids, mask = self.predictor.generator.tokenizer.encode_batch([prompt for _, prompt in prompts])
        ids, mask = ids.to(prefix.device), mask.to(prefix.device)
        options = [request.options for request, _ in prompts]
        tops = [request.top_logprobs for request, _ in prompts]
        sequences, prefix_caches = self._batch.join(
            prefix, ids, mask, options, tops=tops, prompt_cache=prompt_cache
        )
        for key, image, cache in zip(keys, images, prefix_caches, strict=True):
            self.cache.put(key, replace(image, prompt_cache=cache) if image.prompt_cache is None else image)
        for job, request in jobs:
            job.sequences = [sequence for _ in request.prompts for sequence in sequences.pop(0)]
        self._generating += [job for job, _ in jobs]

    def _step_texts(self) -> None:
        if not self._generating or self._batch is None:
            return
        try:
            self.steps += 1
            self.tokens += len(self._batch)
            self._batch.choose()
            for job in self._generating:
                with self._failing_alone(job):
                    self._report(job)
            leaving = [job for job in self._generating if self._expired(job)]
            for sequence in (sequence for job in leaving for sequence in job.sequences):
                sequence.dropped = True
            self._generating = [job for job in self._generating if job not in leaving]
            self._batch.advance()
        except BaseException as error:  # not because of a text
            jobs, self._generating = self._generating, []
            self._batch = ContinuousBatch(self.predictor.model)
            for job in jobs:
                self._fail(job, error)

    def _report(self, job: Job) -> None:
        """After a step: its texts to a job's callback and, once all are done, to its result."""
        for sequence in job.sequences:
            if sequence.error is not None:
                raise sequence.error
        if job.on_step is not None:
            job.on_step([row for row in job.sequences if isinstance(row, SampledSequence)])
        if all(sequence.done for sequence in job.sequences):
            job.finish([output for sequence in job.sequences for output in self._outputs(sequence)])

    def _outputs(self, sequence: SampledSequence | BeamSequence) -> list[TextOutput]:
        if isinstance(sequence, SampledSequence):
            row = sequence
            return [self._output(row.ids, row.score, row.logprobs, row.finished, row.tops)]
        texts = sequence.generated
        assert texts is not None
        columns = zip(texts.ids, texts.scores, texts.token_logprobs, texts.finished, strict=True)
        return [self._output(*column, []) for column in columns]

    def _output(
        self, ids: list[int], score: float, logprobs: list[float], finished: bool, tops: list[TopLogprobs]
    ) -> TextOutput:
        text = self.predictor.generator.tokenizer.decode(ids[:-1] if finished else ids).strip()
        return TextOutput(GeneratedText(text, score, ids, logprobs), finished, tops)

    def _step_call(self) -> None:
        if self._call is None:
            return
        job, slices = self._call
        with self._failing_alone(job):
            try:
                if self._expired(job):
                    slices.close()
                else:
                    next(slices)
                    return
            except StopIteration as end:
                job.finish(end.value)
        self._call = None

    @staticmethod
    def _fail(job: Job, error: BaseException) -> None:
        """A request's own mistake (a ValueError) is reported to the client; anything else goes to the log alone."""
        failure = error
        if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
            log.error("the model failed", exc_info=error)
            failure = EngineError("the model failed")
            failure.__cause__ = error  # for the log entry under the request's id
        job.fail(failure)
