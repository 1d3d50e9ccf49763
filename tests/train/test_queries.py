from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2.config import Blip2Config, OptConfig, QFormerConfig, VisionConfig
from blip2.model import Blip2
from blip2.qformer import Layer, QFormer
from blip2.train import FitOptions, fit
from blip2.train.pretrain import ImageTextEncoders, WordBag, bag_embeddings, initialise, say
from blip2.train.queries import QueryPretrain, QueryReaders, Spelling, SpellingModel, parts_of, stand
from blip2.vision import ImageEncoder

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
    assert isinstance(layer, Layer) and layer.crossattention is not None
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


def test_queries_learn_what_is_in_their_part_from_a_frozen_encoder(tmp_path: Path) -> None:
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    encoders = ImageTextEncoders(ImageEncoder(vision), WordBag(4, embedding=16))
    readers = QueryReaders(encoders, qformer())
    initialise(readers, seed=3)
    frozen = {name: p.clone() for name, p in encoders.vision.state_dict().items()}
    task = QueryPretrain(readers)
    first = task.losses(Squares()[1000], torch.Generator())
    fit(task, Squares(), FitOptions(steps=120, lr=5e-3, min_lr=1e-4, warmup_steps=5), tmp_path)
    last = task.losses(Squares()[1000], torch.Generator())
    for name, share in {"name": 0.1, "shown": 0.9, "place": 0.1}.items():
        assert last[name].item() < share * first[name].item(), name
    assert all(torch.equal(p, frozen[name]) for name, p in encoders.vision.state_dict().items())


@pytest.mark.parametrize("train_vision", [False, True])
def test_queries_learn_to_say_what_is_there_in_the_language_models_words(
    train_vision: bool, tmp_path: Path
) -> None:
    opt = OptConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=32,
    )
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    model = Blip2(Blip2Config(vision, CONFIG, opt, num_query_tokens=4))
    initialise(model, seed=6, std=0.3)
    speller = SpellingModel(model)
    kept = ("language.",) if train_vision else ("vision.", "language.")
    before = {name: p.clone() for name, p in model.state_dict().items()}

    class Said(Squares):
        """For each part what it shows: one of three bags, or a fourth for nothing."""

        def __getitem__(self, position: int) -> dict[str, Tensor]:
            batch = super().__getitem__(position)
            bags = torch.tensor([[3, -1], [4, 5], [6, 7], [8, -1]])
            said = batch["parts"] % 4
            spelled = torch.stack(
                [said, torch.where(said == 2, 3, -1)], dim=-1
            )  # one of them is said with another
            return {"pixels": batch["pixels"], "bags": bags, "spelled": spelled}

    task = Spelling(speller, train_vision=train_vision)
    first = task.losses(Said()[1000], torch.Generator())
    fit(task, Said(), FitOptions(steps=150, lr=5e-3, min_lr=1e-4, warmup_steps=5), tmp_path)
    last = task.losses(Said()[1000], torch.Generator())
    assert last["name"].item() < 0.1 * first["name"].item() and last["distance"].item() < 0.3
    same = {name for name, p in model.state_dict().items() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith(kept)} <= same
    assert train_vision == ("vision.layers.0.mlp.fc1.weight" not in same)
    with torch.inference_mode():
        words = bag_embeddings(model.language, Said()[0]["bags"])  # type: ignore[arg-type]
        features = model.vision(Said()[7]["pixels"])
        given = task.losses(Said()[7] | {"features": features}, torch.Generator())
        assert torch.equal(given["loss"], task.losses(Said()[7], torch.Generator())["loss"])
        said = model.embed_image(Said()[7]["pixels"])  # [B, 4, W]: the prefix itself is the words
        apart = (said - say(words, Said()[7]["spelled"])).norm(dim=-1)  # [B, Q]
        assert (apart < 0.5 * words.norm(dim=1).mean()).float().mean() > 0.95
