"""A process that decodes images for `workers`, which may end it at any moment.

It reads a request and a file, answers with pixels or with an error's text, and ends when its standard input does. While
it decodes, the system ends it after so much computing, and refuses it more memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

# Bytes of the file; the most pixels; seconds of computing; bytes of memory; the side and the filter of what is sent
# back, side 0 for the image as it is.
REQUEST = struct.Struct("<QQdQIi")
# What follows: pixels of a width and height, and the image's own width and height; or a text, and its length. WARNED
# comes before PIXELS.
ANSWER = struct.Struct("<5I")
READY, NOT_READY, PIXELS, REFUSED, NO_MEMORY, WARNED = range(6)

_BAND = (
    2**14
)  # pixels sent at a time: what is larger is made of new memory, which costs as much as copying it


def answer_requests() -> None:
    """Answer requests until there are no more."""
    # These are meant for the parent, which ends this process when it is time.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(OSError):  # the parent is gone
        try:
            _prepare()
        except Exception as error:
            _send_text(answers, NOT_READY, f"{type(error).__name__}: {error}")
            return
        answers.write(ANSWER.pack(READY, 0, 0, 0, 0))
        answers.flush()
        while len(head := sys.stdin.buffer.read(REQUEST.size)) == REQUEST.size:
            length, *request = REQUEST.unpack(head)
            _answer(answers, sys.stdin.buffer.read(length), *request)


def _prepare() -> None:
    """Import all that decoding needs; leave no trace of a crash; be the first to go where the machine lacks memory."""
    from PIL import AvifImagePlugin, Image

    import blip2.imagefiles.decode  # noqa: F401

    Image.init()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the address space of many would be over the limit
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _answer(
    answers: BinaryIO, content: bytes, max_pixels: int, seconds: float, memory: int, side: int, resample: int
) -> None:
    from PIL import Image

    from blip2.imagefiles.decode import ImageError, load_image
    from blip2.imagefiles.warned import naming, report_warnings

    told: list[str] = []
    try:
        with _limits(seconds, memory), naming(""), warnings.catch_warnings():
            report_warnings(told.append)
            image = load_image(content, max_pixels=max_pixels)
            size = image.size
            if side:
                image = image.resize((side, side), Image.Resampling(resample))
    except MemoryError:
        _send_text(answers, NO_MEMORY, "")
    except ImageError as error:
        text = str(error)
        if content[8:12] == b"WEBP" and error.__cause__ is not None:
            text += ", or decoding it takes too much memory"  # libwebp does not say which
        _send_text(answers, NO_MEMORY if _lacked_memory(error) else REFUSED, text)
    else:
        for text in told:
            _send_text(answers, WARNED, text[:1000])
        _send_pixels(answers, image, size)


@contextlib.contextmanager
def _limits(seconds: float, memory: int) -> Iterator[None]:
    """The process dies where this computes for longer, and gets no more memory than this. Not on Windows; on macOS no
    limit of memory."""
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(
            resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard)
        )
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether an image was refused for want of memory, as Pillow and its libraries say it."""
    while (error := error and error.__cause__) is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "memory" in text or text == "decoder error -9":
            return True
    return False


def _send_text(answers: BinaryIO, kind: int, text: str) -> None:
    content = text.encode(errors="replace")
    answers.write(ANSWER.pack(kind, len(content), 0, 0, 0) + content)
    answers.flush()


def _send_pixels(answers: BinaryIO, image: Image.Image, size: tuple[int, int]) -> None:
    from blip2.imagefiles.pixels import strips

    head = ANSWER.pack(PIXELS, *image.size, *size)
    for _, strip in strips(image, _BAND):  # a large image is not copied as a whole
        answers.write(head + strip.tobytes())  # the first with the head, so that the parent wakes once
        head = b""
    answers.flush()


if __name__ == "__main__":
    answer_requests()
