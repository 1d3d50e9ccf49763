"""Decoding strangers' files: in processes that are bounded in time and memory, and can be ended."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2.imagefiles import worker as protocol
from blip2.imagefiles.decode import MAX_PIXELS, ImageError, check_max_pixels, check_size

SECONDS = 4.5  # of computing for one image
# For one image of MAX_PIXELS or fewer, beside its file: a little more than may be needed by what its headers say.
MEMORY_BYTES = 492 * 2**20

COMMAND = (sys.executable, "-P", "-m", protocol.__name__)
# Where Python and its libraries are found; none of the user's keys.
_ENVIRONMENT = ("PATH", "SYSTEMROOT", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_PATIENCE = 3  # times as long as computing may take, by the clock: the processors may have other work
_START_SECONDS, _STARTS = 60.0, 2  # more than one, in case that something else ended the process
# A picture goes through a pipe in one piece where it has room: Linux gives 64 KiB, and this to whoever asks.
_PIPE_BYTES = 2**20

# Statuses of a process. They are minus the signals, which Windows has not.
_COMPUTED_TOO_LONG, _KILLED = (-getattr(signal, name, 1000) for name in ("SIGPROF", "SIGKILL"))
_CANCELLED, _OVERTIME, _CLOSED = "cancelled", "overtime", "closed"


@dataclass(frozen=True, eq=False)
class DecodedFile:
    """A file's image as RGB, made smaller where that was asked for. size: its own width and height."""

    image: Image.Image
    size: tuple[int, int]


