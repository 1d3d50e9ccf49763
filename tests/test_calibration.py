"""How likely captions are right: the file, the formula, and that the formula gets the model's own probabilities."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip2
from blip2.calibration import FILE, LARGEST, Calibration, features
from blip2.images import load_image, to_pixels
from blip2.tensorfiles.errors import CheckpointError

ADVICE = "this looks unlike what the default model knows; try --model opt-2.7b-coco"
GIVEN = Calibration(1.5, 0.8, 0.25, -0.125, 0.5, ADVICE)


def calibrated(source: Path, folder: Path, calibration: Calibration = GIVEN) -> Path:
    """A copy of a model's folder with a calibration."""
    shutil.copytree(source, folder)
    (folder / FILE).write_text(json.dumps(calibration.to_dict()))
    return folder


def test_the_probability_is_that_of_a_logistic_regression() -> None:
    logprobs = [-0.5, -2.0, -0.25, -0.25]
    assert features(logprobs) == (-0.75, -2.0, 4)
    expected = 1 / (1 + math.exp(-(1.5 + 0.8 * -0.75 + 0.25 * -2.0 - 0.125 * 4)))
    assert GIVEN.probability_right(logprobs) == pytest.approx(expected)


def test_the_largest_numbers_and_impossible_tokens_make_a_probability() -> None:
    for sign in (1, -1):
        one = Calibration(sign * LARGEST, sign * LARGEST, -sign * LARGEST, sign * LARGEST, 0.5, ADVICE)
        assert 0 <= one.probability_right([-math.inf, -1.0]) <= 1
    assert replace(GIVEN, lowest=0, mean=0.0).probability_right([-math.inf]) == GIVEN.probability_right([0.0])


def test_a_caption_below_the_threshold_is_warned_of() -> None:
    assert GIVEN.warnings([0.499]) == (ADVICE,)
    assert GIVEN.warnings([0.5]) == ()
    assert GIVEN.warnings([0.2, 0.7]) == (), "one good caption of an image is enough"
    assert replace(GIVEN, threshold=0).warnings([0.0]) == ()


def test_a_run_is_told_how_many_images_it_is() -> None:
    assert GIVEN.advice_for(1, 1) == ADVICE
    assert GIVEN.advice_for(3, 2000) == (
        "3 of 2,000 images look unlike what the default model knows (captions may be wrong); "
        "try --model opt-2.7b-coco"
    )
    plain = replace(GIVEN, advice="this looks odd")
    assert plain.advice_for(1, 2) == "1 of 2 images look odd (captions may be wrong)"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps(GIVEN.to_dict() | {"later": "versions may have more"}))
    assert Calibration.load(tmp_path) == GIVEN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": None}, "caption must be an object of intercept, mean, lowest, length, threshold"),
        ({"caption": {"intercept": 1}}, "got intercept"),
        ({"caption": GIVEN.to_dict()["caption"] | {"slope": 1}}, "got intercept, .*slope"),
        ({"mean": "0.5"}, "mean must be a number from -1,000,000 to 1,000,000; got '0.5'"),
        ({"mean": True}, "mean must be a number"),
        ({"length": 1e7}, "length must be a number"),
        ({"intercept": None}, "intercept must be a number"),
        ({"threshold": 1.01}, "threshold must be a number from 0 to 1; got 1.01"),
        ({"threshold": -0.01}, "threshold must be"),
        ({"advice": None}, "advice must be a line"),
        ({"advice": "try something else"}, "that begins with 'this looks '; got 'try something else'"),
        ({"advice": "this looks odd\x1b[2J"}, "advice must be a line"),
        ({"advice": "this looks " + "very " * 100 + "odd"}, "up to 300 characters"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = GIVEN.to_dict()
    for name, value in changes.items():
        (content["caption"] if name in content["caption"] else content)[name] = value
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"calibration\.json: .*{message}"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"caption": {"mean": NaN}}', '{"advice": "a", "advice": "b"}'])
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json"):
        Calibration.load(tmp_path)


# --- captions of a calibrated model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> blip2.Predictor:
    return blip2.load(calibrated(generator_folder, tmp_path_factory.mktemp("calibrated") / "opt"))


