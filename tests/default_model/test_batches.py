"""Training batches: pure functions of their positions, whose labels fit their inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from blip2.modeling.language import IGNORE_INDEX
from blip2.modeling.stem import fold
from blip2.text import Tokenizer
from default_model import batches
from default_model.batches import (
    EASY_PARTS,
    NO_OBJECT,
    UNKNOWN,
    Picture,
    Pictures,
    QueryTargets,
    Tokenizers,
    caption_row,
    chat_row,
    pad,
    same,
)
from default_model.easyvqa import EasyImage
from default_model.evidence import Sight
from default_model.kinds import Kind, Share
from default_model.language import Language
from default_model.recipe import PARTS, QUERIES
from default_model.scenes import Composer, Scene
from default_model.slots import EMPTY, OBJECT, PHOTOGRAPH, SCENE, slot_words

SHARES: dict[Share, float] = {"scene": 2, "easy": 1, "photograph": 1, "pasted": 1, "imagined": 1}


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode([i for i in ids if i != IGNORE_INDEX], skip_special=False)


# --- texts -----------------------------------------------------------------------------------------------------------


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


# --- whole batches ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path, Tokenizers], Any]] = {
    "language": lambda folder, words: batches.LanguageBatches(folder, words, 6),
    "queries": lambda folder, words: batches.QueryBatches(folder, words, SHARES, 8),
    "instruction": lambda folder, words: batches.InstructionBatches(folder, words, SHARES, batch=6),
    "match": lambda folder, words: batches.MatchBatches(folder, words, SHARES, 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_follows_from_its_position(kind: str, run_folder: Path, words: Tokenizers) -> None:
    first, anew = (KINDS[kind](run_folder, words) for _ in range(2))
    batch, other = first[4], first[5]
    again = anew[4]  # by another object, and not after the same ones
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert any(
        batch[name].shape != other[name].shape or not torch.equal(batch[name], other[name]) for name in batch
    )
    assert all(tensor.isfinite().all() for tensor in batch.values())


def test_batches_of_another_name_are_others(run_folder: Path, words: Tokenizers) -> None:
    one, other = (batches.InstructionBatches(run_folder, words, SHARES, name, 6)[0] for name in ("a", "b"))
    assert not torch.equal(one["pixels"], other["pixels"])


def test_instructions_belong_to_their_pictures(run_folder: Path, words: Tokenizers) -> None:
    batch = batches.InstructionBatches(run_folder, words, SHARES, batch=6)[2]
    assert batch["pixels"].shape == (6, 3, 128, 128) and batch["slot_kinds"].shape == (6, QUERIES)
    assert batch["image_index"].tolist() == [i // 2 for i in range(12)]  # a caption and a conversation each
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == batch["attention_mask"].shape
    assert (labels[batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert ((labels != IGNORE_INDEX).sum(1) > 0).all()
    texts = [decoded(words.language, row.tolist()) for row in ids]
    assert all("Question:" not in text for text in texts[::2])
    assert all("Question:" in text and "Answer:" in text for text in texts[1::2])


def test_the_language_model_reads_more_questions_than_captions(run_folder: Path, words: Tokenizers) -> None:
    batch = batches.LanguageBatches(run_folder, words, 40)[0]
    assert "pixels" not in batch and batch["slot_kinds"].shape == (40, QUERIES)
    rows = batch["image_index"].bincount(minlength=40)
    assert set(rows.tolist()) == {1, 2} and 2 <= (rows == 2).sum() <= 25


def test_equal_captions_of_a_batch_match_each_other(run_folder: Path, words: Tokenizers) -> None:
    batch = batches.MatchBatches(run_folder, words, SHARES, 24)[0]
    assert batch["pixels"].shape == (24, 3, 128, 128) and batch["ids"].shape[1] <= 32
    equal = (batch["ids"][:, None] == batch["ids"][None]).all(-1)
    assert torch.equal(equal, batch["image_ids"][:, None] == batch["image_ids"][None])


def test_imagined_evidence_needs_no_share_of_photographs(run_folder: Path) -> None:
    pictures = Pictures(run_folder, {"easy": 1.0, "photograph": 0.0, "imagined": 1.0})
    drawn = [pictures.draw(random.Random(seed)) for seed in range(12)]
    assert {type(picture.facts) for picture in drawn} == {EasyImage, Sight}
    assert set(pictures.banks) == {"easy", "photograph", "scene"}
    assert set(get_args(Kind)) >= set(pictures.banks)


def test_imagined_evidence_replaces_that_of_the_picture(run_folder: Path) -> None:
    pictures = Pictures(run_folder, {"imagined": 1.0})
    stored = [bank.cells(i) for bank in pictures.banks.values() for i in range(len(bank))]
    for seed in range(6):
        rng = random.Random(seed)
        picture = pictures.draw(rng)
        assert isinstance(picture.facts, Sight) and picture.cells is not None
        rng = random.Random(seed)
        rng.choices(["imagined"], [1.0])
        evidence = pictures.codes @ pictures.evidence.vector(pictures.evidence.imagine(rng))
        assert (picture.cells[-batches.CODE :] == evidence[:, None, None]).all()
        rest = picture.cells[: -batches.CODE]
        known = torch.stack([(rest == cells[: -batches.CODE]).flatten(1).all(1) for cells in stored])
        assert known.any(0).all()  # every channel is that of a stored picture


# --- what queries and cells are to say -------------------------------------------------------------------------------


def slots_of(words: Tokenizers, picture: Picture, seed: int = 0) -> Mapping[str, Tensor]:
    return QueryTargets(words.language).of([picture], random.Random(seed))


@pytest.mark.usefixtures("run_folder")
def test_cells_show_the_objects_that_cover_them(
    words: Tokenizers, composer: Composer, language: Language
) -> None:
    scene = composer.compose(5, objects=3)
    targets = slots_of(words, Picture(scene))
    covered = torch.from_numpy(scene.patch_object.astype("int64")).flatten()
    assert torch.equal(targets["cell_nouns"][0] == NO_OBJECT, covered < 0)
    for cell in range(64):
        if covered[cell] >= 0:
            placed = scene.objects[covered[cell]]
            assert language.all[int(targets["cell_nouns"][0, cell])] == placed.noun
            x0, y0, x1, y1 = placed.box
            middle = torch.tensor([x0 + x1, y0 + y1]) / (2 * scene.side)
            torch.testing.assert_close(targets["cell_places"][0, cell], middle)
    kinds = targets["slot_kinds"][0]
    assert (kinds == OBJECT).sum() == 3 and kinds[-1] == SCENE


@pytest.mark.usefixtures("run_folder")
def test_of_easy_vqas_stored_images_the_place_is_unknown(words: Tokenizers, composer: Composer) -> None:
    easy = EasyImage(np.zeros((64, 64, 3), np.uint8), (), "a teal circle")
    stored = slots_of(words, Picture(easy, torch.zeros(768, 8, 8)))
    assert (stored["cell_nouns"] == UNKNOWN).all()
    assert stored["slots_known"][0].tolist() == [0.0] * PARTS + [1.0]
    imagined = slots_of(words, Picture(easy))
    (part,) = (imagined["slot_kinds"][0] == OBJECT).nonzero().flatten().tolist()
    assert part in EASY_PARTS
    column, row = (imagined["slot_places"][0, part] * 4).long().tolist()
    assert row * 4 + column == part


def test_a_pasted_cut_out_is_named_whatever_the_stem_says(run_folder: Path, words: Tokenizers) -> None:
    picture = Pictures(run_folder, {"pasted": 1.0}).draw(random.Random(0))
    assert isinstance(picture.facts, Sight)
    assert (picture.facts.photo.noun, picture.facts.photo.colour) == ("apple", "red")
    targets = slots_of(words, picture)
    assert targets["slot_kinds"][0, -1] == PHOTOGRAPH and (targets["slot_kinds"][0, :-1] == EMPTY).all()
    one_hot = torch.eye(len(words.language))
    said = slot_words(one_hot, targets)[0, -1].nonzero().flatten().tolist()
    assert set(said) == set(words.language.encode(" apple", frame=False))


def test_stored_scenes_are_scenes(run_folder: Path) -> None:
    picture = Pictures(run_folder, {"scene": 1.0}).draw(random.Random(1))
    assert isinstance(picture.facts, Scene) and picture.cells is not None
    assert picture.cells.shape == (768, 8, 8) and picture.cells.dtype == torch.float32


def test_noise_is_on_the_maps_and_not_on_the_evidence(run_folder: Path) -> None:
    pictures = Pictures(run_folder, {"scene": 1.0})
    drawn = [pictures.draw(random.Random(seed)) for seed in range(3)]
    clean = [picture.cells.clone() for picture in drawn if picture.cells is not None]
    folded = batches.pixels_of(drawn, random.Random(1))
    before, after = fold(torch.stack(clean)), folded
    assert torch.equal(
        after,
        batches.pixels_of([Picture(p.facts, c) for p, c in zip(drawn, clean, strict=True)], random.Random(1)),
    )
    evidence = torch.ones(3, 768, 8, 8)
    evidence[:, : -batches.CODE] = 0
    silent = fold(evidence).bool()
    assert torch.equal(before[silent], after[silent])
    assert (after - before)[~silent].std().item() == pytest.approx(batches.CELL_NOISE, rel=0.05)