class PendingImage:
    """A file on its way through the workers, which any thread may cancel.

    client: whose it is: clients share the workers, and the last free one is never a client's that has all others.
        None: there are no others.
    """

    def __init__(self, client: str | None = None) -> None:
        self.client = client
        self.ended = ""  # why, where it was
        self._turn = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def cancel(self) -> None:
        """No longer wait for a worker; end the one that decodes it. Without effect afterwards."""
        self._end(_CANCELLED)

    def _end(self, reason: str) -> None:
        with self._lock:
            self.ended = self.ended or reason
            if self._process is not None:
                self._process.kill()
        self._turn.set()

    @contextlib.contextmanager
    def _in(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """While a process works on it, ending it kills the process."""
        with self._lock:
            self._process = process
            if self.ended:
                process.kill()
        try:
            yield
        finally:
            with self._lock:
                self._process = None


class ImageWorkers:
    """Processes that decode images, started as they are needed. Safe to share between threads."""

    def __init__(self, count: int, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._count, self._seconds, self._memory = max(1, count), seconds, memory_bytes
        self._lock = threading.Condition()
        self._idle: list[_Worker] = []
        self._waiting: list[PendingImage] = []
        self._working: list[PendingImage] = []  # each has a worker
        self._clock = _Clock()
        self._closed = False

    def __enter__(self) -> ImageWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start all processes without waiting for them, so that the first images do not wait either.

        Raises:
            RuntimeError: they cannot be started.
        """
        with self._lock:
            while not self._closed and len(self._idle) + len(self._working) < self._count:
                self._idle.append(_Worker())

    def close(self) -> None:
        """End all processes. Images that they decode, or that wait for them, are given up."""
        with self._lock:
            self._closed = True
            for pending in self._waiting + self._working:
                pending._end(_CLOSED)
            for worker in self._idle:
                worker.end()
            self._idle.clear()
            self._lock.wait_for(lambda: not self._working, timeout=5)
        self._clock.stop()

    def load_image(
        self, content: bytes, *, resize: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
    ) -> Image.Image:
        """As `decode`, the image alone."""
        return self.decode(content, resize=resize, max_pixels=max_pixels).image

    def decode(
        self,
        content: bytes,
        *,
        resize: tuple[int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
        pending: PendingImage | None = None,
    ) -> DecodedFile:
        """Decode a file as `decode.load_image` does, as soon as a worker is free.

        Args:
            resize: side and filter, as Pillow numbers them, of the square that the image is squashed to.
            max_pixels: as for `load_image`.
            pending: to cancel it by, and whose it is.

        Raises:
            ImageError: as `load_image`; or it takes too much time or memory, or the decoder crashed.
            CancelledError: it was cancelled.
            RuntimeError: the processes cannot be started, or were closed.
        """
        name = f"an image of {len(content):,} bytes"
        check_size(len(content), name)
        check_max_pixels(max_pixels)
        memory = self._memory * max(MAX_PIXELS, max_pixels) // MAX_PIXELS
        pending = pending or PendingImage()
        self._wait_for_turn(pending)
        worker: _Worker | None = None
        try:
            worker = self._ready_worker(pending)
            with pending._in(worker.process), self._clock.limit(pending, _PATIENCE * self._seconds):
                return worker.decode(content, resize, max_pixels, self._seconds, memory)
        except (EOFError, OSError):  # the pipes' other end is gone
            raise self._failure(pending, worker, name) from None
        finally:
            self._give_back(pending, worker)

    def _failure(self, pending: PendingImage, worker: _Worker | None, name: str = "an image") -> Exception:
        """What is raised where an image was given up, or its worker is gone."""
        if pending.ended == _CANCELLED:
            return CancelledError(f"decoding {name} was cancelled")
        if pending.ended == _CLOSED:
            return RuntimeError("the processes that decode images were closed")
        if worker is None:
            return RuntimeError(
                f"the process that decodes images takes longer than {_START_SECONDS:g} s to start"
            )
        worker.end()
        if worker.lacked_memory:
            return ImageError(f"{name}: decoding it takes too much memory; make it smaller")
        if pending.ended == _OVERTIME or worker.status == _COMPUTED_TOO_LONG:
            return ImageError(
                f"{name}: decoding it takes longer than {self._seconds:g} s; save the image anew"
            )
        if worker.status == _KILLED:
            return ImageError(f"{name}: the process that decoded it was killed, not by blip2; try again")
        return ImageError(f"{name}: the decoder crashed on it; save the image anew")

    def _wait_for_turn(self, pending: PendingImage) -> None:
        with self._lock:
            if self._closed:
                pending._end(_CLOSED)
            self._waiting.append(pending)
            self._take_turns()
        has_turn = False
        try:
            pending._turn.wait()
            has_turn = not pending.ended
        finally:  # Ctrl-C too
            if not has_turn:
                with self._lock:
                    (self._waiting if pending in self._waiting else self._working).remove(pending)
                    self._take_turns()
                    self._lock.notify_all()
        if not has_turn:
            raise self._failure(pending, None)

    def _take_turns(self) -> None:
        """Give the free workers to those that wait, first to clients that have the fewest."""

        def had(pending: PendingImage) -> int:
            return sum(working.client == pending.client for working in self._working)

        most = max(1, self._count - 1)
        while len(self._working) < self._count and not self._closed:
            able = [pending for pending in self._waiting if pending.client is None or had(pending) < most]
            if not able:
                return
            pending = min(able, key=had)
            self._waiting.remove(pending)
            self._working.append(pending)
            pending._turn.set()

    def _ready_worker(self, pending: PendingImage) -> _Worker:
        """A worker that lives; a new one where there is none."""
        reason = ""
        for _ in range(_STARTS):
            worker = self._idle_worker() or _Worker()
            with pending._in(worker.process), self._clock.limit(pending, _START_SECONDS):
                reason = worker.wait_until_ready()
            if not reason:
                return worker
            if pending.ended:
                raise EOFError
        raise RuntimeError(f"the process that decodes images ends while it starts: {reason}")

    def _idle_worker(self) -> _Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.end()
        return None

    def _give_back(self, pending: PendingImage, worker: _Worker | None) -> None:
        if worker is not None and (pending.ended or not worker.sound):
            worker.end()
            worker = None
            if not self._closed:
                with contextlib.suppress(Exception):  # the next image says so
                    worker = _Worker()
        with self._lock:
            self._working.remove(pending)
            if worker is not None and self._closed:
                worker.end()
            elif worker is not None:
                self._idle.append(worker)
            self._take_turns()
            self._lock.notify_all()


class _Worker:
    """A process and the pipes to it, used by one thread at a time."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            home = str(Path(__file__).parents[2])
            places = [os.path.abspath(place) for place in sys.path if os.path.exists(place)]
            own = {
                "PYTHONPATH": os.pathsep.join(places if home in places else [home, *places]),
                "OPENBLAS_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "1",
            }
            self.process = subprocess.Popen(
                COMMAND,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept | own,
                cwd=os.sep,  # the parent's may be gone
                start_new_session=True,  # Ctrl-C is the parent's
            )
        except OSError as error:
            raise RuntimeError(f"the process that decodes images cannot be started: {error}") from error
        with contextlib.suppress(ImportError, AttributeError, OSError):  # not every system has it
            import fcntl

            for pipe in (self.process.stdin, self.process.stdout):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[arg-type]
        self.sound = True  # it waits for a request
        self.lacked_memory = False
        self.status: int | None = None  # with which it ended by itself
        self._ready = False

    def wait_until_ready(self) -> str:
        """Empty, or why it will never be; then it has ended."""
        text = ""
        with contextlib.suppress(EOFError, OSError):
            if not self._ready:
                kind, _, text = self._read_answer()
                self._ready = kind == protocol.READY
            if self._ready:
                return ""
        self.end()
        return text or f"status {self.process.returncode}"

    def decode(
        self, content: bytes, resize: tuple[int, int] | None, max_pixels: int, seconds: float, memory: int
    ) -> DecodedFile:
        """Raises EOFError or OSError where the process is gone, or does not answer as it should."""
        self.sound = False
        side, resample = resize or (0, 0)
        head = protocol.REQUEST.pack(len(content), max_pixels, seconds, memory, side, resample)
        self._write(head + content)  # at once, so that the process wakes once
        kind, (width, height, *size), text = self._read_answer()
        if (warned := text) and kind == protocol.WARNED:
            kind, (width, height, *size), text = self._read_answer()
        self.lacked_memory = kind == protocol.NO_MEMORY
        if kind == protocol.REFUSED:
            self.sound = True
            raise ImageError(text)
        if kind != protocol.PIXELS or not 0 < width * height <= max(max_pixels, side * side):
            raise EOFError
        image = Image.frombytes("RGB", (width, height), self._read(3 * width * height))
        self.sound = True
        if warned:  # here, where it is known which image this is
            with contextlib.suppress(UserWarning):  # warnings may be errors to the caller; the image is sound
                warnings.warn_explicit(warned, UserWarning, "PIL", 1, module="PIL")
        return DecodedFile(image, (size[0], size[1]))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_answer(self) -> tuple[int, list[int], str]:
        kind, *numbers = protocol.ANSWER.unpack(self._read(protocol.ANSWER.size))
        if kind in (protocol.READY, protocol.PIXELS):
            return kind, numbers, ""
        return kind, numbers, self._read(min(numbers[0], 2**16)).decode(errors="replace")

    def _write(self, content: bytes) -> None:
        assert self.process.stdin is not None
        left = memoryview(content)
        try:
            while left:
                left = left[self.process.stdin.write(left) :]
        except BrokenPipeError:
            raise self._gone() from None

    def _read(self, size: int) -> bytearray:
        answers, content = self.process.stdout, bytearray(size)
        assert isinstance(answers, io.FileIO)
        left = memoryview(content)
        while left:
            count = answers.readinto(left)
            if not count:
                raise self._gone()
            left = left[count:]
        return content

    def _gone(self) -> EOFError:
        self.status = self.process.wait()
        return EOFError()


class _Clock:
    """Ends images whose time is up, on a thread that starts with the first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: dict[PendingImage, float] = {}
        self._next = math.inf  # when it looks again
        self._thread: threading.Thread | None = None
        self._stopped = False

    @contextlib.contextmanager
    def limit(self, pending: PendingImage, seconds: float) -> Iterator[None]:
        """Within this an image has so much time."""
        end = time.monotonic() + seconds
        with self._changed:
            self._ends[pending] = end
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="blip2 image clock", daemon=True)
                self._thread.start()
            elif end < self._next:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._ends[pending]

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                for pending in [pending for pending, end in self._ends.items() if end <= now]:
                    pending._end(_OVERTIME)
                self._next = min((end for end in self._ends.values() if end > now), default=math.inf)
                self._changed.wait(None if self._next == math.inf else self._next - now)
