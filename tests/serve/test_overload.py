"""Overload, clients that leave or dawdle, and shutting down. Loopback alone, bounded in count; no time is asserted but
the bounds that the server promises."""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import EXAMPLES, NAMES, Running, data_url, running_server
from starlette.requests import Request

import blip2
from blip2.serve import bodies
from blip2.serve.app import build_app
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits

ROOT = Path(__file__).parents[2]
HEAD = b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def overload(predictor: blip2.Predictor, images: list[bytes], count: int, threads: int) -> None:
    """Every accepted request gets its own answer, the others 503 with Retry-After; health answers all the while."""
    expected = [predictor.caption(image, num_beams=1) for image in images]
    assert len(set(expected)) > 2
    limits = Limits(queue=4, rows=4)
    with running_server(predictor, limits) as running, running.client() as client:

        def ask(i: int) -> int:
            answer = client.post(
                "/caption", files={"image": images[i % len(images)]}, data={"num_beams": "1"}
            )
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


@pytest.fixture
def full_server(predictor: blip2.Predictor) -> Iterator[Running]:
    """A server with room for one request, whose model is held up until the end."""
    entered, opened = threading.Event(), threading.Event()

    def gate(_: blip2.Predictor) -> Generator[None, None, None]:
        entered.set()
        assert opened.wait(60)
        yield

    with running_server(predictor, Limits(queue=1)) as running:
        running.engine.submit(gate)
        assert entered.wait(60)
        yield running
        opened.set()


def begin(running: Running, body: bytes, length: int) -> socket.socket:
    """A request of which so much has arrived."""
    sock = running.connect()
    sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % length + body)
    return sock


def test_too_many_requests_are_refused_at_once(full_server: Running, images: list[bytes]) -> None:
    """Nobody waits for the model, for another's image, or for the rest of the body, to hear that there is no room."""
    body = json.dumps({"image": data_url(images[0])}).encode()
    early = begin(full_server, body[:-1], len(body))
    with full_server.client() as client:
        while client.get("/health").status_code != 200:  # by now `early` is being read
            pass
    late = begin(full_server, body, len(body))
    until = time.monotonic() + 30
    while full_server.engine.waiting == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert full_server.engine.waiting == 1
    third = begin(full_server, b"", len(body))
    assert b" 503 " in third.recv(4096)  # before any of its body has come
    early.sendall(body[-1:])
    answer = early.recv(4096)
    assert b" 503 " in answer and b"retry-after: 1" in answer
    for sock in (early, late, third):
        sock.close()


def test_a_client_that_leaves_while_waiting_makes_room_at_once(
    full_server: Running, images: list[bytes]
) -> None:
    """The model is held up all the while."""
    body = json.dumps({"image": data_url(images[0])}).encode()
    until = time.monotonic() + 30

    def wait_for(waiting: int) -> None:
        while full_server.engine.waiting != waiting and time.monotonic() < until:
            time.sleep(0.01)
        assert full_server.engine.waiting == waiting

    for _ in range(3):
        sock = begin(full_server, body, len(body))
        wait_for(1)
        sock.close()
        wait_for(0)


