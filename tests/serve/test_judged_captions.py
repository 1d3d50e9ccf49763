"""Captions that may well be wrong, over HTTP: judged as in Python, whatever else is in the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import EXAMPLES, NAMES, Running, data_url, running_server

import blip2
from blip2.calibration import FILE, Calibration
from blip2.registry import DEFAULT_FOLDER
from blip2.text import CAPTION_PROMPT

ADVICE = "this looks unlike what the default model knows; try --model opt-2.7b-coco"
PATHS = [EXAMPLES / name for name in NAMES]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> blip2.Predictor:
    """The default model, which flags two or three of the five pictures."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(DEFAULT_FOLDER, folder)
    calibration = Calibration(2.0, 4.0, 0.5, -0.1, 0.5, ADVICE)
    (folder / FILE).write_text(json.dumps(calibration.to_dict()))
    captions = blip2.load(folder).caption(PATHS)
    ordered = sorted(caption.probability_right or 0.0 for caption in captions)
    threshold = (ordered[1] + ordered[2]) / 2
    (folder / FILE).write_text(json.dumps(Calibration(2.0, 4.0, 0.5, -0.1, threshold, ADVICE).to_dict()))
    return blip2.load(folder)


@pytest.fixture(scope="module")
def judging(calibrated: blip2.Predictor) -> Iterator[Running]:
    with running_server(calibrated) as running:
        yield running


def post(server: Running, path: str, **body: Any) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 1},
    {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "seed": 4, "num_return_sequences": 2, "temperature": 1.5},
    {"repetition_penalty": 1.5, "min_new_tokens": 7},
    {"prompt": "two", "num_beams": 1},
]


def test_captions_are_judged_as_in_python(
    judging: Running, calibrated: blip2.Predictor, images: list[bytes]
) -> None:
    requests = [(i, way) for way in WAYS for i in range(len(images))]
    with ThreadPoolExecutor(8) as pool:  # so that they are written in one batch
        answers = list(
            pool.map(
                lambda request: post(judging, "/caption", image=data_url(images[request[0]]), **request[1]),
                requests,
            )
        )
    warned = set()
    for (i, way), answer in zip(requests, answers, strict=True):
        expected = calibrated.caption(PATHS[i], **({"num_return_sequences": 1} | way))
        probabilities = [caption["probability_right"] for caption in answer["captions"]]
        assert probabilities == pytest.approx([text.probability_right for text in expected], abs=1e-3)
        doubtful = all(text.warnings for text in expected)
        assert answer.get("warnings") == ([ADVICE] if doubtful else None)
        warned.add(doubtful)
    assert warned == {True, False}


def test_answers_and_plain_models_are_not_judged(
    judging: Running, server: Running, images: list[bytes]
) -> None:
    for image in map(data_url, images):
        answer = post(judging, "/ask", image=image, question="what color is it?")
        assert "warnings" not in answer and "probability_right" not in answer["answers"][0]
        plain = post(server, "/caption", image=image)
        assert "warnings" not in plain and "probability_right" not in plain["captions"][0]


def test_the_last_event_of_a_stream_has_the_warning(
    judging: Running, calibrated: blip2.Predictor, images: list[bytes]
) -> None:
    for path, image in zip(PATHS, images, strict=True):
        with judging.client() as client:
            events = client.post("/caption", json={"image": data_url(image), "stream": True}).text
        *_, last, done = [line.removeprefix("data: ") for line in events.split("\n\n") if line]
        caption = calibrated.caption(path, num_beams=1)
        assert done == "[DONE]"
        assert json.loads(last).get("warnings", []) == list(caption.warnings)


def image_alone(image: bytes) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(image)}}]}]


def test_openai_clients_get_an_extra_field(
    judging: Running, calibrated: blip2.Predictor, images: list[bytes]
) -> None:
    client, said = judging.openai(), set()
    for path, image in zip(PATHS, images, strict=True):
        expected = list(calibrated.caption(path, num_beams=1).warnings)
        made = client.chat.completions.create(model="default", messages=image_alone(image))
        assert made.choices[0].message.content == calibrated.caption(path, num_beams=1)
        assert ((made.model_extra or {}).get("warnings") or []) == expected
        chunks = list(
            client.chat.completions.create(model="default", messages=image_alone(image), stream=True)
        )
        noted = [(chunk.model_extra or {}).get("warnings") or [] for chunk in chunks]
        assert noted[-1] == expected and not any(noted[:-1])
        plain = client.completions.create(
            model="default", prompt=CAPTION_PROMPT, extra_body={"image": data_url(image)}
        )
        assert ((plain.model_extra or {}).get("warnings") or []) == expected
        stopped = client.completions.create(
            model="default",
            prompt=CAPTION_PROMPT,
            extra_body={"image": data_url(image)},
            stop="never written",
        )
        assert ((stopped.model_extra or {}).get("warnings") or []) == expected
        said.add(bool(expected))
    assert said == {True, False}


def test_openai_chat_and_other_prompts_are_not_judged(judging: Running, images: list[bytes]) -> None:
    client = judging.openai()
    for image in images:
        messages = image_alone(image)
        messages[0]["content"].append({"type": "text", "text": "what is it?"})
        made = client.chat.completions.create(model="default", messages=messages)
        assert not (made.model_extra or {}).get("warnings")
        other = client.completions.create(
            model="default", prompt="two", extra_body={"image": data_url(image)}
        )
        assert not (other.model_extra or {}).get("warnings")


def test_a_warning_comes_after_that_of_the_request(
    judging: Running, calibrated: blip2.Predictor, images: list[bytes]
) -> None:
    flagged = next(i for i, path in enumerate(PATHS) if calibrated.caption(path, num_beams=1).warnings)
    messages = [{"role": "system", "content": "be brief"}, *image_alone(images[flagged])]
    made = judging.openai().chat.completions.create(model="default", messages=messages)
    warnings = (made.model_extra or {})["warnings"]
    assert len(warnings) == 2 and warnings[0].startswith("system") and warnings[1] == ADVICE
