"""Ranking answers: the same log-probabilities as reading image, question and answer in full, each alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import blip2
from benchmarks.ranking import one_by_one

ANSWERS = ["yes", "no", "two dogs", "the red cat", "a", "Question", "red cat and two dogs", "cat"]


@pytest.mark.parametrize("kind", ["generator_folder", "t5_folder"])
def test_log_probabilities_are_those_of_each_answer_alone(
    kind: str, request: pytest.FixtureRequest, pictures: list[Path]
) -> None:
    model = blip2.load(request.getfixturevalue(kind))
    questions = ["what is it?", "is the cat red and what of the dogs?", "a"]
    for images in (pictures[:3], [model.encode(picture) for picture in pictures[:3]]):
        ranked = model.rank(images, questions, ANSWERS)
        for picture, question, answers in zip(pictures, questions, ranked, strict=False):
            assert sorted(answer.answer for answer in answers) == sorted(ANSWERS)
            assert [answer.logprob for answer in answers] == sorted(
                (answer.logprob for answer in answers), reverse=True
            )
            assert sum(answer.probability for answer in answers) == pytest.approx(1, abs=1e-5)
            reference = one_by_one(model, picture, question, [answer.answer for answer in answers])
            assert [answer.logprob for answer in answers] == pytest.approx(reference, abs=1e-4)


def test_rows_at_a_time_change_nothing(generator_folder: Path, pictures: list[Path]) -> None:
    from blip2.generation.ranking import answer_logprobs

    model = blip2.load(generator_folder)
    encoded = model.encode(pictures[0])
    ids, mask = model.generator.tokenizer.encode_batch(["Question: what is it? Answer:"])
    answers = [model.generator.tokenizer.encode(" " + answer, frame=False) for answer in ANSWERS]
    whole = answer_logprobs(
        model.model, encoded.prefix, ids, mask, answers, prompt_cache=encoded.prompt_cache
    )
    for rows in (1, 3):
        parts = answer_logprobs(model.model, encoded.prefix, ids, mask, answers, rows=rows)
        assert torch.allclose(parts, whole, atol=1e-4)


@pytest.mark.parametrize("none", [None, -1])
def test_a_model_without_an_end_token_ranks_by_the_answer(
    none: int | None, generator_folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(generator_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = none
    (folder / "config.json").write_text(json.dumps(config))
    ranked = blip2.load(folder).rank(pictures[0], "what is it?", ANSWERS)
    ended = {
        answer.answer: answer
        for answer in blip2.load(generator_folder).rank(pictures[0], "what is it?", ANSWERS)
    }
    assert all(answer.logprob > ended[answer.answer].logprob for answer in ranked)
    assert sum(answer.probability for answer in ranked) == pytest.approx(1, abs=1e-5)


def test_the_ends_of_one_image_and_bad_answers(generator_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder)
    (only,) = model.rank(pictures[0], "what is it?", ["cat", " cat "])
    assert (only.answer, only.probability) == ("cat", 1.0) and math.isfinite(only.logprob)
    for answers in ([], ["cat", " "]):
        with pytest.raises(ValueError, match="none of them empty"):
            model.rank(pictures[0], "what is it?", answers)
    with pytest.raises(ValueError, match="2 questions for 1 images"):
        model.rank(pictures[:1], ["a", "b"], ["cat"])
    with pytest.raises(ValueError, match="positions"):
        model.rank(pictures[0], "what is it?", ["cat " * 80])
