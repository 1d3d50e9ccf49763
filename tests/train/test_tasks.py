"""The tasks: the losses they add up, what they freeze, and that a small batch can be memorized."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig, T5Config, VisionConfig
from blip2.train import FitOptions, Task, fit, losses, plots
from blip2.train.recipes import coco_caption, coco_retrieval, stage1, stage2
from blip2.train.tasks import Finetune, Stage1, Stage2
from default_model.initial_weights import init_weights

VISION = VisionConfig(32, 64, 2, 2, image_size=16, patch_size=4)
QFORMER = QFormerConfig(
    vocab_size=30,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    max_position_embeddings=16,
    encoder_hidden_size=32,
)
LANGUAGE = OptConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=64,
    max_position_embeddings=32,
)
T5_LANGUAGE = T5Config(
    vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2
)
DEC = 29
B = 4


def matcher() -> Blip2Matcher:
    model = Blip2Matcher(
        MatcherConfig(VISION, dataclasses.replace(QFORMER, use_qformer_text_input=True), 3, 16)
    )
    init_weights(model, 0, std=0.1)
    return model


def writer(language: OptConfig | T5Config = LANGUAGE) -> Blip2:
    model = Blip2(Blip2Config(VISION, QFORMER, language, 3))
    init_weights(model, 1, std=0.1)
    return model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def texts(vocabulary: int = 28) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, vocabulary, (B, 6), generator=generator())
    mask = torch.ones_like(ids)
    ids[1, 4:] = mask[1, 4:] = 0
    return ids, mask


def pixels() -> Tensor:
    return torch.randn(B, 3, 16, 16, generator=generator())


def matching_batch() -> dict[str, Tensor]:
    ids, mask = texts()
    return {"pixels": pixels(), "ids": ids, "mask": mask}


def writing_batch() -> dict[str, Tensor]:
    ids, mask = texts()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"pixels": pixels(), "input_ids": ids, "attention_mask": mask, "labels": labels}


class Same:
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __getitem__(self, position: int) -> Any:
        return self.batch


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "draw", lambda *_: None)


def learn(task: Task, batch: Any, folder: Path, steps: int = 60, lr: float = 3e-3) -> tuple[float, float]:
    """Train on one batch: the loss before and after."""
    before = task.losses(batch, generator())["loss"].item()
    fit(task, Same(batch), FitOptions(steps=steps, lr=lr, warmup_steps=3, log_every=steps), folder)
    return before, task.losses(batch, generator())["loss"].item()


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Children of the module with a parameter that is not what it was."""
    return {n.split(".")[0] for n, p in module.named_parameters() if not torch.equal(p, before[n])}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_stage1_losses_are_the_published_ones() -> None:
    model, batch = matcher(), matching_batch()
    ours = Stage1(model, DEC).losses(batch, generator())
    with torch.no_grad():
        features = model.vision(batch["pixels"])
        images, captions = (
            model.image_embeddings(features),
            model.text_embeddings(batch["ids"], batch["mask"]),
        )
        similarity = losses.query_similarity(images, captions, 0.07)
        itc = losses.contrast(similarity)
        assert ours["itc"].item() == pytest.approx(itc.item(), rel=1e-5)
        itg_ids = torch.cat([torch.full((B, 1), DEC), batch["ids"][:, 1:]], dim=1)
        logits = model.text_logits(features, itg_ids, batch["mask"])
        target = itg_ids.masked_fill(batch["mask"] == 0, -100)[:, 1:].flatten()
        itg = F.cross_entropy(logits[:, :-1].flatten(0, 1), target, ignore_index=-100, label_smoothing=0.1)
        assert ours["itg"].item() == pytest.approx(itg.item(), rel=1e-5)
        text, image = losses.hard_negatives(similarity, similarity.T, generator())
        right = model.itm_logits(features, batch["ids"], batch["mask"])
        wrong_image = model.itm_logits(features[image], batch["ids"], batch["mask"])
        wrong_text = model.itm_logits(features, batch["ids"][text], batch["mask"][text])
        itm = -torch.cat(
            [right.log_softmax(1)[:, 1], wrong_image.log_softmax(1)[:, 0], wrong_text.log_softmax(1)[:, 0]]
        ).mean()
        assert ours["itm"].item() == pytest.approx(itm.item(), rel=1e-4)
    assert ours["loss"].item() == pytest.approx(sum(ours[n].item() for n in ("itc", "itm", "itg")), rel=1e-6)


def test_stage1_learns_and_leaves_the_image_encoder(tmp_path: Path) -> None:
    model = matcher()
    before = snapshot(model)
    first, last = learn(Stage1(model, DEC), matching_batch(), tmp_path)
    assert last < 0.5 * first
    assert changed(model, before) == {
        "qformer", "vision_projection", "text_projection", "itm_head", "itg_head", "temp"
    }  # fmt: skip
    assert not model.vision.training
    assert model.qformer.training


def test_features_may_replace_pixels() -> None:
    model, batch = matcher(), matching_batch()
    task = Stage1(model, DEC)
    with torch.no_grad():
        features = model.vision(batch["pixels"])
        from_features = task.losses(
            {"features": features, **{k: batch[k] for k in ("ids", "mask")}}, generator()
        )
        assert torch.equal(from_features["loss"], task.losses(batch, generator())["loss"])


