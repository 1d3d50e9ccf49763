"""A request's time holds whatever it waits for, and who leaves frees everything within a second."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import Running, data_url, running_server

import blip2
from blip2.generation.options import GenerationOptions
from blip2.serve.batching_engine import GenerateRequest
from blip2.serve.fetch import Fetcher
from blip2.serve.limits import Limits

SECONDS = 1
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"max_new_tokens": 200, "min_new_tokens": 200}


class Held:
    """What a request waits for until it is let go."""

    def __init__(self) -> None:
        self.entered, self._open = threading.Event(), threading.Event()

    def wait(self, *_: Any, **__: Any) -> Any:
        self.entered.set()
        self._open.wait(30)
        raise RuntimeError("let go")

    def let_go(self) -> None:
        self._open.set()


def sleeping_step(predictor: blip2.Predictor, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = predictor.model.language.decode_step
    monkeypatch.setattr(
        predictor.model.language, "decode_step", lambda *args: (time.sleep(seconds), step(*args))[1]
    )


@contextmanager
def waiting_for(
    what: str, running: Running, monkeypatch: pytest.MonkeyPatch, image: bytes
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make requests wait for something; the path and body of one that does."""
    held, body = Held(), {"image": data_url(image)}
    path = "/caption"
    match what:
        case "its image":
            monkeypatch.setattr(running.engine, "prepare_image", held.wait)
        case "a fetch":
            monkeypatch.setattr(Fetcher, "fetch", lambda *_: asyncio.sleep(30))
            body = {"image": "http://example.org/a.png"}
        case "the encoder":
            monkeypatch.setattr(running.engine.predictor.model, "embed_image", held.wait)
        case "another's slice":
            running.engine.submit(held.wait, client="other")
            assert held.entered.wait(30)
        case "another's slices":
            running.engine.submit(lambda _: iter(lambda: time.sleep(0.01), 1), client="other")  # type: ignore[arg-type,return-value]
            path, body = "/match", body | {"texts": ["a rose"]}
        case "another's long texts":  # no rows are free
            sleeping_step(running.engine.predictor, monkeypatch, 0.1)
            options = GenerationOptions(num_beams=4, **LONG)
            request = GenerateRequest(running.engine.prepare_image(image), ("",), options)
            running.engine.submit(request, client="other", deadline=time.monotonic() + 30)
            body |= {"num_beams": 4}
        case "a long text":
            sleeping_step(running.engine.predictor, monkeypatch, 0.1)
            body |= LONG
        case "a long stream":
            sleeping_step(running.engine.predictor, monkeypatch, 0.1)
            body |= LONG | {"stream": True}
        case "a stream that stands still":
            sleeping_step(running.engine.predictor, monkeypatch, 3)
            body |= LONG | {"stream": True}
        case "a whole chat":
            sleeping_step(running.engine.predictor, monkeypatch, 1.2)
            message = {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": body["image"]}}],
            }
            path, body = (
                "/v1/chat/completions",
                {"model": "default", "messages": [message], "max_tokens": 200, "stop": "qqq"},
            )
    try:
        yield path, body
    finally:
        held.let_go()
        monkeypatch.undo()


PHASES = (
    "its image", "a fetch", "the encoder", "another's slice", "another's slices", "another's long texts",
    "a long text", "a long stream", "a stream that stands still", "a whole chat",
)  # fmt: skip


def send(
    running: Running, path: str, body: dict[str, Any], *, all_of_it: bool = True, connection: bytes = b"close"
) -> socket.socket:
    content = json.dumps(body).encode()
    sock = running.connect()
    head = HEAD % path.encode() + b"Connection: %s\r\nContent-Length: %d\r\n\r\n" % (connection, len(content))
    sock.sendall(head + (content if all_of_it else content[:-1]))
    return sock


def rest_of(sock: socket.socket) -> bytes:
    answer = b""
    while piece := sock.recv(65536):
        answer += piece
    return answer


@pytest.fixture
def short(predictor: blip2.Predictor) -> Iterator[Running]:
    limits = Limits(request_seconds=SECONDS, body_seconds=30, header_seconds=30, rows=4)
    with running_server(predictor, limits, fetch_urls=True) as running:
        yield running


@pytest.mark.parametrize("what", PHASES)
def test_a_deadline_holds_whatever_a_request_waits_for(
    short: Running, images: list[bytes], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with waiting_for(what, short, monkeypatch, images[0]) as (path, body):
        began = time.monotonic()
        with send(short, path, body) as sock:
            answer = rest_of(sock)
        assert SECONDS - 0.1 < time.monotonic() - began < SECONDS + 2
        if body.get("stream") and b" 200 " in answer[:20]:
            assert (
                answer.count(b'data: {"error"') == 1
                and b"timeout_error" in answer
                and b"[DONE]" not in answer
            )
        else:
            assert b" 504 " in answer[:20] and b'"timeout_error"' in answer


def test_a_deadline_counts_from_the_first_byte(short: Running, images: list[bytes]) -> None:
    """A body that does not come, and one that comes late: there is no more time after it."""
    body = {"image": data_url(images[0]), **LONG}
    began = time.monotonic()
    with send(short, "/caption", body, all_of_it=False) as sock:
        time.sleep(0.7 * SECONDS)
        answer = rest_of(sock)
        assert b" 504 " in answer[:20] and time.monotonic() - began < SECONDS + 2


def test_a_client_that_does_not_read_is_cut_at_the_deadline(
    predictor: blip2.Predictor, images: list[bytes]
) -> None:
    limits = Limits(request_seconds=3, write_seconds=60)
    many = {"images": [data_url(images[0])] * 8, "texts": ["a rose"] * 64}
    with running_server(predictor, limits) as running, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", running.port))
        content = json.dumps(many).encode()
        one = HEAD % b"/embed" + b"Content-Length: %d\r\n\r\n" % len(content) + content
        sock.settimeout(12)
        began = time.monotonic()
        with pytest.raises(OSError):
            while True:  # pipelined, more than the system's buffers hold
                sock.sendall(one)
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("further", [b"", b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20])
@pytest.mark.parametrize("what", PHASES)
def test_who_leaves_frees_everything(
    predictor: blip2.Predictor,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    further: bytes,
) -> None:
    """Its place among the requests at work, in the queue, in the batch."""
    limits = Limits(requests=1, rows=4)
    with (
        running_server(predictor, limits, fetch_urls=True) as running,
        waiting_for(what, running, monkeypatch, images[0]) as (path, body),
        running.client() as client,
    ):
        until = time.monotonic() + 10
        with send(running, path, body, connection=b"keep-alive") as sock:
            while client.get("/v1/models").status_code != 503:
                assert time.monotonic() < until
            for _ in range(3):
                sock.sendall(further)
                time.sleep(0.1)
        left = time.monotonic()
        while client.get("/v1/models").status_code != 200:
            assert time.monotonic() < left + 1
        assert running.engine.waiting == 0
        engine = running.engine
        stuck = what in ("the encoder", "a stream that stands still", "another's slice", "a whole chat")
        while not stuck and any(job.client != "other" for job in [*engine._generating]):
            assert time.monotonic() < left + 1
