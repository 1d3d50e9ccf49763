from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blip2.config import OptConfig
from blip2.opt import Opt
from blip2.text import Tokenizer
from blip2.train.pretrain import LanguagePretrain, initialise
from default_model import batches, spelling
from default_model.batches import IGNORED, Tokenizers, caption_row, chat_row, half, pad, same
from default_model.easyvqa import EasyImage, middle
from default_model.language import Language
from default_model.materials import Cutouts
from default_model.scenes import Composer, Placed, Scene
from default_model.vocab import save_language, save_matcher, train_language, train_matcher


@pytest.fixture(scope="module")
def words(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = list(islice(language.text_corpus(random.Random(0)), 500))
    for name in ("language", "matcher"):
        (folder / f"tokenizer-{name}").mkdir()
    save_language(train_language(iter(text)), folder / "tokenizer-language")
    save_matcher(train_matcher(iter(text)), folder / "tokenizer-matcher")
    return Tokenizers.load(folder)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode([i for i in ids if i != IGNORED], skip_special=False)


def test_a_caption_is_a_target_and_its_prompt_is_not(words: Tokenizers) -> None:
    seen = set()
    for seed in range(20):
        ids, labels = caption_row(words, "a bear and two mice", random.Random(seed))
        assert decoded(words.language, labels) == " a bear and two mice\n"
        seen.add(decoded(words.language, ids))
        assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    assert seen == {"</s>a photo of a bear and two mice\n", "</s> a bear and two mice\n"}


def test_every_answer_of_a_conversation_is_a_target(words: Tokenizers) -> None:
    ids, labels = chat_row(words, [("what is it?", "a bear"), ("where is it?", "on the left")])
    assert decoded(words.language, ids) == (
        "</s>Question: what is it? Answer: a bear. Question: where is it? Answer: on the left\n"
    )
    assert decoded(words.language, labels) == " a bear\n on the left\n"
    differing = [(i, label) for i, label in zip(ids, labels, strict=True) if label not in (IGNORED, i)]
    (stop,) = words.language.encode(".", frame=False)
    assert differing == [(stop, words.newline)]  # an answer ends in a newline though a full stop stands there


def test_rows_are_padded_on_the_right() -> None:
    batch = pad([([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_equal_texts_share_an_id() -> None:
    assert same(["a bear", "a bus", "a bear"]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("shown", [0, 5, 20, 40, 61, 64])
def test_half_of_the_patches_prefers_those_that_show_something(shown: int) -> None:
    regions = torch.full((2, 64), -1)
    regions[:, :shown] = 3
    kept = half(regions, random.Random(0))
    assert kept.shape == (2, 32)
    for row in kept.tolist():
        assert len(set(row)) == 32 and row == sorted(row)
        assert sum(i < shown for i in row) == min(shown, max(24, 32 - (64 - shown)))


def test_a_batch_follows_from_its_position(
    words: Tokenizers, composer: object, language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches.language, "standard", lambda: language)
    made = batches.InstructionBatches(Path(), words, batch=3)
    made.pictures.composer, made.pictures.easy_share = composer, 0.0  # type: ignore[assignment]
    first, other, again = made[4], made[5], made[4]
    assert first["pixels"].shape == (3, 3, 128, 128)
    assert first["image_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


@pytest.fixture
def seen(
    words: Tokenizers,
    composer: Composer,
    cutouts: Cutouts,
    language: Language,
    monkeypatch: pytest.MonkeyPatch,
) -> batches.SceneBatches:
    monkeypatch.setattr(batches, "read_table", lambda: cutouts.rows)
    monkeypatch.setattr(spelling, "standard", lambda: language)
    made = batches.SceneBatches(Path(), words, {"bags": torch.tensor([[1]])}, batch=6)
    made.pictures.composer = composer
    return made


def test_queries_answer_for_the_things_whose_middles_their_parts_hold(seen: batches.SceneBatches) -> None:
    batch, rng = seen[3], seen.seeded.at(3)
    phrases = {number: phrase for phrase, number in seen.phrases.items()}
    assert batch["parts"].shape == (6, 16) and torch.equal(batch["bags"], torch.tensor([[1]]))
    for parts, places, spelled in zip(batch["parts"], batch["places"], batch["spelled"], strict=True):
        scene = seen.pictures.draw(rng)
        assert isinstance(scene, Scene)
        named = sorted(phrases[i] for i in parts.tolist() if i >= 0)
        assert named == sorted(f"{o.colour} {o.noun}" if o.colour else o.noun for o in scene.objects)
        middles = {((o.box[0] + o.box[2]) / 256, (o.box[1] + o.box[3]) / 256) for o in scene.objects}
        assert {tuple(place) for place in places[parts >= 0].tolist()} == middles
        assert spelled.tolist() == seen.speller.spell(scene)


def test_seen_batches_draw_rows_that_belong_together(seen: batches.SceneBatches, tmp_path: Path) -> None:
    batch = seen[0]
    features = torch.arange(6.0).half()[:, None, None].expand(-1, 5, 4).contiguous()
    stored = {"features": features, "spelled": batch["spelled"].short(), "parts": batch["parts"].short()}
    save_file(stored, tmp_path / "seen.safetensors")
    made = batches.SeenBatches(
        tmp_path / "seen.safetensors", ("spelled",), {"bags": seen.speller.bags}, "x", 9
    )
    drawn = made[2]
    assert drawn.keys() == {"features", "spelled", "bags"} and drawn["features"].dtype == torch.float32
    rows = drawn["features"][:, 0, 0].long()
    assert len(rows) == 9 and torch.equal(drawn["spelled"], batch["spelled"][rows])


def test_each_query_says_what_is_in_its_part_of_a_picture(
    words: Tokenizers, seen: batches.SceneBatches
) -> None:
    objects = (
        Placed("a", "bus", None, (100, 10, 120, 30), False),
        Placed("b", "teddy bear", "brown", (0, 60, 40, 80), False),
    )
    image, patches = np.zeros((128, 128, 3), np.uint8), np.full((8, 8), -1, np.int8)
    scene, speller = Scene(0, "train", image, objects, "", patches), seen.speller

    def words_of(spelled: spelling.Spelled) -> list[list[str]]:
        return [[speller.choices[i] for i in row if i >= 0] for row in spelled]

    said = words_of(speller.spell(scene))
    assert said[3] == ["bus", "8", "B", ","] and said[8] == ["teddy bear", "1", "F", "brown"]
    assert said.count(["."]) == 14
    assert words_of(speller.spell(None)) == [["."]] * 16
    bag = speller.bags[speller.choices.index("teddy bear")]
    assert decoded(words.language, [i for i in bag.tolist() if i >= 0]) == " teddy bear"
    easy = EasyImage(np.zeros((64, 64, 3), np.uint8), (), "a teal circle", (0.25, 0.95))
    assert words_of(speller.spell(easy))[13] == ["circle", "2", "J", "teal"]
    roughly = words_of(speller.spell(scene, random.Random(5)))
    assert roughly != said and sorted(row[0] for row in roughly) == sorted(row[0] for row in said)


def test_the_language_model_reads_pictures_in_words(
    words: Tokenizers, seen: batches.SceneBatches, language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        batches.easyvqa,
        "load",
        lambda *_: [EasyImage(np.zeros((64, 64, 3)), (("is it?", "yes"),) * 3, "a circle")],
    )
    monkeypatch.setattr(batches.language, "standard", lambda: language)
    made = batches.TextBatches(Path(), words, batch=12)
    batch = made[0]
    assert batch["spelled"].shape == (12, 16, 4) and len(batch["input_ids"]) == 12
    assert torch.equal(made[5]["input_ids"], made[5]["input_ids"])
    lm = Opt(
        OptConfig(
            vocab_size=len(words.language),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            max_position_embeddings=256,
        )
    )
    initialise(lm, seed=0)
    task = LanguagePretrain(lm)
    told = task.losses(batch, torch.Generator())["loss"]
    other = task.losses(batch | {"spelled": batch["spelled"].flip(0)}, torch.Generator())["loss"]
    assert told.isfinite() and not torch.equal(told, other)
    told.backward()
    assert lm.layers[0].fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("box", [(0, 0, 6, 6), (40, 10, 64, 20), (31, 33, 37, 64)])
def test_the_middle_of_easy_vqas_shape_is_read_off_its_pixels(box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    image = np.full((64, 64, 3), (250, 240, 244), np.uint8)
    image[top:bottom, left:right] = (255, 255, 0)
    assert middle(image) == ((left + right) / 128, (top + bottom) / 128)
    assert middle(np.full((64, 64, 3), 200, np.uint8)) == (0.5, 0.5)