@pytest.fixture(scope="module")
def t5(t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> blip2.Predictor:
    return blip2.load(calibrated(t5_folder, tmp_path_factory.mktemp("calibrated") / "t5"))


@torch.inference_mode()
def logprobs_of(model: blip2.Predictor, picture: Path, prompt: str, tokens: tuple[int, ...]) -> list[float]:
    """What one plain pass over prefix, prompt and text gives each token."""
    generator, ids = model.generator, torch.tensor([tokens])
    pixels = to_pixels([load_image(picture)], generator.image_processor)
    prompt_ids, mask = generator.tokenizer.encode_batch([prompt])
    start = model.model.config.language.decoder_start_token_id
    if start is None:
        text = torch.cat([prompt_ids, ids[:, :-1]], dim=1)
        logits = model.model(pixels, text)[:, -len(tokens) :]
    else:
        logits = model.model(
            pixels, prompt_ids, mask, torch.cat([torch.tensor([[start]]), ids[:, :-1]], dim=1)
        )
    chosen: Tensor = logits.float().log_softmax(-1)[0].gather(1, ids.T)[:, 0]
    return chosen.tolist()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.0},
    "sampled": {"do_sample": True, "seed": 5, "num_return_sequences": 3},
    "shaped": {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "seed": 5},
    "ruled": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    "ruled greedily": {"repetition_penalty": 1.8, "min_new_tokens": 6, "num_beams": 1},
    "cut": {"max_new_tokens": 3, "num_beams": 1},
}


@pytest.mark.parametrize("language", ["model", "t5"])
@pytest.mark.parametrize("way", WAYS)
def test_captions_are_judged_by_the_probabilities_of_a_plain_pass(
    request: pytest.FixtureRequest, pictures: list[Path], language: str, way: str
) -> None:
    judged: blip2.Predictor = request.getfixturevalue(language)
    options: dict[str, Any] = {"num_return_sequences": 1, "max_new_tokens": 9} | WAYS[way]
    for prompt in ("a photo of", "the red cat and"):
        for picture, captions in zip(pictures, judged.caption(pictures, prompt=prompt, **options)):
            for caption in captions:
                expected = logprobs_of(judged, picture, prompt, caption.tokens)
                assert caption.token_logprobs == pytest.approx(expected, abs=1e-4)
                assert caption.probability_right == pytest.approx(GIVEN.probability_right(expected), abs=1e-4)
                assert caption.warnings == GIVEN.warnings([caption.probability_right])


def test_captions_differ_in_what_is_said_of_them(model: blip2.Predictor, pictures: list[Path]) -> None:
    probabilities = [caption.probability_right for caption in model.caption(pictures)]
    assert len(set(probabilities)) > 1 and all(p is not None and 0 < p < 1 for p in probabilities)


def test_answers_and_uncalibrated_models_are_not_judged(
    model: blip2.Predictor, generator_folder: Path, pictures: list[Path]
) -> None:
    assert not hasattr(model.ask(pictures[0], "what is it?"), "probability_right")
    plain = blip2.load(generator_folder).caption(pictures[0])
    assert (plain.probability_right, plain.warnings) == (None, ())
    assert plain == model.caption(pictures[0])
    assert "probability_right" not in plain._repr_html_()


def test_a_caption_keeps_its_probability(model: blip2.Predictor, pictures: list[Path]) -> None:
    caption = model.caption(pictures[0])
    again = pickle.loads(pickle.dumps(caption))
    assert (again, again.probability_right, again.warnings) == (
        caption,
        caption.probability_right,
        caption.warnings,
    )
    assert f"probability_right {caption.probability_right:.3f}" in caption._repr_html_()


def test_a_broken_calibration_is_found_when_the_model_is_loaded(
    generator_folder: Path, matcher_folder: Path, tmp_path: Path
) -> None:
    folder = calibrated(generator_folder, tmp_path / "model")
    (folder / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"calibration\.json: caption must be"):
        blip2.load(folder)
    matcher = calibrated(matcher_folder, tmp_path / "matcher")
    (matcher / FILE).write_text("{}")  # a matcher writes no captions: nothing is read
    blip2.load(matcher)