def test_retrieval_fine_tuning_trains_the_image_encoder(tmp_path: Path) -> None:
    model = matcher()
    before = snapshot(model)
    task = Stage1(model, DEC, train_vision=True, vision_layer_decay=0.5)
    ids = torch.tensor([0, 0, 1, 2])
    learn(task, matching_batch() | {"image_ids": ids}, tmp_path, steps=2)
    assert "vision" in changed(model, before)
    scales = {
        next(n for n, p in model.named_parameters() if p is group["params"][0]): group["lr_scale"]
        for group in task.parameter_groups(0.05)
    }
    assert scales["vision.class_embedding"] == 0.5**3
    assert scales["vision.layers.0.layer_norm1.weight"] == 0.5**2
    assert scales["vision.layers.1.layer_norm1.weight"] == 0.5
    assert sum(len(g["params"]) for g in task.parameter_groups(0.05)) == len(list(model.parameters()))
    full = next(
        g
        for g in task.parameter_groups(0.05)
        if any(p is model.vision.post_layernorm.weight for p in g["params"])
    )
    assert full["lr_scale"] == 1


def test_muon_gets_the_trained_matrices_of_blocks_and_nothing_else(tmp_path: Path) -> None:
    model = matcher()
    task = Stage1(model, DEC, muon_scale=4.0)
    named = {id(p): name for name, p in model.named_parameters()}
    groups = task.parameter_groups(0.05)
    by_muon = {named[id(p)] for g in groups if g["muon"] for p in g["params"]}
    assert all(g["lr_scale"] == (4.0 if g["muon"] else 1.0) for g in groups)
    assert by_muon == {
        name for name, p in model.named_parameters() if name.startswith("qformer.layers.") and p.ndim == 2
    }
    first, last = learn(task, matching_batch(), tmp_path)
    assert last < first


def test_a_matcher_without_itg_cannot_be_trained() -> None:
    config = MatcherConfig(VISION, dataclasses.replace(QFORMER, use_qformer_text_input=True), 3, 16)
    with pytest.raises(ValueError, match="itg=True"):
        Stage1(Blip2Matcher(config, itg=False), DEC)


# --- stage 2 and fine-tuning -----------------------------------------------------------------------------------------


def test_stage2_loss_is_the_models() -> None:
    model, batch = writer(), writing_batch()
    ours = Stage2(model).losses(batch, generator())["loss"]
    theirs = model.loss(*(batch[k] for k in ("pixels", "input_ids", "attention_mask", "labels")))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_several_texts_of_an_image() -> None:
    model, batch = writer(), writing_batch()
    index = torch.tensor([0, 0, 1, 1])
    short = batch | {"pixels": batch["pixels"][:2], "image_index": index}
    long = batch | {"pixels": batch["pixels"][:2][index]}
    task = Stage2(model)
    ours, theirs = (task.losses(b, generator())["loss"].item() for b in (short, long))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_rows_of_one_length_together_give_the_same_loss() -> None:
    model, few = writer(), writing_batch()
    rows = torch.arange(60) % 4
    batch = {name: value[rows].clone() for name, value in few.items()}
    for row in range(60):
        end = 2 + row % (batch["input_ids"].shape[1] - 1)
        batch["attention_mask"][row, end:], batch["labels"][row, end:] = 0, -100
    batch["labels"][:30:3] = -100  # rows with nothing to learn from
    task = Stage2(model)
    task.losses(batch, generator())["loss"].backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model.loss(*(batch[k] for k in ("pixels", "input_ids", "attention_mask", "labels")))
    loss.backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert task.losses(batch, generator())["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_stage2_learns_through_a_frozen_language_model(tmp_path: Path) -> None:
    model = writer()
    before = snapshot(model)
    first, last = learn(Stage2(model), writing_batch(), tmp_path, lr=1e-2)
    assert last < 0.9 * first  # the language model is a random one
    assert changed(model, before) == {"qformer", "projection"}
    assert not model.vision.training
    assert not model.language.training


@pytest.mark.parametrize("train_language", [False, True])
def test_fine_tuning(tmp_path: Path, train_language: bool) -> None:
    model = writer()
    before = snapshot(model)
    task = Finetune(model, vision_layer_decay=0.9, train_language=train_language)
    first, last = learn(task, writing_batch(), tmp_path, steps=40)
    assert last < (0.2 if train_language else 0.9) * first
    assert changed(model, before) == {"vision", "qformer", "projection"} | (
        {"language"} if train_language else set()
    )


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_training_with_t5(tmp_path: Path, fine_tuned: bool) -> None:
    model, batch = writer(T5_LANGUAGE), writing_batch()
    mask = batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)[:, 1:]  # of another length
    before = snapshot(model)
    task = Finetune(model, train_language=True, muon_scale=1.0) if fine_tuned else Stage2(model)
    theirs = model.loss(*(batch[k] for k in ("pixels", "input_ids", "attention_mask", "labels")))
    assert task.losses(batch, generator())["loss"].item() == pytest.approx(theirs.item(), rel=1e-6)
    if fine_tuned:
        by_muon = {id(p) for g in task.parameter_groups(0.05) if g["muon"] for p in g["params"]}
        named = {name: id(p) in by_muon for name, p in model.language.named_parameters()}
        assert named["decoder.layers.0.layer.1.EncDecAttention.q.weight"]
        assert not named["encoder.relative_attention_bias.weight"]
    first, last = learn(task, batch, tmp_path, steps=40, lr=1e-2)
    assert last < (0.5 if fine_tuned else 0.9) * first
    assert changed(model, before) == {"qformer", "projection"} | (
        {"vision", "language"} if fine_tuned else set()
    )


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_are_the_published_ones() -> None:
    options = stage1().options(1000)
    assert (options.steps, options.lr, options.min_lr, options.warmup_steps) == (10000, 1e-4, 1e-5, 5000)
    assert (stage2().warmup_steps, stage2().batch_size, stage2().max_tokens) == (2000, 64, 32)
    assert (coco_caption().image_size, coco_caption().warmup_lr, coco_caption().min_lr) == (364, 1e-8, 0)
    assert coco_retrieval().vision_layer_decay == 0.95
    assert stage1().options(1000, accumulate=4).steps == 2500
