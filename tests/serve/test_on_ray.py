"""The deployment on Ray Serve: one replica of the default model, the same API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from serving import data_url

import blip2

ray = pytest.importorskip("ray", reason="the deployment on Ray is the extra blip2[ray]")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from ray import serve

    from blip2.serve.on_ray import app

    root = str(Path(__file__).parents[2])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 8517})
    serve.run(app({"queue": "16"}))
    yield "http://127.0.0.1:8517"
    serve.shutdown()
    ray.shutdown()


def test_the_same_api(url: str, predictor: blip2.Predictor, images: list[bytes]) -> None:
    with httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:
        while client.get("/ready").status_code != 200:
            pass
        answer = client.post("/caption", files={"image": images[0]})
        assert answer.json()["captions"][0]["text"] == predictor.caption(images[0])
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    parts = [{"type": "image_url", "image_url": {"url": data_url(images[2])}}]
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == predictor.caption(images[2], num_beams=1) and len(pieces) > 3


def test_unknown_arguments_are_refused() -> None:
    from blip2.serve.on_ray import app

    with pytest.raises(ValueError, match="nonsense"):
        app({"nonsense": "1"})
