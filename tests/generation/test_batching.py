"""Texts written side by side are those that each prompt gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import blip2
from blip2.generation.batching import ContinuousBatch, SampledSequence
from blip2.generation.decoding import BeamSequence, Generated, generate
from blip2.generation.options import GenerationOptions

OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 3},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_p": 0.9},
    {"do_sample": True, "seed": 8, "temperature": 1.4, "top_k": 9, "min_new_tokens": 6},
    {"eos_token_id": (), "max_new_tokens": 17},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 14},
    {
        "num_beams": 2,
        "early_stopping": True,
        "repetition_penalty": 1.6,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 3,
    },
]
PROMPTS = ["a photo of", "Question: what is it? Answer:", "", "two dogs and a red cat and"]


@pytest.mark.parametrize("variant", ["opt", "opt-untied", "t5"])
def test_joining_and_leaving_changes_no_text(
    variants: dict[str, Path], pictures: list[Path], variant: str
) -> None:
    predictor = blip2.load(variants[variant])
    model, tokenizer = predictor.model, predictor.generator.tokenizer
    encoded = predictor.encode(pictures)
    chance = random.Random(7)
    rows, begun = ContinuousBatch(model), list[tuple[Any, list[SampledSequence | BeamSequence]]]()
    cases = [
        (image, prompt, changes)
        for changes in OPTIONS
        for prompt in PROMPTS
        for image in chance.sample(encoded, 2)
    ]
    chance.shuffle(cases)
    todo = list(cases)
    while todo or len(rows):
        for _ in range(chance.choice([0, 0, 1, 2, 3])):
            if todo:
                image, prompt, changes = todo.pop()
                options = GenerationOptions(**({"max_new_tokens": 9} | changes))
                ids, mask = tokenizer.encode_batch([prompt])
                (sequences,), _ = rows.join(
                    image.prefix, ids, mask, [options], tops=[0], prompt_cache=image.prompt_cache
                )
                begun.append(((image, ids, mask, options), sequences))
        if len(rows):
            rows.choose()
            rows.advance()
    assert len(begun) == len(cases)
    for (image, ids, mask, options), sequences in begun:
        alone = generate(model, image.prefix, ids, mask, options, prompt_cache=image.prompt_cache)
        outputs = [generated_by(sequence) for sequence in sequences]
        assert [ids for output in outputs for ids in output.ids] == alone.ids
        assert [finished for output in outputs for finished in output.finished] == alone.finished
        scores = [score for output in outputs for score in output.scores]
        assert scores == pytest.approx(alone.scores, abs=1e-4)
        for logprobs, wanted in zip(
            [row for output in outputs for row in output.token_logprobs], alone.token_logprobs, strict=True
        ):
            assert logprobs == pytest.approx(wanted, abs=1e-4)


def generated_by(text: SampledSequence | BeamSequence) -> Generated:
    if isinstance(text, SampledSequence):
        return Generated([text.ids], [text.score], [text.logprobs], [text.finished])
    assert text.generated is not None
    return text.generated


def test_prompts_join_together_and_may_be_dropped(variants: dict[str, Path], pictures: list[Path]) -> None:
    predictor = blip2.load(variants["opt"])
    model, tokenizer = predictor.model, predictor.generator.tokenizer
    prefix = torch.cat([image.prefix for image in predictor.encode(pictures[:3])])
    ids, mask = tokenizer.encode_batch(PROMPTS[:3])
    options = [
        GenerationOptions(eos_token_id=(), max_new_tokens=6, num_beams=num_beams) for num_beams in (4, 1, 1)
    ]
    rows = ContinuousBatch(model)
    ((search,), (noted,), (other,)), _ = rows.join(prefix, ids, mask, options, tops=[0, 2, 0])
    for step in range(6):
        assert len(rows) == (6 if step < 2 else 2)
        rows.choose()
        search.dropped = step >= 1
        rows.advance()
    assert len(rows) == 0 and not search.done
    assert isinstance(noted, SampledSequence) and isinstance(other, SampledSequence)
    expected = generate(model, prefix[1:], ids[1:], mask[1:], options[1])
    assert [noted.ids, other.ids] == expected.ids
    assert [best[0][0] for best in noted.tops] == noted.ids  # greedy takes the likeliest
    assert [best[0][1] for best in noted.tops] == pytest.approx(noted.logprobs, abs=1e-5)
