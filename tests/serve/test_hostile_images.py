"""Files that keep a decoder busy: who sends them gets an error, and everybody else an answer meanwhile."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from serving import EXAMPLES, Running, data_url, running_server
from test_overload import start_process

import blip2
from blip2.imagefiles import workers
from blip2.serve.batching_engine import Engine
from blip2.serve.limits import Limits

UNCHECKED = """
from blip2.imagefiles import cost, decode, worker
decode.check_file = lambda content: cost.Cost()
worker.answer_requests()
"""
THEM, US = {"authorization": "Bearer them"}, {"authorization": "Bearer us"}


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times: each costs as much as the whole picture."""
    Image.new("RGB", (4000, 4000), "red").save(file := io.BytesIO(), "JPEG", progressive=True)
    plain = file.getvalue()
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * count + plain[-2:]


HOSTILE = scans(40_000)  # 3 MB, minutes
ROSE = (EXAMPLES / "rose.jpg").read_bytes()


@pytest.fixture(scope="module")
def attacked(predictor: blip2.Predictor) -> Iterator[Running]:
    """A server whose image workers check no file before they decode it; a request has 20 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "COMMAND", (sys.executable, "-P", "-c", UNCHECKED))
        with running_server(predictor, Limits(request_seconds=20), keys=("them", "us")) as running:
            yield running


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_free(running: Running) -> bool:
    pool = running.engine.workers
    return not pool._working and not pool._waiting


def test_others_are_answered_meanwhile(attacked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacked.engine.workers, "_seconds", 2.5)
    with attacked.client(**THEM) as them, attacked.client(**US) as us, ThreadPoolExecutor(4) as threads:
        attacks = [threads.submit(them.post, "/caption", files={"image": HOSTILE}) for _ in range(4)]
        wait_until(lambda: len(attacked.engine.workers._working) == 2, 5)
        answers = [us.post("/caption", files={"image": ROSE + bytes([i])}) for i in range(4)]
        assert not any(attack.done() for attack in attacks)
        assert [answer.status_code for answer in answers] == [200] * 4
        for attack in attacks:
            error = attack.result(60).json()["error"]
            assert error["code"] in ("invalid_image", "timeout")
    wait_until(lambda: is_free(attacked), 2)


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/caption", {"files": {"image": HOSTILE}}),
        ("/match", {"files": {"image": HOSTILE}, "data": {"texts": "a rose"}}),
        ("/embed", {"files": {"images": HOSTILE}}),
        ("/explain", {"files": {"image": HOSTILE}}),
        ("/v1/completions", {"json": {"model": "default", "prompt": "a", "image": data_url(HOSTILE)}}),
    ],
)
def test_every_door_bounds_the_time(
    attacked: Running, monkeypatch: pytest.MonkeyPatch, path: str, payload: dict[str, object]
) -> None:
    monkeypatch.setattr(attacked.engine.workers, "_seconds", 0.5)
    with attacked.client(**THEM) as them:
        answer = them.post(path, **payload)  # type: ignore[arg-type]
    assert answer.status_code == 400 and "takes longer than 0.5 s" in answer.json()["error"]["message"]


def test_who_leaves_frees_his_worker_within_a_second(attacked: Running) -> None:
    head = (
        b"POST /caption HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer them\r\nContent-Length: %d\r\n"
    )
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + HOSTILE
        + b"\r\n--x--\r\n"
    )
    sockets = [attacked.connect() for _ in range(4)]
    for socket in sockets:
        socket.sendall(head % len(body) + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + body)
    pool = attacked.engine.workers
    wait_until(lambda: len(pool._working) == 2 and len(pool._waiting) == 2, 5)
    for socket in sockets:
        socket.close()
    wait_until(lambda: is_free(attacked), 1)


def test_a_deadline_holds_while_an_image_is_decoded(
    predictor: blip2.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-P", "-c", UNCHECKED))
    with running_server(predictor, Limits(request_seconds=1)) as running, running.client() as client:
        begun = time.monotonic()
        answer = client.post("/caption", files={"image": HOSTILE})
        assert answer.status_code == 504 and time.monotonic() - begun < 3
        wait_until(lambda: is_free(running), 1)


def test_a_server_without_workers_does_not_start(
    predictor: blip2.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "COMMAND", ("/no/such/python",))
    engine = Engine(lambda: predictor, Limits())
    engine.start()
    wait_until(lambda: engine.failure is not None, 10)
    engine.close()
    assert "/no/such/python" in str(engine.failure) and not engine.alive


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_server(number: signal.Signals) -> None:
    server = start_process()

    def started() -> list[str]:  # each thread has its own
        return " ".join(
            path.read_text() for path in Path(f"/proc/{server._pid}/task").glob("*/children")
        ).split()

    wait_until(lambda: len(started()) == 3, 30)
    children = started()
    os.kill(server._pid, number)
    server._process.wait(60)
    wait_until(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children), 5)
