"""Honest clients beside hostile ones: each honest request gets exactly its own answer."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Running, data_url, running_server

import blip2
from blip2.serve.limits import Limits

HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\n"
NUMBERS = (
    1e308,
    -1e308,
    1e-308,
    10**400,
    2**63,
    -(2**63),
    1000,
    50,
    -50,
    0,
    -1,
    1e9,
    10,
    200,
    True,
    "1",
    None,
)
OPTIONS = (
    "length_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "seed", "num_beams", "max_new_tokens",
    "min_new_tokens", "no_repeat_ngram_size", "num_return_sequences", "eos_token_id",
)  # fmt: skip
JSON = (
    b"[" * 100_000, b'{"a":' * 50_000, b'{"image": NaN}', b'{"image": 1e999}', b"\xff\xfe{", b"nul", b"",
    b'{"image": "\\ud800"}', b'{"image": "x", "image": "y"}', b'"' + b"a" * 10**6, b"9" * 10**6,
)  # fmt: skip


def post(
    running: Running, path: str, body: bytes, kind: str = "application/json", *, leave: float = 0
) -> bytes:
    """Send a request; the beginning of its answer, for which `leave` is how long the client waits, if not for ever."""
    with running.connect() as sock:
        sock.sendall(HEAD % (path.encode(), kind.encode()) + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        if leave:
            time.sleep(leave)
            return b""
        return sock.recv(65536)


def as_json(image: bytes, **more: Any) -> bytes:
    return json.dumps({"image": data_url(image)} | more).encode()


def bad_numbers(running: Running, image: bytes, chance: random.Random) -> None:
    chosen = {name: chance.choice(NUMBERS) for name in chance.sample(OPTIONS, chance.choice([1, 1, 2, 3]))}
    chosen |= {"early_stopping": chance.choice([True, False, "never"])}
    post(running, chance.choice(["/caption", "/ask"]), as_json(image, **chosen))


def legal_but_heavy(running: Running, image: bytes, chance: random.Random) -> None:
    options = {
        "num_beams": 10,
        "max_new_tokens": 150,
        "min_new_tokens": 150,
        "length_penalty": chance.choice([50, -50]),
    }
    post(running, "/caption", as_json(image, **options), leave=0.3)


def huge_body(running: Running, image: bytes, chance: random.Random) -> None:
    post(running, "/caption", as_json(image * chance.choice([50, 500])))


def claimed_body(running: Running, image: bytes, chance: random.Random) -> None:
    with running.connect() as sock:
        sock.sendall(HEAD % (b"/caption", b"application/json") + b"Content-Length: %d\r\n\r\n" % 10**12)
        sock.recv(4096)


def early_disconnect(running: Running, image: bytes, chance: random.Random) -> None:
    stream = chance.random() < 0.5
    body = as_json(
        image, max_new_tokens=100, min_new_tokens=100, **({"stream": True} if stream else {"num_beams": 3})
    )
    post(running, "/caption", body, leave=chance.choice([0.001, 0.02, 0.1]))


def slow_body(running: Running, image: bytes, chance: random.Random) -> None:
    with running.connect() as sock:
        sock.sendall(HEAD % (b"/caption", b"application/json") + b"Content-Length: 9999\r\n\r\n")
        for _ in range(chance.choice([2, 6])):
            sock.sendall(b" ")
            time.sleep(0.1)


def damaged_image(running: Running, image: bytes, chance: random.Random) -> None:
    damaged = bytearray(image[: chance.randrange(len(image))])
    for _ in range(20):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    post(running, "/caption", as_json(bytes(damaged)))


def long_prompt(running: Running, image: bytes, chance: random.Random) -> None:
    text = chance.choice(
        ["a " * 4000, "\U0001f480" * 2000, "x" * 8000, "a photo of " + "many things and " * 12, "\0\x1b" * 99]
    )
    post(running, "/caption", as_json(image, prompt=text, max_new_tokens=20))


def weird_json(running: Running, image: bytes, chance: random.Random) -> None:
    post(running, chance.choice(["/caption", "/v1/chat/completions", "/match"]), chance.choice(JSON))


def weird_form(running: Running, image: bytes, chance: random.Random) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = chance.choice([part * 500, part + image, part + image + b"\r\n--b", b"--b" * 10_000, part[:20]])
    post(running, "/caption", body, "multipart/form-data; boundary=b")


def no_http(running: Running, image: bytes, chance: random.Random) -> None:
    with running.connect() as sock:
        sock.sendall(chance.randbytes(300) + b"\r\n\r\n")
        sock.recv(4096)


def pipelined(running: Running, image: bytes, chance: random.Random) -> None:
    body = base64.b64encode(image)
    one = HEAD % (b"/caption", b"application/json") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with running.connect() as sock:
        sock.sendall(one * 10)
        sock.recv(4096)


HOSTILE: tuple[Callable[[Running, bytes, random.Random], None], ...] = (
    bad_numbers, legal_but_heavy, huge_body, claimed_body, early_disconnect, slow_body, damaged_image, long_prompt,
    weird_json, weird_form, no_http, pipelined,
)  # fmt: skip


def honest_beside_hostile(predictor: blip2.Predictor, images: list[bytes], count: int, clients: int) -> None:
    ways: list[dict[str, Any]] = [{"num_beams": 1}, {}, {"num_beams": 3, "max_new_tokens": 12}]
    cases: list[tuple[tuple[str, dict[str, Any]], str, str]] = []
    for image in images:
        for way in ways:
            body, question = {"image": data_url(image)} | way, "what is it?"
            cases.append((("/caption", body), "captions", predictor.caption(image, **way)))
            body = body | {"question": question}
            cases.append((("/ask", body), "answers", predictor.ask(image, question, **way)))
    with (
        running_server(predictor, Limits(body_seconds=2, header_seconds=2)) as running,
        running.client() as client,
    ):
        done, attacks = threading.Event(), list[str]()

        def attack(seed: int) -> None:
            chance = random.Random(seed)
            while not done.is_set():
                hostile = chance.choice(HOSTILE)
                attacks.append(hostile.__name__)
                try:
                    hostile(running, chance.choice(images), chance)
                except OSError:  # the server has hung up
                    continue

        def ask(i: int) -> str | None:
            (path, body), key, expected = cases[i % len(cases)]
            answer = client.post(path, json=body)
            if answer.status_code == 200 and answer.json()[key][0]["text"] == expected:
                return None
            return f"{answer.status_code} {answer.text[:300]}, expected {expected}"

        with ThreadPoolExecutor(clients) as attackers, ThreadPoolExecutor(2) as honest:
            for seed in range(clients):
                attackers.submit(attack, seed)
            try:
                failures = [failure for failure in honest.map(ask, range(count)) if failure]
            finally:
                done.set()
        assert failures == []
        assert len(attacks) > count // 10 and client.get("/ready").status_code == 200
        until = time.monotonic() + 10
        while running.engine.running or running.engine.waiting:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_honest_requests_beside_hostile_ones(predictor: blip2.Predictor, images: list[bytes]) -> None:
    honest_beside_hostile(predictor, images, count=24, clients=4)


@pytest.mark.full
def test_500_honest_requests_beside_hostile_ones(predictor: blip2.Predictor, images: list[bytes]) -> None:
    honest_beside_hostile(predictor, images, count=500, clients=8)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.__name__)
def test_after_every_kind_of_attack_all_is_well(
    server: Running, predictor: blip2.Predictor, images: list[bytes], hostile: Callable[..., None]
) -> None:
    expected = predictor.caption(images[0])
    for seed in range(3):
        try:
            hostile(server, images[1], random.Random(seed))
        except OSError:
            continue
    with server.client() as client:
        answer = client.post("/caption", json={"image": data_url(images[0])})
        assert answer.json()["captions"][0]["text"] == expected
