from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import Blip2Config, OptConfig, QFormerConfig, VisionConfig
from blip2.modeling.qformer import QFormer, QFormerLayer
from blip2.train import FitOptions, fit
from default_model.pretrain import ImageTextEncoders, WordBag, init_weights
from default_model.queries import (
    UNKNOWN,
    LanguagePretrain,
    QueryFinetune,
    QueryPretrain,
    QueryReaders,
    ReadModel,
    assign_parts,
    init_query_attention,
    init_word_embeddings,
)

CONFIG = QFormerConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    encoder_hidden_size=32,
    cross_attention_frequency=1,
    hidden_dropout_prob=0.0,
)


def qformer(queries: int = 4, **changes: int) -> QFormer:
    model = QFormer(replace(CONFIG, **changes), queries)
    init_weights(model, seed=0)
    return model


def patches(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features that a linear map takes to places and objectness, their middles, and which show an object."""
    generator = torch.Generator().manual_seed(1)
    middles = torch.rand(count, 2, generator=generator)
    shown = torch.rand(count, generator=generator) < 0.5
    content = torch.cat([middles, middles.square(), shown.float()[:, None]], dim=1)
    return content @ torch.randn(5, 32, generator=generator), middles, shown


def test_every_object_gets_the_part_its_middle_is_in_or_the_nearest_free_one() -> None:
    middles = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [1.0, 1.0]])
    assert assign_parts(middles, 4).tolist() == [0, 1, 2, 3]
    crowded = torch.tensor([[0.3, 0.3], [0.2, 0.4], [0.4, 0.2], [0.1, 0.1]])
    assert assign_parts(crowded, 4).tolist() == [0, 2, 1, 3]
    assert assign_parts(torch.tensor([[0.62, 0.3]]), 16).tolist() == [6]  # second row, third column


def test_initial_queries_attend_to_the_object_whose_middle_is_in_their_part() -> None:
    features, middles, shown = patches(400)
    model = qformer()
    before = model.query_tokens.detach().clone()
    init_query_attention(model, features, middles, shown, seed=2)
    assert not torch.equal(before, model.query_tokens)
    layer = model.layers[0]
    assert isinstance(layer, QFormerLayer) and layer.crossattention is not None
    cross = layer.crossattention.attention
    with torch.inference_mode():
        query = cross.query(layer.attention(model.layernorm(model.query_tokens)))[0]  # [Q, W]
        key = cross.key(features)
        score = (
            query.unflatten(-1, (4, 8)).transpose(0, 1) @ key.unflatten(-1, (4, 8)).permute(1, 2, 0)
        ) / 8**0.5
        attention = score.softmax(-1)  # [H, Q, K]
    part = (middles * 2).long() @ torch.tensor([1, 2])
    for head in attention:
        for number, weights in enumerate(head):
            assert float(weights[(part == number) & shown].sum()) > 0.9


@pytest.mark.parametrize(
    "wrong", [{"queries": 5}, {"encoder_hidden_size": 64}, {"num_attention_heads": 16}, {"queries": 36}]
)
def test_a_qformer_of_another_shape_is_refused(wrong: dict[str, int]) -> None:
    features, middles, shown = patches(50)
    with pytest.raises(ValueError, match="cannot be aimed at image features"):
        init_query_attention(qformer(**wrong), features, middles, shown, seed=0)


class Squares:
    """Black images with one bright square in one of four parts; its phrase is its channel."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(position)
        pixels = torch.zeros(16, 3, 16, 16)
        parts = torch.full((16, 4), -1)
        places = torch.full((16, 4, 2), 0.5)
        for image, part, place in zip(pixels, parts, places, strict=True):
            cell, channel = (int(torch.randint(n, (1,), generator=generator)) for n in (4, 3))
            row, column = divmod(cell, 2)
            image[channel, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 2.0
            part[cell] = channel
            place[cell] = torch.tensor([column * 0.5 + 0.25, row * 0.5 + 0.25])
        ids = torch.tensor([[1], [2], [3]])
        phrases = {"phrase_ids": ids, "phrase_mask": torch.ones_like(ids)}
        return {"pixels": pixels, "parts": parts, "places": places, **phrases}


VISION = VisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
OPT = OptConfig(
    vocab_size=12,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=32,
)
STEPS = FitOptions(steps=120, lr=5e-3, min_lr=1e-4, warmup_steps=5)


def read_model() -> ReadModel:
    model = Blip2(Blip2Config(VISION, CONFIG, OPT, num_query_tokens=4))
    encoders = ImageTextEncoders(model.vision, WordBag(4, embedding=16))
    both = ReadModel(model, QueryReaders(encoders))
    init_weights(both, seed=3)
    return both


def unchanged(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.state_dict().items() if torch.equal(p, before[name])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in module.state_dict().items()}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    """A model whose queries have learned what is in their part."""
    both = read_model()
    fit(QueryPretrain(both), Squares(), STEPS, tmp_path_factory.mktemp("queries"))
    return both


def test_queries_learn_what_is_in_their_part_from_a_frozen_encoder(pretrained: ReadModel) -> None:
    before = read_model()
    first = QueryPretrain(before).losses(Squares()[1000], torch.Generator())
    last = QueryPretrain(pretrained).losses(Squares()[1000], torch.Generator())
    for name, share in {"name": 0.1, "shown": 0.9, "place": 0.1}.items():
        assert last[name].item() < share * first[name].item(), name
    same = unchanged(copied(before.model), pretrained.model)
    assert {name for name in same if not name.startswith("qformer.")} == {
        name for name in before.model.state_dict() if not name.startswith("qformer.")
    }
    assert "qformer.query_tokens" not in same


def test_images_without_labels_change_nothing(pretrained: ReadModel) -> None:
    batch, other = Squares()[3], Squares()[4]
    task = QueryPretrain(pretrained)
    both = {**batch, "pixels": torch.cat([batch["pixels"], other["pixels"]])}
    both["parts"] = torch.cat([batch["parts"], torch.full_like(other["parts"], UNKNOWN)])
    both["places"] = torch.cat([batch["places"], other["places"]])
    for name, loss in task.losses(batch, torch.Generator()).items():
        assert task.losses(both, torch.Generator())[name].item() == pytest.approx(loss.item(), rel=1e-5), name


BAGS = [[3], [4, 5], [6, 7]]  # the tokens of the three names


def test_projected_queries_are_nearest_to_the_words_of_what_they_show(pretrained: ReadModel) -> None:
    both = copy.deepcopy(pretrained)
    model, batch = both.model, Squares()[7]
    with torch.inference_mode():
        queries = model.qformer(model.vision(batch["pixels"]))
        names = both.readers.phrases(batch["phrase_ids"], batch["phrase_mask"])
    full = batch["parts"] >= 0
    init_word_embeddings(model, both.readers, queries.flatten(0, 1), full.flatten(), names, BAGS)
    with torch.inference_mode():
        projected = model.project(queries)[full]  # [K, W]
        words = torch.stack([model.language.embed(torch.tensor(bag)).sum(0) for bag in BAGS])
        assert ((projected @ words.mT).argmax(1) == batch["parts"][full]).all()
        assert torch.equal(model.language.lm_head.weight, model.language.embed_tokens.weight)


class NamedSquares(Squares):
    """The same with a text for each image: the beginning token, then its name."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        batch = super().__getitem__(position)
        names = torch.tensor([[*bag, 1][:2] for bag in BAGS])[batch["parts"].amax(1)]
        ids = torch.cat([torch.full((16, 1), 2), names], dim=1)
        labels = ids.masked_fill((ids < 3), -100)
        return {**batch, "input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}


def test_the_language_model_learns_to_write_from_frozen_queries(
    pretrained: ReadModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(pretrained).model
    before, task = copied(model), LanguagePretrain(model)
    first = task.losses(NamedSquares()[1000], torch.Generator())["loss"]
    fit(task, NamedSquares(), STEPS, tmp_path)
    assert task.losses(NamedSquares()[1000], torch.Generator())["loss"] < 0.2 * first
    same = unchanged(before, model)
    assert {name for name in before if name.startswith(("vision.", "qformer."))} <= same
    assert not {"projection.weight", "language.embed_tokens.weight"} & same


def test_fine_tuning_trains_every_part_and_keeps_the_queries_losses(
    pretrained: ReadModel, tmp_path: Path
) -> None:
    both = copy.deepcopy(pretrained)
    before = copied(both)
    task = QueryFinetune(both, read_weight=0.5, language_muon_scale=4.0, muon_scale=2.0)
    parts = task.losses(NamedSquares()[1000], torch.Generator())
    query_losses = QueryPretrain(pretrained).losses(NamedSquares()[1000], torch.Generator())
    assert parts["loss"].item() == pytest.approx(
        parts["text"].item() + 0.5 * query_losses["loss"].item(), rel=1e-5
    )
    rates = {
        group["lr_scale"]: {id(p) for p in group["params"]}
        for group in task.parameter_groups(0.1)
        if group["muon"]
    }
    assert id(both.model.language.layers[0].fc1.weight) in rates[4.0]
    assert id(both.model.qformer.layers[0].attention.output.dense.weight) in rates[2.0]
    fit(task, NamedSquares(), replace(STEPS, steps=40), tmp_path)
    assert task.losses(NamedSquares()[1000], torch.Generator())["text"] < 0.5 * parts["text"]
    for name in (
        "model.vision.layers.0.mlp.fc1.weight",
        "model.qformer.query_tokens",
        "readers.shown.weight",
    ):
        assert name not in unchanged(before, both), name
