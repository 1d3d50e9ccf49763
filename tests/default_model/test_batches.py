from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2.text import Tokenizer
from default_model import batches, stages
from default_model.batches import IGNORE_INDEX, Tokenizers, caption_row, chat_row, half, pad, same
from default_model.colours import COLOURS
from default_model.easyvqa import EasyImage
from default_model.language import Language
from default_model.materials import Cutouts
from default_model.queries import UNKNOWN
from default_model.scenes import Composer, Scene
from default_model.vocab import save_language, save_matcher, train_language, train_matcher


@pytest.fixture(scope="module")
def words(language: Language, tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizers")
    text = list(islice(language.text_corpus(random.Random(0)), 500))
    for name in ("language", "matcher"):
        (folder / f"tokenizer-{name}").mkdir()
    save_language(train_language(iter(text), language), folder / "tokenizer-language")
    save_matcher(train_matcher(iter(text), language), folder / "tokenizer-matcher")
    return Tokenizers.load(folder)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode([i for i in ids if i != IGNORE_INDEX], skip_special=False)


def test_a_caption_is_a_target_and_its_prompt_is_not(words: Tokenizers) -> None:
    texts = set()
    for seed in range(20):
        ids, labels = caption_row(words, "a bear and two mice", random.Random(seed))
        assert decoded(words.language, labels) == " a bear and two mice\n"
        texts.add(decoded(words.language, ids))
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels, strict=True))
    assert texts == {"</s>a photo of a bear and two mice\n", "</s> a bear and two mice\n"}


def test_every_answer_of_a_conversation_is_a_target(words: Tokenizers) -> None:
    ids, labels = chat_row(words, [("what is it?", "a bear"), ("where is it?", "on the left")])
    assert decoded(words.language, ids) == (
        "</s>Question: what is it? Answer: a bear. Question: where is it? Answer: on the left\n"
    )
    assert decoded(words.language, labels) == " a bear\n on the left\n"
    differing = [(i, label) for i, label in zip(ids, labels, strict=True) if label not in (IGNORE_INDEX, i)]
    (stop,) = words.language.encode(".", frame=False)
    # an answer's target ends in a newline, its input in a full stop
    assert differing == [(stop, words.newline)]


def test_rows_are_padded_on_the_right() -> None:
    batch = pad([([5, 6, 7], [IGNORE_INDEX, 6, 7]), ([8], [8])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
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
    words: Tokenizers,
    composer: Composer,
    cutouts: Cutouts,
    language: Language,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches.language, "standard", lambda: language)
    monkeypatch.setattr(batches, "read_table", lambda: cutouts.rows)
    data = batches.InstructionBatches(Path(), words, batch=3)
    data.pictures.composer, data.pictures.easy_share = composer, 0.0
    first, other, again = data[4], data[5], data[4]
    assert first["pixels"].shape == (3, 3, 128, 128)
    assert first["image_index"].tolist() == [0, 0, 1, 1, 2, 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


@pytest.fixture
def scenes(composer: Composer, cutouts: Cutouts, monkeypatch: pytest.MonkeyPatch) -> batches.SceneBatches:
    monkeypatch.setattr(batches, "read_table", lambda: cutouts.rows)
    data = batches.SceneBatches(Path(), batch=6)
    data.pictures.composer = composer
    return data


def test_queries_belong_to_the_objects_whose_middles_are_in_their_parts(scenes: batches.SceneBatches) -> None:
    batch, rng = scenes[3], scenes.seeded.at(3)
    phrases = {number: phrase for phrase, number in scenes.parts.phrases.items()}
    assert batch["parts"].shape == (6, 16) and len(batch["phrase_ids"]) == len(phrases)
    for parts, places in zip(batch["parts"], batch["places"], strict=True):
        scene = scenes.pictures.draw(rng)
        assert isinstance(scene, Scene)
        named = sorted(phrases[i] for i in parts.tolist() if i >= 0)
        assert named == sorted(f"{o.colour} {o.noun}" if o.colour else o.noun for o in scene.objects)
        middles = {((o.box[0] + o.box[2]) / 256, (o.box[1] + o.box[3]) / 256) for o in scene.objects}
        assert {tuple(place) for place in places[parts >= 0].tolist()} == middles


def test_easy_vqas_images_have_no_labels_for_queries(scenes: batches.SceneBatches) -> None:
    easy = EasyImage(np.zeros((64, 64, 3), np.uint8), (), "a teal circle")
    assert (scenes.parts.of([easy])["parts"] == UNKNOWN).all()


def test_every_noun_and_color_has_the_vector_of_its_phrases(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "standard", lambda: language)
    named = [*language.nouns, *(f"{colour} square" for colour in COLOURS)]
    phrases = {phrase: i for i, phrase in enumerate(named)}
    names = stages.name_vectors(phrases, torch.eye(len(named)))
    noun = next(noun for noun in language.nouns if noun != "square")
    assert names[noun][phrases[noun]] == 1 and names[noun].sum() == 1
    assert torch.equal(names[noun], names[language.nouns[noun].plural])
    assert names["red"][phrases["red square"]] == 1
    assert names.keys() >= set(COLOURS) | set(language.nouns)
