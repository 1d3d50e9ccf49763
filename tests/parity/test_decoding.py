"""Ours beside transformers' generate: same weights, same prompts, same options, same ids and scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from reference import PAD, QUERIES, VOCABULARY, Prompts, ours_from, prompts, their_blip2
from transformers import Blip2ForConditionalGeneration

from blip2.generation.decoding import Generated, generate, stream
from blip2.generation.logits import prompt_history, sampling_distribution
from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2

SEEDS = (3, 5, 8)

GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_new_tokens": 1},
    "min_new_tokens": {"min_new_tokens": 7},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "repetition_reward": {"repetition_penalty": 0.7},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "no repeated ids": {"no_repeat_ngram_size": 1},
    "all rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
}
BEAMS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 5},
    "two": {"num_beams": 2},
    "one token": {"num_beams": 3, "max_new_tokens": 1},
    "early": {"num_beams": 4, "early_stopping": True},
    "never early": {"num_beams": 4, "early_stopping": "never"},
    "never early, long": {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.2},
    "never early, short": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "early_stopping": "never",
        "length_penalty": -0.1,
    },
    "long": {"num_beams": 3, "length_penalty": 2.0},
    "no length penalty": {"num_beams": 3, "length_penalty": 0.0},
    "short": {"num_beams": 5, "length_penalty": -1.0},
    "early, short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "some beams, early": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "min_new_tokens": {"num_beams": 3, "min_new_tokens": 6},
    "repetition_penalty": {"num_beams": 3, "repetition_penalty": 1.5},
    "repetition_reward": {"num_beams": 3, "repetition_penalty": 0.8},
    "no repeated bigrams": {"num_beams": 3, "no_repeat_ngram_size": 2},
    "no repeated ids": {"num_beams": 3, "no_repeat_ngram_size": 1},
    "published": {"num_beams": 5, "min_new_tokens": 4, "repetition_penalty": 1.5, "length_penalty": 1.0},
    "all rules": {
        "num_beams": 4,
        "num_return_sequences": 4,
        "early_stopping": "never",
        "length_penalty": 0.6,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 3,
    },
}
OPTIONS = [pytest.param(o, id=f"greedy {name}") for name, o in GREEDY.items()] + [
    pytest.param(o, id=f"beams {name}") for name, o in BEAMS.items()
]


@cache
def models(seed: int) -> tuple[Blip2ForConditionalGeneration, Blip2]:
    theirs = their_blip2(seed)
    return theirs, ours_from(theirs)


def run_ours(model: Blip2, batch: Prompts, options: GenerationOptions) -> Generated:
    with torch.no_grad():
        return generate(model, model.embed_image(batch.pixels), batch.ids, batch.mask, options)


def run_theirs(
    model: Blip2ForConditionalGeneration,
    batch: Prompts,
    ends: tuple[int, ...],
    options: dict[str, Any],
    start: int | None = None,
) -> tuple[list[list[int]], list[float] | None]:
    """New ids up to the first end token, and with beams the scores; `start`: what T5's decoder begins with."""
    out = model.generate(
        **batch.theirs(),
        eos_token_id=list(ends),
        pad_token_id=PAD if start is None else start,
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": 12, **options},
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert start is None or bool((out.sequences[:, 0] == start).all())
    rows = []
    for new in out.sequences[:, QUERIES + batch.ids.shape[1] if start is None else 1 :].tolist():
        first_end = min((new.index(end) for end in ends if end in new), default=len(new))
        rows.append(new[: first_end + 1])
    scores = out.get("sequences_scores")
    return rows, None if scores is None else scores.tolist()


def draw_theirs(
    model: Blip2ForConditionalGeneration, batch: Prompts, end: int, pad: int, options: dict[str, Any]
) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **batch.theirs(),
        eos_token_id=end,
        pad_token_id=pad,
        max_new_tokens=10,
        output_scores=True,
        return_dict_in_generate=True,
        **{"do_sample": True, "top_k": 0, **options},
    )


def as_ours(options: dict[str, Any], ends: tuple[int, ...]) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 12, "eos_token_id": ends, **options})


