"""The tasks of the queries: losses that a perfect prefix makes zero, and what each task trains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import Blip2Config, OptConfig, QFormerConfig, VisionConfig
from blip2.modeling.opt import Opt
from blip2.train.loop import Task
from default_model.batches import InstructionBatches, LanguageBatches, QueryBatches, Tokenizers
from default_model.initial_weights import init_weights
from default_model.kinds import Share
from default_model.language import Language
from default_model.queries import (
    LOSS_WEIGHTS,
    CellReaders,
    QueryFinetune,
    QueryModel,
    QueryPretrain,
    SlotLanguage,
    SlotLosses,
    embeddings,
    place_loss,
    read_logits,
)
from default_model.recipe import QUERIES
from default_model.slots import NAME_GAIN, OBJECT, PHOTOGRAPH, SlotPrefix, bag, slot_words

SHARES: dict[Share, float] = {"scene": 3, "photograph": 1}
VISION = VisionConfig(32, 64, 1, 2, image_size=128, patch_size=16)
QFORMER = QFormerConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    encoder_hidden_size=32,
    cross_attention_frequency=1,
    hidden_dropout_prob=0.0,
)
WIDTH = 48


@pytest.fixture
def both(words: Tokenizers, language: Language) -> QueryModel:
    opt = OptConfig(
        vocab_size=len(words.language),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=256,
    )
    model = Blip2(Blip2Config(VISION, QFORMER, opt, num_query_tokens=QUERIES))
    bags = [bag(words.language, noun) for noun in language.all]
    ids, weights = (torch.zeros(len(bags), 8, dtype=dtype) for dtype in (torch.int64, torch.float32))
    for row, weight, tokens in zip(ids, weights, bags, strict=True):
        row[: len(tokens)], weight[: len(tokens)] = torch.tensor(tokens), NAME_GAIN
    made = QueryModel(model, CellReaders(32, WIDTH), SlotLosses(SlotPrefix(WIDTH), ids, weights))
    init_weights(made, seed=3, std=0.1)
    assert isinstance(model.language, Opt)
    model.language.tie()
    return made


def children_with_gradients(module: nn.Module) -> set[str]:
    """The first two parts of the names of all parameters with a gradient that is not zero."""
    named = module.named_parameters()
    return {".".join(n.split(".")[:2]) for n, p in named if p.grad is not None and p.grad.any()}


def step(task: Task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    losses = task.losses(batch, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    return losses


# --- losses ----------------------------------------------------------------------------------------------------------


def test_place_loss_is_a_share_of_the_variance() -> None:
    target = torch.rand(64, 50, 2, generator=torch.Generator().manual_seed(0))
    assert place_loss(torch.full_like(target, 0.5), target).item() == pytest.approx(1, abs=0.05)
    assert place_loss(target, target).item() == 0


def test_a_perfect_prefix_loses_nothing(both: QueryModel, run_folder: Path, words: Tokenizers) -> None:
    batch, vectors = QueryBatches(run_folder, words, SHARES, 8)[0], embeddings(both.model)
    prefix = both.slots.slots(vectors, batch).detach()
    assert both.slots.losses(prefix, vectors, batch)["slot"].item() == pytest.approx(0, abs=1e-10)
    pure = slot_words(vectors, batch).detach()  # "name" is of words alone
    assert both.slots.losses(pure, vectors, batch)["name"].item() == pytest.approx(0, abs=1e-4)
    wrong = both.slots.losses(prefix.flip(0), vectors, batch)
    assert wrong["slot"] > 0.01 and wrong["name"] > 0.01


def test_what_is_not_known_and_what_is_empty_count_less(
    both: QueryModel, run_folder: Path, words: Tokenizers
) -> None:
    batch, vectors = QueryBatches(run_folder, words, SHARES, 8)[0], embeddings(both.model)
    named = (batch["slot_kinds"] == OBJECT) | (batch["slot_kinds"] == PHOTOGRAPH)
    perfect = both.slots.slots(vectors, batch).detach()
    empty, full = (torch.where(mask.unsqueeze(-1), perfect + 1, perfect) for mask in (~named, named))
    losses = [both.slots.losses(prefix, vectors, batch)["slot"].item() for prefix in (empty, full)]
    weight = torch.where(batch["slot_kinds"] == 0, 0.25, 1.0)
    assert losses[1] == pytest.approx(WIDTH * named.sum().item() / weight.sum().item(), rel=1e-4)
    assert sum(losses) == pytest.approx(WIDTH, rel=1e-4)
    nothing = batch | {"slots_known": (~named).float()}
    assert both.slots.losses(full, vectors, nothing)["slot"].item() == pytest.approx(0, abs=1e-10)


def test_slots_give_gradients_to_the_prefix_alone(
    both: QueryModel, run_folder: Path, words: Tokenizers
) -> None:
    batch, vectors = QueryBatches(run_folder, words, SHARES, 8)[0], embeddings(both.model)
    prefix = torch.zeros(8, QUERIES, WIDTH, requires_grad=True)
    sum(both.slots.losses(prefix, vectors, batch).values()).backward()  # type: ignore[union-attr]
    assert prefix.grad is not None and prefix.grad.any()
    assert vectors.grad is None and all(p.grad is None for p in both.slots.parameters())


def test_cells_are_read_where_they_show_an_object() -> None:
    readers, nouns = CellReaders(4, 3), torch.eye(3)
    with torch.no_grad():
        readers.names.weight.copy_(10 * torch.eye(3, 4))
        readers.names.bias.zero_()
        readers.place.weight.zero_()
        readers.place.bias.zero_()  # always the middle
    features = torch.eye(4)[None]
    batch = {
        "cell_nouns": torch.tensor([[0, 1, -1, -2]]),
        "cell_places": torch.tensor([[[0.5, 0.5], [1.0, 0.5], [9.0, 9.0], [9.0, 9.0]]]),
    }
    losses = readers.losses(features, nouns, batch)
    assert losses["cell"].item() == pytest.approx(0, abs=1e-6)
    assert losses["where"].item() == pytest.approx(12 * 0.25 / 4)
    swapped = readers.losses(features, nouns, batch | {"cell_nouns": torch.tensor([[1, 1, -1, -2]])})
    assert swapped["cell"].item() == pytest.approx(
        read_logits(10 * nouns[:1], nouns)[0, 0].item() / 2, rel=1e-4
    )
    none = readers.losses(features.requires_grad_(), nouns, batch | {"cell_nouns": torch.full((1, 4), -1)})
    assert none["cell"].item() == none["where"].item() == 0
    none["cell"].backward()


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_the_language_model_and_the_slots_vectors_learn_to_read(
    both: QueryModel, run_folder: Path, words: Tokenizers
) -> None:
    task = SlotLanguage(both.model, both.slots.slots)
    losses = step(task, LanguageBatches(run_folder, words, 6)[0])
    assert math.isfinite(losses["loss"].item())
    assert children_with_gradients(task.module) == {"model.language", "slots.kinds", "slots.place"}
    trained = {id(p) for group in task.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for part in (both.model.language, both.slots) for p in part.parameters()}


def test_noise_is_of_the_generator_alone(both: QueryModel, run_folder: Path, words: Tokenizers) -> None:
    task, batch = SlotLanguage(both.model, both.slots.slots), LanguageBatches(run_folder, words, 6)[0]
    first, again, other = (
        task.losses(batch, torch.Generator().manual_seed(seed))["loss"].item() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_queries_are_trained_without_the_language_model(
    both: QueryModel, run_folder: Path, words: Tokenizers
) -> None:
    task = QueryPretrain(both)
    losses = step(task, QueryBatches(run_folder, words, SHARES, 8)[0])
    assert children_with_gradients(both) == {
        "model.vision", "model.qformer", "model.projection", "readers.names", "readers.place"
    }  # fmt: skip
    parts = {name: losses[name].item() for name in LOSS_WEIGHTS}
    assert losses["loss"].item() == pytest.approx(
        sum(LOSS_WEIGHTS[n] * p for n, p in parts.items()), rel=1e-5
    )


def test_queries_learn(both: QueryModel, run_folder: Path, words: Tokenizers) -> None:
    task, batch = QueryPretrain(both), QueryBatches(run_folder, words, SHARES, 8)[0]
    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=3e-3)
    first = {name: loss.item() for name, loss in task.losses(batch, torch.Generator()).items()}
    for _ in range(40):
        optimizer.zero_grad()
        step(task, batch)
        optimizer.step()
    last = {name: loss.item() for name, loss in task.losses(batch, torch.Generator()).items()}
    assert last["loss"] < 0.6 * first["loss"]
    assert all(last[name] < 0.9 * first[name] for name in ("name", "cell", "where"))


def test_fine_tuning_trains_every_part_but_the_slots(
    both: QueryModel, run_folder: Path, words: Tokenizers
) -> None:
    task = QueryFinetune(both, read_weight=0.5, language_muon_scale=4.0, muon_scale=2.0)
    batch = InstructionBatches(run_folder, words, SHARES, batch=6)[0]
    losses = step(task, batch)
    assert children_with_gradients(both) == {
        "model.vision", "model.qformer", "model.projection", "model.language", "readers.names", "readers.place"
    }  # fmt: skip
    queries = sum(LOSS_WEIGHTS[name] * losses[name].item() for name in LOSS_WEIGHTS)
    assert losses["loss"].item() == pytest.approx(losses["text"].item() + 0.5 * queries, rel=1e-5)
    trained = [id(p) for group in task.parameter_groups(0.1) for p in group["params"]]
    assert len(trained) == len(set(trained))
    assert set(trained) == {id(p) for part in (both.model, both.readers) for p in part.parameters()}
    rates = {
        group["lr_scale"]: {id(p) for p in group["params"]}
        for group in task.parameter_groups(0.1)
        if group["muon"]
    }
    assert isinstance(both.model.language, Opt)
    assert id(both.model.language.layers[0].fc1.weight) in rates[4.0]
    assert id(both.model.qformer.layers[0].attention.output.dense.weight) in rates[2.0]
