"""The plug-in for lmms-eval, if that is installed: it is not a requirement."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import blip2

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")


def request(place: int, question: str = "what is it?", images: int = 1, **options: Any) -> Any:
    return SimpleNamespace(
        args=(question, options, lambda document: [Image.open(document)] * images, place, "task", "test")
    )


def test_the_harness_finds_it_and_gets_our_answers(generator_folder: Path, pictures: list[Path]) -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from blip2.evaluate.lmms import MANIFEST

    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    plug_in = registry.get_model_class("blip2").create_from_arg_string(
        f"pretrained={generator_folder}", {"device": "cpu", "batch_size": "2"}
    )
    plug_in.task_dict = {"task": {"test": pictures}}
    model = blip2.load(generator_folder)
    requests = [request(i, max_new_tokens=6, num_beams=3, temperature=0) for i in range(len(pictures))]
    expected = model.ask(pictures, "what is it?", max_new_tokens=6, num_beams=3)
    assert plug_in.generate_until(requests) == [answer.strip() for answer in expected]
    letter = expected[0].strip()[1]
    (cut,) = plug_in.generate_until([request(0, max_new_tokens=6, num_beams=3, until=[letter])])
    assert cut == expected[0].strip().split(letter)[0].strip()
    samples = [request(0, max_new_tokens=6, do_sample=True, temperature=2.0)]
    assert plug_in.generate_until(samples) == plug_in.generate_until(samples)
    with pytest.raises(ValueError, match="2 images at once"):
        plug_in.generate_until([request(0, images=2)])
    with pytest.raises(ValueError, match="differ"):
        plug_in.generate_until([request(0), request(1, num_beams=2)])
    with pytest.raises(NotImplementedError, match="generate_until"):
        plug_in.loglikelihood([])
