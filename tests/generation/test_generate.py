"""Choosing tokens, on a language model small enough to search exhaustively. Beside transformers: parity/."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2.generation.decoding import (
    Generated,
    _draw,
    generate,
    stream,
)
from blip2.generation.logits import ban_repeated_ngrams, prompt_history, sampling_distribution
from blip2.generation.options import GenerationOptions

VOCABULARY, END = 6, 5


class Bigrams:
    """A stand-in for `Blip2`: the next token depends on the image and on the last two ids."""

    def __init__(self, seed: int = 0, spread: float = 1.5) -> None:
        language = SimpleNamespace(eos_token_ids=(END,), decoder_start_token_id=None)
        self.config = SimpleNamespace(image_token_id=None, language=language)
        self.table = spread * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=_generator(seed))
        self.steps: list[int] = []  # rows of each step
        self.prompt_caches: list[object] = []

    def logits(self, prefix: Tensor, ids: list[int]) -> Tensor:
        return self.table[ids[-2] if len(ids) > 1 else 0, ids[-1]] + prefix[0, :VOCABULARY]

    def prefill(
        self,
        prefix: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        *,
        rows: int,
        max_new_tokens: int,
        prompt_cache: object,
    ) -> Writing:
        self.prompt_caches.append(prompt_cache)
        return Writing(self, prefix, [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask)], rows)

    def log_probability(self, prefix: Tensor, prompt: list[int], new: list[int]) -> float:
        histories = [prompt + new[:i] for i in range(len(new))]
        return sum(self.logits(prefix, ids).log_softmax(0)[i].item() for ids, i in zip(histories, new))


class Writing:
    """A stand-in for `DecodeState`, by the book: it remembers the ids and keeps no cache."""

    def __init__(self, model: Bigrams, prefix: Tensor, prompts: list[list[int]], rows: int) -> None:
        self.model, self.rows = model, rows
        self.prefixes = [one for one in prefix for _ in range(rows)]
        self.ids = [prompt for prompt in prompts for _ in range(rows)]
        self.logits = torch.stack([model.logits(*row) for row in zip(prefix, prompts)])

    def decode_step(self, ids: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        self.ids = [[*row, new] for row, new in zip(self.ids, ids.tolist(), strict=True)]
        self.model.steps.append(len(self.ids))
        return torch.stack([self.model.logits(*row) for row in zip(self.prefixes, self.ids)])

    def reorder_cache(self, parents: Tensor) -> None:
        assert all(i // self.rows == parent // self.rows for i, parent in enumerate(parents.tolist()))
        self.ids = [self.ids[i] for i in parents.tolist()]

    def batch_select_indices(self, prompts: Tensor) -> None:
        kept = [prompt * self.rows + i for prompt in prompts.tolist() for i in range(self.rows)]
        self.ids, self.prefixes = [self.ids[i] for i in kept], [self.prefixes[i] for i in kept]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPTS = [[1, 2], [3], [2, 2, 4], [0, 1, 1, 3]]


def batch(prompts: list[list[int]] = PROMPTS, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """prefix [B, 1, 8], ids and mask [B, T]; the prefix depends on the prompt alone."""
    length = max(map(len, prompts)) + padding
    ids = torch.tensor([[3] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    prefix = torch.stack([torch.randn(1, 8, generator=_generator(sum(prompt))) for prompt in prompts])
    return prefix, ids, mask


def run(model: Bigrams, inputs: tuple[Tensor, Tensor, Tensor], **options: Any) -> Generated:
    return generate(model, *inputs, GenerationOptions(**options))  # type: ignore[arg-type]


# --- options ---


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 2.0},
        {"num_beams": True},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 31},
        {"length_penalty": math.nan},
        {"length_penalty": "1"},
        {"early_stopping": "always"},
        {"early_stopping": 1},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
        {"num_return_sequences": 0},
        {"num_return_sequences": 2},
        {"num_return_sequences": 4, "num_beams": 3},
        {"temperature": -0.5},
        {"top_k": -1, "do_sample": True},
        {"top_p": 0.0, "do_sample": True},
        {"top_p": 1.1, "do_sample": True},
        {"temperature": 0.7, "do_sample": False},
        {"top_k": 5, "do_sample": False},
        {"top_p": 0.9, "do_sample": False},
        {"do_sample": 1},
        {"do_sample": True, "num_beams": 2},
        {"seed": -1},
        {"eos_token_id": -1},
        {"eos_token_id": (1, "2")},
        {"eos_token_id": [1, None]},
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerationOptions(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="beams"):
        GenerationOptions(beams=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        GenerationOptions(5)  # type: ignore[misc]


# --- greedy ---


def test_greedy_takes_the_likeliest_token_until_the_end_token() -> None:
    model = Bigrams()
    inputs = batch()
    got = run(model, inputs, max_new_tokens=9, length_penalty=0.5)
    for i, prompt in enumerate(PROMPTS):
        expected: list[int] = []
        while len(expected) < 9 and END not in expected:
            expected.append(int(model.logits(inputs[0][i], prompt + expected).argmax()))
        assert got.ids[i] == expected
        assert got.finished[i] == (END in expected)
        total = model.log_probability(inputs[0][i], prompt, expected)
        assert sum(got.token_logprobs[i]) == pytest.approx(total, abs=1e-5)
        assert got.scores[i] == pytest.approx(total / len(expected) ** 0.5, abs=1e-5)
    assert len(set(map(len, got.ids))) > 1


def test_end_tokens() -> None:
    model, inputs = Bigrams(), batch()
    free = run(model, inputs, max_new_tokens=8, eos_token_id=())
    assert [len(ids) for ids in free.ids] == [8] * len(PROMPTS) and not any(free.finished)
    for ends in (0, (0, 4), (END, 1, 3)):
        as_set = {ends} if isinstance(ends, int) else set(ends)
        got = run(model, inputs, max_new_tokens=8, eos_token_id=ends)
        for ids, whole in zip(got.ids, free.ids):
            cut = next((i + 1 for i, token in enumerate(whole) if token in as_set), 8)
            assert ids == whole[:cut]
    assert GenerationOptions(eos_token_id=[0, 4]) == GenerationOptions(
        eos_token_id=(0, 4)
    )  # a list is as good


def test_an_end_token_the_vocabulary_lacks_never_comes() -> None:
    for options in ({}, {"num_beams": 3}):
        got = run(Bigrams(), batch(), max_new_tokens=4, min_new_tokens=2, eos_token_id=50118, **options)
        assert [len(ids) for ids in got.ids] == [4] * len(PROMPTS)


def test_shapes_that_do_not_fit_are_named() -> None:
    prefix, ids, mask = batch()
    for wrong in ((prefix[:1], ids, mask), (prefix, ids, mask[:, 1:]), (prefix, ids[0], mask[0])):
        with pytest.raises(ValueError, match="have shapes"):
            generate(Bigrams(), *wrong, GenerationOptions())  # type: ignore[arg-type]


def test_minimum_length() -> None:
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1}):
        got = run(Bigrams(), batch(), max_new_tokens=8, min_new_tokens=6, **options)
        assert all(END not in ids[:6] for ids in got.ids)


# --- beams ---


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
def test_wide_beams_find_the_best_of_all_texts(penalty: float) -> None:
    model, inputs, limit = Bigrams(3, spread=1.0), batch(), 3
    wide = VOCABULARY ** (limit - 1)
    got = run(
        model, inputs, num_beams=wide, max_new_tokens=limit, length_penalty=penalty, early_stopping="never",
        num_return_sequences=4,
    )  # fmt: skip
    for i, prompt in enumerate(PROMPTS):
        scores = {}
        for length in range(1, limit + 1):
            for new in itertools.product(range(VOCABULARY), repeat=length):
                if END not in new[:-1] and (new[-1] == END or length == limit):
                    total = model.log_probability(inputs[0][i], prompt, list(new))
                    scores[new] = total / length**penalty
        best = sorted(scores, key=lambda new: -scores[new])[:4]
        mine = slice(4 * i, 4 * i + 4)
        assert [tuple(ids) for ids in got.ids[mine]] == best
        assert got.scores[mine] == pytest.approx([scores[new] for new in best], abs=1e-5)


def beams_by_the_book(
    model: Bigrams, prefix: Tensor, prompt: list[int], options: GenerationOptions
) -> list[tuple[float, list[int]]]:
    n, limit, penalty = options.num_beams, options.max_new_tokens, options.length_penalty
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        grown = []
        for total, ids in running:
            logprobs = model.logits(prefix, prompt + ids).log_softmax(0).tolist()
            grown += [(total + logprob, [*ids, i]) for i, logprob in enumerate(logprobs)]
        grown = sorted(grown, reverse=True)[: 2 * n]
        stops = [ids[-1] == END or length == limit for _, ids in grown]
        finished += [(total / length**penalty, ids) for (total, ids), stop in zip(grown[:n], stops) if stop]
        finished = sorted(finished, reverse=True)[:n]
        running = [one for one, stop in zip(grown, stops) if not stop][:n]
        hoped = limit if options.early_stopping == "never" and penalty > 0 else length
        if (
            length < limit
            and len(finished) == n
            and (options.early_stopping is True or running[0][0] / hoped**penalty <= finished[-1][0])
        ):
            break
    return finished


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-0.3, 0.0, 1.0, 1.7])
def test_beams_go_by_the_book(early_stopping: Any, penalty: float) -> None:
    options = GenerationOptions(
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=12,
        length_penalty=penalty,
        early_stopping=early_stopping,
    )
    for seed in (0, 11, 23):
        model, inputs = Bigrams(seed), batch()
        got = generate(model, *inputs, options)  # type: ignore[arg-type]
        books = [beams_by_the_book(model, inputs[0][i], PROMPTS[i], options) for i in range(len(PROMPTS))]
        assert got.ids == [ids for book in books for _, ids in book]
        assert got.scores == pytest.approx([score for book in books for score, _ in book], abs=1e-5)


def test_beams_are_at_least_as_good_as_greedy_and_returned_best_first() -> None:
    model, inputs = Bigrams(4), batch()
    options = {"max_new_tokens": 6, "length_penalty": 0.0}
    greedy = run(model, inputs, **options)
    num_beams = run(model, inputs, num_beams=5, num_return_sequences=5, early_stopping="never", **options)
    for i in range(len(PROMPTS)):
        scores = num_beams.scores[5 * i : 5 * i + 5]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] >= greedy.scores[i] - 1e-5
        assert len({tuple(ids) for ids in num_beams.ids[5 * i : 5 * i + 5]}) == 5


# --- rules ---


def test_no_ngram_comes_twice() -> None:
    prompt = [1, 2, 1, 0]
    for options in ({}, {"num_beams": 4}):
        (ids,) = run(
            Bigrams(), batch([prompt]), max_new_tokens=14, no_repeat_ngram_size=2, eos_token_id=(), **options
        ).ids
        pairs = list(itertools.pairwise(prompt + ids))
        assert len(set(pairs)) == len(pairs)


def test_ngrams_longer_than_the_text_ban_nothing() -> None:
    scores = torch.zeros(1, VOCABULARY)
    nothing_yet = prompt_history(None, 0, torch.tensor([[3, 3, 3, 2]]), torch.tensor([[0, 0, 0, 1]]))
    assert torch.equal(ban_repeated_ngrams(scores, nothing_yet, 3), scores)
    assert torch.equal(ban_repeated_ngrams(scores, nothing_yet, 9), scores)


def test_rules_see_the_image_tokens_beside_the_prompt_and_no_padding() -> None:
    ids, mask = torch.tensor([[9, 9, 2, 3], [2, 3, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])
    assert prompt_history(None, 2, ids, mask).tolist() == [[-1, -1, 2, 3], [-1, 2, 3, 4]]
    assert prompt_history(8, 2, ids, mask).tolist() == [[-1, -1, 8, 8, 2, 3], [-1, 8, 8, 2, 3, 4]]


# --- padding, batches, sampling ---

EVERY_WAY = [
    {},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 1, "repetition_penalty": 2.0},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_p": 0.9, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_neither_padding_nor_the_batch_changes_a_result(options: dict[str, Any]) -> None:
    model = Bigrams()
    options = {"max_new_tokens": 7} | options
    together = run(model, batch(), **options)
    assert run(model, batch(padding=5), **options) == together
    alone = [run(model, batch([prompt]), **options) for prompt in PROMPTS]
    assert together.ids == [ids for one in alone for ids in one.ids]
    assert together.scores == pytest.approx([score for one in alone for score in one.scores])


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_prompts_that_are_done_are_dropped(options: dict[str, Any]) -> None:
    model = Bigrams()
    prompts = [list(prompt) for prompt in itertools.product(range(VOCABULARY), repeat=2)]
    run(model, batch(prompts), **{"max_new_tokens": 20} | options)
    assert model.steps[-1] <= model.steps[0] / 2
    assert model.steps == sorted(model.steps, reverse=True)


def test_a_seed_repeats_and_sample_j_is_that_of_seed_plus_j() -> None:
    model, inputs = Bigrams(), batch()
    options = {"do_sample": True, "max_new_tokens": 8}
    three = run(model, inputs, seed=7, num_return_sequences=3, **options)
    assert three == run(model, inputs, seed=7, num_return_sequences=3, **options)
    for j in range(3):
        assert three.ids[j::3] == run(model, inputs, seed=7 + j, **options).ids
    same = run(model, batch([[1, 2]] * 3), seed=7, **options)
    assert same.ids[0] == same.ids[1] == same.ids[2]


def test_without_a_seed_torchs_generator_decides() -> None:
    model, inputs = Bigrams(), batch([[1, 2]] * 8)
    options = {"do_sample": True, "max_new_tokens": 8}
    torch.manual_seed(0)
    first, second = run(model, inputs, **options), run(model, inputs, **options)
    torch.manual_seed(0)
    assert run(model, inputs, **options) == first != second
    assert len({tuple(ids) for ids in first.ids}) > 1


def test_samples_follow_the_distribution() -> None:
    model, inputs, many = Bigrams(), batch([[1, 2]]), 4000
    options = GenerationOptions(
        do_sample=True, max_new_tokens=1, num_return_sequences=many, seed=0, top_k=4, temperature=1.3
    )
    got = generate(model, *inputs, options)  # type: ignore[arg-type]
    logits = model.logits(inputs[0][0], [1, 2])[None]
    chances = sampling_distribution(logits, inputs[1], options, new_tokens=0, end_ids=torch.tensor([END]))[0]
    counts = torch.bincount(torch.tensor(got.ids)[:, 0], minlength=VOCABULARY)
    assert (counts[chances == 0] == 0).all() and (chances == 0).sum() == VOCABULARY - 4
    spread = (many * chances * (1 - chances)).sqrt()
    assert ((counts - many * chances).abs() <= 4 * spread).all()


def test_nothing_without_a_chance_is_drawn() -> None:
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    below_one = 1 - 2**-24
    drawn = [int(_draw(chances, torch.tensor([u]))) for u in (0.0, 0.49, 0.5, 0.51, below_one)]
    assert drawn == [1, 1, 3, 3, 3]


# --- streaming ---


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 2, "num_return_sequences": 2}], ids=str)
def test_stream_gives_the_same_tokens_one_by_one(options: dict[str, Any]) -> None:
    model, inputs = Bigrams(), batch()
    chosen = GenerationOptions(max_new_tokens=9, **options)
    expected = generate(model, *inputs, chosen).ids  # type: ignore[arg-type]
    steps = list(stream(model, *inputs, chosen))  # type: ignore[arg-type]
    for row, ids in zip(zip(*steps), expected, strict=True):
        assert list(row) == ids + [None] * (len(steps) - len(ids))


def test_stream_decides_a_token_only_when_asked() -> None:
    model = Bigrams()
    tokens = stream(model, *batch(), GenerationOptions(max_new_tokens=9, eos_token_id=()))  # type: ignore[arg-type]
    next(tokens)
    assert model.steps == []
    next(tokens)
    assert model.steps == [len(PROMPTS)]


def test_stream_refuses_beams_at_once() -> None:
    with pytest.raises(ValueError, match="num_beams=3"):
        stream(Bigrams(), *batch(), GenerationOptions(num_beams=3))  # type: ignore[arg-type]


def test_the_prompt_cache_is_handed_on() -> None:
    model, prompt_cache = Bigrams(), object()
    generate(model, *batch(), GenerationOptions(max_new_tokens=1), prompt_cache=prompt_cache)  # type: ignore[arg-type]
    assert model.prompt_caches == [prompt_cache]