def common_ids(model: Blip2, batch: Prompts) -> tuple[int, int]:
    """Two ids that come up when nothing ends the text: as end tokens they end some rows early, others late."""
    free = run_ours(model, batch, GenerationOptions(max_new_tokens=8, eos_token_id=())).ids
    order = [row[step] for step in range(3, 8) for row in free]
    first = order[0]
    return first, next(i for i in order if i != first)


def check_batch(ours: Blip2, options: dict[str, Any]) -> tuple[Prompts, GenerationOptions, Generated]:
    """Prompts in a batch get what they get alone; returns the batch, the options and what it got."""
    batch = prompts((2, 6, 3, 1, 4))
    chosen = GenerationOptions(max_new_tokens=10, eos_token_id=common_ids(ours, batch), **options)
    together = run_ours(ours, batch, chosen)
    alone = [run_ours(ours, batch.row(i), chosen) for i in range(5)]
    assert together.ids == [ids for one in alone for ids in one.ids]
    assert together.scores == pytest.approx([score for one in alone for score in one.scores], abs=1e-5)
    return batch, chosen, together


@pytest.mark.parametrize("several_ends", [False, True], ids=["one end", "several ends"])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_ids_and_scores(options: dict[str, Any], several_ends: bool) -> None:
    lengths: set[int] = set()
    for seed in SEEDS:
        theirs, ours = models(seed)
        batch = prompts((2, 5, 3), seed)
        ends = common_ids(ours, batch)[: 2 if several_ends else 1]
        got = run_ours(ours, batch, as_ours(options, ends))
        rows = len(got.ids) // 3
        for i in range(3):  # theirs alone, without padding, beside ours in the batch
            ids, scores = run_theirs(theirs, batch.row(i), ends, options)
            mine = slice(i * rows, (i + 1) * rows)
            assert got.ids[mine] == ids
            if scores is not None:
                assert got.scores[mine] == pytest.approx(scores, rel=1e-5, abs=1e-5)
        assert got.finished == [row[-1] in ends for row in got.ids]
        lengths.update(map(len, got.ids))
    assert len(lengths) > 1 or options.get("max_new_tokens") == 1, "the rows should end at different times"


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.5}, {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5}],
    ids=["greedy", "penalty", "num_beams"],
)
def test_same_as_their_padded_batch(options: dict[str, Any]) -> None:
    theirs, ours = models(SEEDS[0])
    batch = prompts((1, 6, 4, 2))
    ends = common_ids(ours, batch)
    ids, _ = run_theirs(theirs, batch, ends, options)
    assert run_ours(ours, batch, as_ours(options, ends)).ids == ids


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}]
)
def test_padding_stands_on_either_side(options: dict[str, Any]) -> None:
    _, ours = models(SEEDS[0])
    batch = prompts((2, 5, 3))
    right = batch.padded_right()
    chosen = GenerationOptions(max_new_tokens=8, **options)
    with torch.no_grad():
        prefix = ours.embed_image(batch.pixels)
    expected = run_ours(ours, batch, chosen)
    assert generate(ours, prefix, *right, chosen).ids == expected.ids
    assert (
        generate(ours, prefix, *right, chosen, prompt_cache=ours.prefill_prefix(prefix)).ids == expected.ids
    )
    alone = batch.row(1)
    without_mask = generate(ours, prefix[1:2], alone.ids, None, chosen)
    assert without_mask == generate(ours, prefix[1:2], alone.ids, alone.mask, chosen)


def test_end_token_of_the_config() -> None:
    _, ours = models(SEEDS[0])
    batch = prompts()
    ends = common_ids(ours, batch)
    expected = run_ours(ours, batch, GenerationOptions(max_new_tokens=12, eos_token_id=ends))
    configured = ours_from(their_blip2(SEEDS[0], eos_token_id=list(ends)))
    assert run_ours(configured, batch, GenerationOptions(max_new_tokens=12)) == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "num_beams"])
