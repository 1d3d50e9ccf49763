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
from default_model.pretrain import ImageTextEncoders, WordBag, initialise
from default_model.queries import (
    UNKNOWN,
    LanguagePretrain,
    QueryFinetune,
    QueryPretrain,
    QueryReaders,
    ReadModel,
    parts_of,
    speak,
    stand,
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
    made = QFormer(replace(CONFIG, **changes), queries)
    initialise(made, seed=0)
    return made


def patches(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features in which places and things can be read off by a linear map, their middles, and what shows a thing."""
    generator = torch.Generator().manual_seed(1)
    middles = torch.rand(count, 2, generator=generator)
    shown = torch.rand(count, generator=generator) < 0.5
    held = torch.cat([middles, middles.square(), shown.float()[:, None]], dim=1)
    return held @ torch.randn(5, 32, generator=generator), middles, shown


def test_every_thing_gets_the_part_its_middle_is_in_or_the_nearest_free_one() -> None:
    middles = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [1.0, 1.0]])
    assert parts_of(middles, 4).tolist() == [0, 1, 2, 3]
    crowded = torch.tensor([[0.3, 0.3], [0.2, 0.4], [0.4, 0.2], [0.1, 0.1]])
    assert parts_of(crowded, 4).tolist() == [0, 2, 1, 3]
    assert parts_of(torch.tensor([[0.62, 0.3]]), 16).tolist() == [6]  # second row, third column


def test_queries_that_stand_look_at_what_has_its_middle_in_their_part() -> None:
    features, middles, shown = patches(400)
    made = qformer()
    before = made.query_tokens.detach().clone()
    stand(made, features, middles, shown, seed=2)
    assert not torch.equal(before, made.query_tokens)
    layer = made.layers[0]
    assert isinstance(layer, QFormerLayer) and layer.crossattention is not None
    read = layer.crossattention.attention
    with torch.inference_mode():
        query = read.query(layer.attention(made.layernorm(made.query_tokens)))[0]  # [Q, W]
        key = read.key(features)
        score = (
            query.unflatten(-1, (4, 8)).transpose(0, 1) @ key.unflatten(-1, (4, 8)).permute(1, 2, 0)
        ) / 8**0.5
        looks = score.softmax(-1)  # [H, Q, K]
    part = (middles * 2).long() @ torch.tensor([1, 2])
    for head in looks:
        for number, look in enumerate(head):
            assert float(look[(part == number) & shown].sum()) > 0.9


@pytest.mark.parametrize(
    "wrong", [{"queries": 5}, {"encoder_hidden_size": 64}, {"num_attention_heads": 16}, {"queries": 36}]
)
def test_a_qformer_that_cannot_stand_is_refused(wrong: dict[str, int]) -> None:
    features, middles, shown = patches(50)
    with pytest.raises(ValueError, match="cannot stand over image features"):
        stand(qformer(**wrong), features, middles, shown, seed=0)


class Squares:
    """Black images with one bright square in one of four parts; its phrase is its channel."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(position)
        pixels = torch.zeros(16, 3, 16, 16)
        parts = torch.full((16, 4), -1)
        places = torch.full((16, 4, 2), 0.5)
        for image, part, place in zip(pixels, parts, places, strict=True):
            where, what = (int(torch.randint(n, (1,), generator=generator)) for n in (4, 3))
            row, column = divmod(where, 2)
            image[what, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 2.0
            part[where] = what
            place[where] = torch.tensor([column * 0.5 + 0.25, row * 0.5 + 0.25])
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
    initialise(both, seed=3)
    return both


def unchanged(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.state_dict().items() if torch.equal(p, before[name])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in module.state_dict().items()}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> ReadModel:
    """A model whose queries have learned what is in their part."""
    both = read_model()
    fit(QueryPretrain(both), Squares(), STEPS, tmp_path_factory.mktemp("queries"))
    return both


def test_queries_learn_what_is_in_their_part_from_a_frozen_encoder(taught: ReadModel) -> None:
    before = read_model()
    first = QueryPretrain(before).losses(Squares()[1000], torch.Generator())
    last = QueryPretrain(taught).losses(Squares()[1000], torch.Generator())
    for name, share in {"name": 0.1, "shown": 0.9, "place": 0.1}.items():
        assert last[name].item() < share * first[name].item(), name
    same = unchanged(copied(before.model), taught.model)
    assert {name for name in same if not name.startswith("qformer.")} == {
        name for name in before.model.state_dict() if not name.startswith("qformer.")
    }
    assert "qformer.query_tokens" not in same


def test_images_of_which_nobody_knows_what_is_where_change_nothing(taught: ReadModel) -> None:
    batch, other = Squares()[3], Squares()[4]
    task = QueryPretrain(taught)
    both = {**batch, "pixels": torch.cat([batch["pixels"], other["pixels"]])}
    both["parts"] = torch.cat([batch["parts"], torch.full_like(other["parts"], UNKNOWN)])
    both["places"] = torch.cat([batch["places"], other["places"]])
    for name, loss in task.losses(batch, torch.Generator()).items():
        assert task.losses(both, torch.Generator())[name].item() == pytest.approx(loss.item(), rel=1e-5), name


BAGS = [[3], [4, 5], [6, 7]]  # the tokens of the three names


def test_queries_speak_the_language_models_words(taught: ReadModel) -> None:
    both = copy.deepcopy(taught)
    model, batch = both.model, Squares()[7]
    with torch.inference_mode():
        queries = model.qformer(model.vision(batch["pixels"]))
        names = both.readers.phrases(batch["phrase_ids"], batch["phrase_mask"])
    full = batch["parts"] >= 0
    speak(model, both.readers, queries.flatten(0, 1), full.flatten(), names, BAGS)
    with torch.inference_mode():
        said = model.project(queries)[full]  # [K, W]
        words = torch.stack([model.language.embed(torch.tensor(bag)).sum(0) for bag in BAGS])
        assert ((said @ words.mT).argmax(1) == batch["parts"][full]).all()
        assert torch.equal(model.language.lm_head.weight, model.language.embed_tokens.weight)


class Told(Squares):
    """For each image its name after the beginning of a text."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        batch = super().__getitem__(position)
        names = torch.tensor([[*bag, 1][:2] for bag in BAGS])[batch["parts"].amax(1)]
        ids = torch.cat([torch.full((16, 1), 2), names], dim=1)
        labels = ids.masked_fill((ids < 3), -100)
        return {**batch, "input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}


def test_the_language_model_learns_to_write_what_frozen_queries_hold(
    taught: ReadModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(taught).model
    before, task = copied(model), LanguagePretrain(model)
    first = task.losses(Told()[1000], torch.Generator())["loss"]
    fit(task, Told(), STEPS, tmp_path)
    assert task.losses(Told()[1000], torch.Generator())["loss"] < 0.2 * first
    same = unchanged(before, model)
    assert {name for name in before if name.startswith(("vision.", "qformer."))} <= same
    assert not {"projection.weight", "language.embed_tokens.weight"} & same


def test_fine_tuning_trains_every_part_and_holds_the_queries_to_what_they_say(
    taught: ReadModel, tmp_path: Path
) -> None:
    both = copy.deepcopy(taught)
    before = copied(both)
    task = QueryFinetune(both, read_weight=0.5, language_muon_scale=4.0, muon_scale=2.0)
    parts = task.losses(Told()[1000], torch.Generator())
    wrong = QueryPretrain(taught).losses(Told()[1000], torch.Generator())
    assert parts["loss"].item() == pytest.approx(parts["text"].item() + 0.5 * wrong["loss"].item(), rel=1e-5)
    rates = {
        group["lr_scale"]: {id(p) for p in group["params"]}
        for group in task.parameter_groups(0.1)
        if group["muon"]
    }
    assert id(both.model.language.layers[0].fc1.weight) in rates[4.0]
    assert id(both.model.qformer.layers[0].attention.output.dense.weight) in rates[2.0]
    fit(task, Told(), replace(STEPS, steps=40), tmp_path)
    assert task.losses(Told()[1000], torch.Generator())["text"] < 0.5 * parts["text"]
    for name in (
        "model.vision.layers.0.mlp.fc1.weight",
        "model.qformer.query_tokens",
        "readers.shown.weight",
    ):
        assert name not in unchanged(before, both), name
