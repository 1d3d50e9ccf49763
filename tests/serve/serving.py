"""A real server on loopback with the default model, in this process; nothing here reaches another host."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server is the extra blip2[serve]")

import httpx2
import openai

import blip2
from blip2.serve.app import build_app
from blip2.serve.batching_engine import Engine
from blip2.serve.keys import Keys
from blip2.serve.limits import Limits
from blip2.serve.run import uvicorn_server

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("rose.jpg", "two-rabbits.jpg", "four-pineapples.jpg", "triangle-and-square.jpg", "easy-vqa.png")


class Running:
    """A server that runs: its address, its engine."""

    def __init__(self, engine: Engine, port: int) -> None:
        self.engine, self.port, self.url = engine, port, f"http://127.0.0.1:{port}"

    def client(self, **headers: str) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def running_server(
    predictor: blip2.Predictor,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    *,
    fetch_urls: bool = False,
    log_contents: bool = False,
) -> Iterator[Running]:
    bounds = limits or Limits()
    engine = Engine(lambda: predictor, bounds)
    app = build_app(
        engine, model="default", keys=Keys(keys), fetch_urls=fetch_urls, log_contents=log_contents
    )
    server = uvicorn_server(app, host="127.0.0.1", port=0, limits=bounds)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not (server.started and engine.loaded.is_set()) and time.monotonic() < until:
        time.sleep(0.01)
    (listening,) = server.servers[0].sockets
    yield Running(engine, listening.getsockname()[1])
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and not engine.alive


def data_url(image: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()
