"""Overload, clients that leave or dawdle, and shutting down. Loopback alone, bounded in count; no time is asserted but
the bounds that the server promises."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from serving import EXAMPLES, NAMES, Running, data_url, run_server

import blip2
from blip2.serve.limits import Limits

ROOT = Path(__file__).parents[2]
HEAD = b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def overload(predictor: blip2.Predictor, images: list[bytes], count: int, threads: int) -> None:
    """Every accepted request gets its own answer, the others 503 with Retry-After; health answers all the while."""
    expected = [predictor.caption(image, beams=1) for image in images]
    assert len(set(expected)) > 2
    limits = Limits(queue=4, rows=4)
    with run_server(predictor, limits) as running, running.client() as client:

        def ask(i: int) -> int:
            answer = client.post("/caption", files={"image": images[i % len(images)]}, data={"beams": "1"})
            if answer.status_code == 200:
                assert answer.json()["captions"][0]["text"] == expected[i % len(images)]
            else:
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            return answer.status_code

        with ThreadPoolExecutor(threads) as pool:
            answers = pool.map(ask, range(count))
            assert client.get("/health").status_code == 200
            statuses = list(answers)
        assert statuses.count(200) + statuses.count(503) == count and 200 in statuses and 503 in statuses
        assert running.engine.running == running.engine.waiting == 0
        assert client.post("/caption", files={"image": images[0]}).status_code == 200  # and all is well again


def test_overload(predictor: blip2.Predictor, images: list[bytes]) -> None:
    overload(predictor, images, count=160, threads=80)  # 20 times what is running and waiting


@pytest.mark.full
def test_long_overload_keeps_memory_flat(predictor: blip2.Predictor, images: list[bytes]) -> None:
    overload(predictor, images, count=400, threads=80)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    overload(predictor, images, count=2000, threads=80)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def leave(running: Running, image: bytes, after: int) -> None:
    """Ask for a long text as a stream, read so many bytes, and go."""
    asked = {"image": data_url(image), "stream": True, "max_new_tokens": 150, "min_new_tokens": 150}
    body = json.dumps(asked).encode()
    with running.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        got = 0
        while got < after and (piece := sock.recv(4096)):
            got += len(piece)


def disconnects(running: Running, images: list[bytes], count: int) -> None:
    before = running.engine.tokens
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: leave(running, images[i % len(images)], after=i * 37 % 900), range(count)))
    until = time.monotonic() + 30
    while (running.engine.running or running.engine.waiting) and time.monotonic() < until:
        time.sleep(0.01)
    assert running.engine.running == running.engine.waiting == 0
    assert running.engine.tokens - before < count * 150 / 2  # most of the texts were never written


def test_clients_that_leave_free_their_slots(server: Running, images: list[bytes]) -> None:
    disconnects(server, images, 30)


@pytest.mark.full
def test_a_thousand_clients_leave(server: Running, images: list[bytes]) -> None:
    disconnects(server, images, 1000)


def test_a_client_that_does_not_stream_and_leaves_frees_its_slot(
    server: Running, images: list[bytes]
) -> None:
    before = server.engine.tokens
    asked = {"image": data_url(images[0]), "max_new_tokens": 200, "min_new_tokens": 200, "beams": 1}
    with server.client() as client, pytest.raises(httpx2.ReadTimeout):
        client.post("/caption", json=asked, timeout=0.1)
    until = time.monotonic() + 30
    while server.engine.running and time.monotonic() < until:
        time.sleep(0.01)
    assert server.engine.running == 0 and server.engine.tokens - before < 200


@pytest.fixture(scope="module")
def impatient(predictor: blip2.Predictor) -> object:
    limits = Limits(header_seconds=1, body_seconds=1, idle_seconds=1, write_seconds=1)
    with run_server(predictor, limits) as running:
        yield running


def drip(sock: socket.socket, text: bytes) -> bytes:
    """Send a byte at a time until the server has had enough; what it said."""
    sock.settimeout(0.1)
    said = b""
    for i in range(200):
        try:
            sock.send(text[i % len(text) : i % len(text) + 1])
            while piece := sock.recv(4096):
                said += piece
            return said
        except TimeoutError:
            continue
        except OSError:
            return said
    pytest.fail("the server never closed the connection")


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /caption HTTP/1.1\r\n",
        HEAD + b"Content-Length: 9999\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n",
    ],
    ids=["nothing", "headers", "body", "chunks", "a body nobody reads"],
)
def test_slow_clients_are_closed(impatient: Running, start: bytes) -> None:
    with impatient.connect() as sock:
        sock.sendall(start)
        said = drip(sock, b"X-a: b\r\n" if b"\r\n\r\n" not in start else b" ")
    if b"Content-Length" in start and b"POST" in start:
        assert b" 408 " in said
    with impatient.client() as client:
        assert client.get("/health").status_code == 200


def test_default_deadlines_close_slow_clients_within_ten_seconds() -> None:
    limits = Limits()
    assert max(limits.header_seconds, limits.body_seconds, limits.idle_seconds, limits.write_seconds) <= 10


def test_a_client_that_reads_nothing_is_closed(impatient: Running) -> None:
    """Its answers are larger than every buffer on the way."""
    body = json.dumps({"texts": ["a rose"] * 64}).encode()
    one = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", impatient.port))
        sock.settimeout(30)
        closed = False
        for _ in range(60):
            try:
                sock.sendall(one % len(body) + body)
                time.sleep(0.1)
            except OSError:
                closed = True
                break
    assert closed


def start_process(*options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "blip2", "serve", "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[0]
    pytest.fail(f"the server did not start: {process.wait()}")


def sigterm_under_load(rounds: int) -> None:
    """Whatever was answered is right, and nothing that was being answered is lost."""
    images = [(EXAMPLES / name).read_bytes() for name in NAMES]
    model = blip2.load()
    expected = [model.caption(image) for image in images]

    def ask(client: httpx2.Client, start: int) -> list[str]:
        outcomes = []
        for turn in range(50):
            place = (start + turn) % len(images)
            try:
                answer = client.post("/caption", files={"image": images[place]})
            except httpx2.TransportError as error:
                # refused, or closed before the request was taken: never in the middle of an answer
                return [*outcomes, "torn" if "incomplete" in str(error) else "late"]
            right = answer.status_code == 200 and answer.json()["captions"][0]["text"] == expected[place]
            outcomes.append("right" if right else f"{answer.status_code} {answer.text}")
        return outcomes

    for round_ in range(rounds):
        process, url = start_process()
        with (
            httpx2.Client(base_url=url, timeout=60, trust_env=False) as client,
            ThreadPoolExecutor(6) as pool,
        ):
            while client.get("/ready").status_code != 200:
                time.sleep(0.05)
            asking = [pool.submit(ask, client, i) for i in range(6)]
            time.sleep(0.3 + round_ % 5 / 10)
            process.send_signal(signal.SIGTERM)
            outcomes = [outcome for each in asking for outcome in each.result(60)]
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "right" in outcomes and set(outcomes) <= {"right", "late"}, set(outcomes)


def test_sigterm_drains() -> None:
    sigterm_under_load(1)


@pytest.mark.full
def test_many_sigterms() -> None:
    sigterm_under_load(20)


def test_a_model_that_is_not_there_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2", "serve", "--port", "0", "--model", "./nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "nowhere" in done.stderr.splitlines()[-1]
