"""The server with a model that reads images through a stem: the answers of the Python API, the stem on its thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server is the extra blip2[serve]")

from serving import Running, data_url, running_server
from tiny_stem import IMAGE_PX, tiny_processor, with_stem
from torch import Tensor, nn

import blip2
from blip2.generation.options import GenerationOptions
from blip2.serve.batching_engine import GenerateRequest


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, generator_folder: Path, matcher_folder: Path
) -> blip2.Predictor:
    base = tmp_path_factory.mktemp("stem")
    processor = tiny_processor(base / "made")
    generator = with_stem(generator_folder, base / "model", processor)
    matcher = with_stem(matcher_folder, base / "matcher", processor, beside="model")
    return blip2.load(generator, device="cpu", matcher=matcher)


@pytest.fixture(scope="module")
def server(model: blip2.Predictor) -> Iterator[Running]:
    with running_server(model) as running:
        yield running


@pytest.fixture
def reads(model: blip2.Predictor) -> Iterator[list[tuple[str, int]]]:
    """The thread of every reading, and how many pictures it had."""
    counts: list[tuple[str, int]] = []
    stem = model.generator.image_processor.stem
    assert stem is not None

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        counts.append((threading.current_thread().name, len(out)))

    registered = stem.network.register_forward_hook(hook)
    yield counts
    registered.remove()


def test_requests_give_what_the_python_api_gives(
    server: Running, model: blip2.Predictor, pictures: list[Path], reads: list[tuple[str, int]]
) -> None:
    content = pictures[0].read_bytes()
    image = data_url(content)
    with server.client() as client:

        def post(path: str, **body: object) -> dict[str, object]:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        caption = post("/caption", image=image)
        answered = post("/ask", image=image, question="what is it?")
        explained = post("/explain", image=image)
        matched = post("/match", image=image, texts=["a cat", "two dogs"])
        embedded = post("/embed", images=[image])
    assert {name for name, _ in reads} == {"blip2 engine"}
    # a caption, whose image the cache keeps for the question; an explanation; a match; an embedding
    assert [count for _, count in reads] == [1, 1, 1, 1]

    explanation = model.explain(content)
    assert caption["captions"][0]["text"] == model.caption(content) == explained["text"]  # type: ignore[index]
    assert answered["answers"][0]["text"] == model.ask(content, "what is it?")  # type: ignore[index]
    assert [word["text"] for word in explained["words"]] == [w.text for w in explanation.words]  # type: ignore[attr-defined]
    for word, ours in zip(explained["words"], explanation.words, strict=True):  # type: ignore[call-overload]
        assert word["heat"] == pytest.approx(ours.heat, abs=1e-3)
    for match, one in zip(matched["matches"], model.match(content, ["a cat", "two dogs"]), strict=True):  # type: ignore[call-overload]
        assert match["probability"] == pytest.approx(one.probability, abs=1e-3)
    assert embedded["images"][0] == pytest.approx(model.embed(content).numpy(), abs=1e-3)  # type: ignore[index]


def test_pictures_are_read_in_the_batch_of_the_engine(
    server: Running, model: blip2.Predictor, pictures: list[Path], reads: list[tuple[str, int]]
) -> None:
    engine = server.engine
    images = [engine.prepare_image(path.read_bytes()) for path in pictures[1:]]
    assert not reads and {image.pixels.shape for image in images if image.pixels is not None} == {
        (1, 3, IMAGE_PX, IMAGE_PX)
    }
    encoded = engine._encode(images)
    assert [count for _, count in reads] == [4] and len(encoded) == 4
    jobs = [
        engine.submit(GenerateRequest(i, ("a photo of",), GenerationOptions(num_beams=5))) for i in images
    ]
    texts = [job.result.result(60)[0].text for job in jobs]
    assert texts == model.caption(pictures[1:])
