"""One server for the tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the server is the extra blip2[serve]")

from serving import EXAMPLES, NAMES, Running, running_server

import blip2


@pytest.fixture(scope="session")
def predictor() -> blip2.Predictor:
    return blip2.load()


@pytest.fixture(scope="session")
def server(predictor: blip2.Predictor) -> Iterator[Running]:
    with running_server(predictor) as running:
        yield running


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    return [(EXAMPLES / name).read_bytes() for name in NAMES]
