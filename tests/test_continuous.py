"""Texts written side by side are those that each prompt gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import blip2
from blip2.continuous import Row, Rows
from blip2.generate import GenerationOptions, generate, search

WAYS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 3},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_p": 0.9},
    {"do_sample": True, "seed": 8, "temperature": 1.4, "top_k": 9, "min_new_tokens": 6},
    {"eos_token_id": (), "max_new_tokens": 17},
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
    rows, begun = Rows(model), list[tuple[Any, list[Row]]]()
    cases = [
        (image, prompt, way) for way in WAYS for prompt in PROMPTS for image in chance.sample(encoded, 2)
    ]
    chance.shuffle(cases)
    todo = list(cases)
    while todo or len(rows):
        for _ in range(chance.choice([0, 0, 1, 2, 3])):
            if todo:
                image, prompt, way = todo.pop()
                options = GenerationOptions(**({"max_new_tokens": 9} | way))
                ids, mask = tokenizer.encode_batch([prompt])
                (made,) = rows.join(image.prefix, ids, mask, [options], tops=[0], context=image.context)
                begun.append(((image, ids, mask, options), made))
        if len(rows):
            rows.choose()
            rows.advance()
    assert len(begun) == len(cases)
    for (image, ids, mask, options), made in begun:
        alone = generate(model, image.prefix, ids, mask, options, context=image.context)
        assert [row.ids for row in made] == alone.ids
        assert [row.finished for row in made] == alone.finished
        for row, logprobs, score in zip(made, alone.token_logprobs, alone.scores, strict=True):
            assert row.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert row.score == pytest.approx(score, abs=1e-4)


def test_prompts_join_together_and_may_be_dropped(variants: dict[str, Path], pictures: list[Path]) -> None:
    predictor = blip2.load(variants["opt"])
    model, tokenizer = predictor.model, predictor.generator.tokenizer
    prefix = torch.cat([each.prefix for each in predictor.encode(pictures[:3])])
    ids, mask = tokenizer.encode_batch(PROMPTS[:3])
    options = [GenerationOptions(eos_token_id=(), max_new_tokens=6)] * 3
    rows = Rows(model)
    made = rows.join(prefix, ids, mask, options, tops=[0, 2, 0])
    for step in range(6):
        rows.choose()
        made[0][0].dropped = step >= 1
        rows.advance()
    assert len(rows) == 0 and len(made[0][0].ids) == 2
    expected = generate(model, prefix, ids, mask, options[0])
    assert [row.ids for (row,) in made[1:]] == expected.ids[1:]
    noted = made[1][0]
    assert [best[0][0] for best in noted.tops] == noted.ids  # greedy takes the likeliest
    assert [best[0][1] for best in noted.tops] == pytest.approx(noted.logprobs, abs=1e-5)


@pytest.mark.parametrize("variant", ["opt", "t5"])
def test_a_search_step_by_step_is_generate_and_lets_prompts_go(
    variants: dict[str, Path], pictures: list[Path], variant: str
) -> None:
    predictor = blip2.load(variants[variant])
    model, tokenizer = predictor.model, predictor.generator.tokenizer
    prefix = torch.cat([each.prefix for each in predictor.encode(pictures[:3])])
    ids, mask = tokenizer.encode_batch(PROMPTS[:3])
    options = GenerationOptions(beams=3, num_return_sequences=2, max_new_tokens=9)
    expected = generate(model, prefix, ids, mask, options)
    for dropped in (set(), {1}, {0, 2}):
        searching = search(model, prefix, ids, mask, options)
        next(searching)
        with pytest.raises(StopIteration) as end:
            while True:
                searching.send(dropped)
        for place in {0, 1, 2} - dropped:
            texts = slice(2 * place, 2 * place + 2)
            assert end.value.value.ids[texts] == expected.ids[texts]
            assert end.value.value.scores[texts] == pytest.approx(expected.scores[texts], abs=1e-4)
    with pytest.raises(ValueError, match="beams"):
        search(model, prefix, ids, mask, GenerationOptions())