def test_a_client_that_leaves_before_the_stream_begins_makes_room(
    full_server: Running, images: list[bytes]
) -> None:
    """A stream of which no piece was ever read frees its slot too."""
    engine = full_server.engine
    body = json.dumps({"image": data_url(images[0]), "stream": True}).encode()
    arriving: list[dict[str, Any]] = [
        {"type": "http.request", "body": body, "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return arriving.pop(0) if len(arriving) > 1 else arriving[0]

    async def send(_: Any) -> None:
        await asyncio.sleep(60)  # nothing is read

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/caption",
        "raw_path": b"/caption",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    # in a thread of its own: the browser's tests leave an event loop running in this one
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, build_app(engine, model="default")(scope, receive, send)).result()
    assert engine.waiting == 0 and len(arriving) == 1


def test_bodies_have_a_budget_together(predictor: blip2.Predictor) -> None:
    body = b"x" * 60_000
    with running_server(predictor, Limits(bodies_bytes=100_000)) as running, running.client() as client:

        def post() -> int:
            return client.post(
                "/caption", content=body, headers={"content-type": "application/json"}
            ).status_code

        assert post() == 400  # read, and no JSON
        slow = begin(running, body, 10 * len(body))
        until = time.monotonic() + 30
        while (status := post()) == 400 and time.monotonic() < until:
            time.sleep(0.01)
        assert status == 503
        slow.close()
        while (status := post()) == 503 and time.monotonic() < until:
            time.sleep(0.01)
        assert status == 400


def exchange(sock: socket.socket, request: bytes) -> bytes:
    """Send a request and read its whole answer; the head of it."""
    sock.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = sock.recv(65536)
        assert piece, "the server hung up"
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length
    while len(body) < int(length[1]):
        body += sock.recv(65536)
    return head


@pytest.mark.full
def test_refusals_are_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints how long the refused wait where twenty times as many ask at once as there are places, again and again
    without a rest; a time is nothing to assert."""
    server = start_process("--limit", "queue=4", "--limit", "rows=4")
    body = json.dumps({"image": data_url((EXAMPLES / NAMES[0]).read_bytes())}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    refused: list[float] = []
    counts = {b" 200 ": 0, b" 503 ": 0}

    def ask(_: int) -> None:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as sock:
            exchange(sock, request)
            for _ in range(20):
                began = time.perf_counter()
                head = exchange(sock, request)
                status = head[8:13]
                counts[status] += 1
                if status == b" 503 ":
                    assert b"retry-after: 1" in head
                    refused.append(1000 * (time.perf_counter() - began))

    with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)
    began = time.perf_counter()
    with ThreadPoolExecutor(80) as pool:
        list(pool.map(ask, range(80)))
    seconds = time.perf_counter() - began
    server.end()
    refused.sort()
    shares = ", ".join(f"p{share} {refused[len(refused) * share // 100]:.0f} ms" for share in (50, 90, 99))
    with capsys.disabled():
        print(f"\n{counts[b' 200 ']} answered, {len(refused)} refused in {seconds:.1f} s: {shares}")
    assert refused and counts[b" 200 "]


@pytest.mark.full
def test_long_overload_keeps_memory_flat(predictor: blip2.Predictor, images: list[bytes]) -> None:
    overload(predictor, images, count=400, threads=80)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    overload(predictor, images, count=2000, threads=80)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def leave(running: Running, image: bytes, after: int) -> None:
    """Ask for a long text as a stream, read so many bytes, and go."""
    payload = {"image": data_url(image), "stream": True, "max_new_tokens": 150, "min_new_tokens": 150}
    body = json.dumps(payload).encode()
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
    payload = {"image": data_url(images[0]), "max_new_tokens": 200, "min_new_tokens": 200, "num_beams": 1}
    with server.client() as client, pytest.raises(httpx2.ReadTimeout):
        client.post("/caption", json=payload, timeout=0.1)
    until = time.monotonic() + 30
    while server.engine.running and time.monotonic() < until:
        time.sleep(0.01)
    assert server.engine.running == 0 and server.engine.tokens - before < 200


@pytest.fixture(scope="module")
def impatient(predictor: blip2.Predictor) -> object:
    limits = Limits(header_seconds=1, body_seconds=1, idle_seconds=1, write_seconds=1)
    with running_server(predictor, limits) as running:
        yield running


def drip(sock: socket.socket, text: bytes) -> bytes:
    """Send a byte at a time until the server closes the connection; what it answered."""
    sock.settimeout(0.1)
    answer = b""
    for i in range(200):
        try:
            sock.send(text[i % len(text) : i % len(text) + 1])
            while piece := sock.recv(4096):
                answer += piece
            return answer
        except TimeoutError:
            continue
        except OSError:
            return answer
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
        answer = drip(sock, b"X-a: b\r\n" if b"\r\n\r\n" not in start else b" ")
    if b"Content-Length" in start and b"POST" in start:
        assert b" 408 " in answer
    with impatient.client() as client:
        assert client.get("/health").status_code == 200


def test_default_deadlines_close_slow_clients_within_ten_seconds() -> None:
    limits = Limits()
    assert max(limits.header_seconds, limits.body_seconds, limits.idle_seconds, limits.write_seconds) <= 10


def test_a_bodys_time_counts_from_the_beginning(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    """Not from the end of headers that were slow themselves."""
    began: list[float] = []

    async def body(request: Request) -> bytes:
        began.append(request.state.began)
        raise ApiError(400, "seen")

    monkeypatch.setattr(bodies, "read_body", body)
    with server.connect() as sock:
        for _ in range(2):  # on a connection that is kept, from the request's first byte
            before = time.monotonic()
            sock.sendall(HEAD[:30])
            time.sleep(0.05)
            between = time.monotonic()
            sock.sendall(HEAD[30:] + b"Content-Length: 0\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}}"):
                answer += sock.recv(4096)
            assert b" 400 " in answer and before - 60 < began.pop() < between


def test_a_client_that_reads_nothing_is_closed(impatient: Running) -> None:
    """Its answers are larger than every buffer on the way."""
    body = json.dumps({"texts": ["a rose"] * 64}).encode()
    one = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", impatient.port))
        sock.settimeout(30)
        closed = False
        for _ in range(300):
            try:
                sock.sendall(one % len(body) + body)
                time.sleep(0.1)
            except OSError:
                closed = True
                break
    assert closed


class Server:
    """A server process of its own: its address, and how to end it."""

    def __init__(self, process: subprocess.Popen[str], pid: int | None = None) -> None:
        self._process, self._pid = process, process.pid if pid is None else pid
        assert process.stderr
        for line in process.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = address[0]
                break
        else:
            pytest.fail(f"the server did not start: {process.wait()}")
        self._reading = threading.Thread(target=self._read, daemon=True)  # its log must not fill the pipe
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if "Finished server process" in line:
                return

    def end(self) -> int:
        """SIGTERM; the exit status."""
        os.kill(self._pid, signal.SIGTERM)
        output = self._process.stdout
        assert output
        status = self._process.wait(60) if self._pid == self._process.pid else int(output.readline())
        self._reading.join(60)
        return status


def spawn(*command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT
    )


def start_process(*options: str) -> Server:
    return Server(spawn("-m", "blip2", "serve", "--port", "0", *options))


def fork_another(parent: subprocess.Popen[str]) -> Server:
    """The next server of `forking_server.py`."""
    assert parent.stdin and parent.stdout
    parent.stdin.write("\n")
    parent.stdin.flush()
    return Server(parent, int(parent.stdout.readline()))


def sigterm_under_load(rounds: int, start: Callable[[], Server]) -> None:
    """Whatever was answered is right, and nothing that was being answered is lost."""
    images = [(EXAMPLES / name).read_bytes() for name in NAMES]
    model = blip2.load()
    expected = [model.caption(image) for image in images]
    answered = 0

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
        server = start()
        with (
            httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client,
            ThreadPoolExecutor(6) as pool,
        ):
            while client.get("/ready").status_code != 200:
                time.sleep(0.01)
            asking = [pool.submit(ask, client, i) for i in range(6)]
            while not any(future.running() for future in asking):
                time.sleep(0.01)
            time.sleep(0.1 + 37 * round_ % 100 / 200)
            status = server.end()
            outcomes = [outcome for future in asking for outcome in future.result(60)]
        assert status in (0, -signal.SIGTERM)
        assert set(outcomes) <= {"right", "late"}, set(outcomes)
        answered += outcomes.count("right")
    assert answered >= rounds


def test_sigterm_drains() -> None:
    sigterm_under_load(1, start_process)


@pytest.mark.full
def test_many_sigterms() -> None:
    parent = spawn(str(Path(__file__).parent / "forking_server.py"))
    sigterm_under_load(200, lambda: fork_another(parent))
    assert parent.stdin
    parent.stdin.close()
    assert parent.wait(60) == 0


def test_a_model_that_is_not_there_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2", "serve", "--port", "0", "--model", "./nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "nowhere" in done.stderr.splitlines()[-1]