def test_log_probabilities_are_the_models(options: dict[str, Any]) -> None:
    """Under rules that reshape the scores, each token's log-probability is still that of the plain model."""
    _, ours = models(SEEDS[1])
    batch = prompts()
    rules = {"repetition_penalty": 1.5, "min_new_tokens": 5, "no_repeat_ngram_size": 2}
    got = run_ours(ours, batch, as_ours(options | rules, common_ids(ours, batch)))
    for i, (ids, logprobs) in enumerate(zip(got.ids, got.token_logprobs)):
        alone = batch.row(i)
        text = torch.cat([alone.ids, torch.tensor([ids])], dim=1)
        with torch.no_grad():
            logits = ours(alone.pixels, text)[0, -len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        if not options:
            assert got.scores[i] == pytest.approx(sum(expected.tolist()) / len(ids), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"temperature": 1.8, "top_k": 20, "top_p": 0.6},
        {
            "repetition_penalty": 1.5,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 6,
            "top_p": 0.9,
            "top_k": 30,
        },
        {"repetition_penalty": 0.6, "temperature": 2.0, "no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_same_sampling_distribution(options: dict[str, Any]) -> None:
    """What theirs draws each of its samples from, step by step, ours would have drawn it from."""
    theirs, ours = models(SEEDS[2])
    batch = prompts((3, 3))  # no padding: their n-gram rule would see it
    end = 7  # seldom drawn
    out = draw_theirs(theirs, batch, end, PAD, options)
    new = out.sequences[:, QUERIES + 3 :]
    assert new.shape[1] > 3
    seen = prompt_history(ours.config.image_token_id, QUERIES, batch.ids, batch.mask)
    mine = GenerationOptions(do_sample=True, **options)
    for step, scores in enumerate(out.scores):
        history = torch.cat([batch.ids, new[:, :step]], dim=1)
        with torch.no_grad():
            logits = ours(batch.pixels, history)[:, -1]
        both = torch.cat([seen, new[:, :step]], dim=1)
        got = sampling_distribution(logits, both, mine, new_tokens=step, end_ids=torch.tensor([end]))
        torch.testing.assert_close(got, scores.softmax(-1), rtol=0.0, atol=1e-6)
        assert torch.equal(got == 0, scores == -torch.inf)


def test_rules_on_ids_beyond_the_vocabulary() -> None:
    """An image token outside the head's range, as in files with a padded embedding, disturbs no rule."""
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[VOCABULARY + 5, VOCABULARY + 5, 4, 9, VOCABULARY, 4]])
    options = GenerationOptions(repetition_penalty=2.0, no_repeat_ngram_size=2, do_sample=True)
    got = sampling_distribution(scores, seen, options, new_tokens=0, end_ids=torch.tensor([7]))
    expected = scores.clone()
    expected[0, 4] *= 2.0 if expected[0, 4] < 0 else 0.5
    expected[0, 9] = -torch.inf
    torch.testing.assert_close(got, expected.softmax(-1))


def test_stream_and_context_give_the_same() -> None:
    _, ours = models(SEEDS[0])
    batch = prompts((2, 5, 3))
    options = GenerationOptions(max_new_tokens=12, eos_token_id=common_ids(ours, batch))
    expected = run_ours(ours, batch, options)
    with torch.no_grad():
        prefix = ours.embed_image(batch.pixels)
        context = ours.prefill_prefix(prefix)
    assert generate(ours, prefix, batch.ids, batch.mask, options, prompt_cache=context).ids == expected.ids
    steps = list(stream(ours, prefix, batch.ids, batch.mask, options, prompt_cache=context))
    assert [[i for i in row if i is not None] for row in zip(*steps)] == expected.ids
    num_beams = GenerationOptions(num_beams=3, max_new_tokens=12, eos_token_id=options.eos_token_id)
    again = generate(ours, prefix, batch.ids, batch.mask, num_beams, prompt_cache=context)
    assert again.ids == run_ours(ours, batch, num_beams).ids


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 4, "num_return_sequences": 2}, {"num_beams": 3}]
)
def test_a_batch_changes_nothing(options: dict[str, Any]) -> None:
    _, ours = models(SEEDS[1])
    check_batch(ours, options)
