"""Ours beside transformers: same weights, same input, equal outputs at every stage of the way from pixels to logits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
import reference
from reference import CLOSE, make_visible
from transformers import Blip2Config as TheirConfig
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from transformers.activations import ACT2FN

from blip2.checkpoint.key_mapping import from_hugging_face, to_hugging_face
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import ACTIVATIONS, VisionConfig, read_config
from blip2.modeling.layers import ACTIVATION
from blip2.modeling.vision import ImageEncoder

QUERIES, IMAGE_TOKEN = 5, 99

VISION = reference.VISION | {"num_hidden_layers": 3, "layer_norm_eps": 1e-5}
QFORMER = reference.QFORMER | {"num_hidden_layers": 4}
TEXT = reference.TEXT | {"hidden_size": 40, "word_embed_proj_dim": 40, "num_hidden_layers": 3, "ffn_dim": 72}


def renamed(module: nn.Module) -> dict[str, torch.Tensor]:
    ours = {}
    for name, tensor in module.state_dict().items():
        mine = from_hugging_face(name)
        assert mine is not None and to_hugging_face(mine) == name
        ours[mine] = tensor
    return ours


@pytest.fixture(
    scope="module", params=[{}, {"qkv_bias": False, "hidden_act": "quick_gelu"}], ids=["eva", "no-qkv-bias"]
)
def generators(request: pytest.FixtureRequest) -> tuple[Blip2ForConditionalGeneration, Blip2]:
    config = TheirConfig(
        vision_config=VISION | request.param,
        qformer_config=QFORMER,
        text_config=TEXT,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    theirs = make_visible(Blip2ForConditionalGeneration(config))
    ours = Blip2(read_config(config.to_dict())).eval()  # type: ignore[arg-type]
    ours.load_state_dict(renamed(theirs), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def matchers() -> tuple[Blip2ForImageTextRetrieval, Blip2Matcher]:
    config = TheirConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=TEXT,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        architectures=["Blip2ForImageTextRetrieval"],
    )
    theirs = make_visible(Blip2ForImageTextRetrieval(config))
    ours = Blip2Matcher(read_config(config.to_dict()), itg=False).eval()  # type: ignore[arg-type]
    ours.load_state_dict(renamed(theirs), strict=True)
    return theirs, ours


def inputs(batch: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, and text padded on the left by a different amount in each row."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    ids = torch.randint(3, 60, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, :row] = 0
        ids[row, :row] = 1
    return pixels, ids, mask


def as_theirs(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """transformers wants a place-holder token for every query."""
    return {
        "input_ids": F.pad(ids, (QUERIES, 0), value=IMAGE_TOKEN),
        "attention_mask": F.pad(mask, (QUERIES, 0), value=1),
    }


@torch.inference_mode()
def test_image_features_queries_and_prefix(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    theirs, ours = generators
    pixels = inputs()[0]
    features = ours.vision(pixels)
    out = theirs.get_image_features(pixels, return_dict=True)
    torch.testing.assert_close(features, out.last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.qformer(features), out.qformer_outputs.last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.embed_image(pixels), out.pooler_output, **CLOSE)


@torch.inference_mode()
def test_clips_image_encoder() -> None:
    """A norm before the blocks and no bias on the patches: LAVIS's ViT-L is CLIP's without its last block."""
    sizes = {name: size for name, size in VISION.items() if name != "layer_norm_eps"}
    theirs = make_visible(CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu")))
    config = VisionConfig(
        **{**sizes, "num_hidden_layers": 2}, hidden_act="quick_gelu", layer_norm_eps=1e-5, pre_norm=True
    )
    ours = make_visible(ImageEncoder(config), seed=1)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    mine = {
        "class_embedding": state["embeddings.class_embedding"][None, None],
        "position_embedding": state["embeddings.position_embedding.weight"][None],
        "patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "post_layernorm.weight": ours.state_dict()["post_layernorm.weight"],
        "post_layernorm.bias": ours.state_dict()["post_layernorm.bias"],
        "pre_layernorm.weight": state["pre_layrnorm.weight"],
        "pre_layernorm.bias": state["pre_layrnorm.bias"],
    }
    for i, end in itertools.product(range(2), ("weight", "bias")):
        there = f"encoder.layers.{i}."
        qkv = [state[f"{there}self_attn.{part}_proj.{end}"] for part in "qkv"]
        mine[f"layers.{i}.self_attn.qkv.{end}"] = torch.cat(qkv)
        mine[f"layers.{i}.self_attn.projection.{end}"] = state[f"{there}self_attn.out_proj.{end}"]
        for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
            mine[f"layers.{i}.{part}.{end}"] = state[f"{there}{part}.{end}"]
    ours.load_state_dict(mine, strict=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(ours(pixels), ours.post_layernorm(hidden), **CLOSE)
    assert read_config({"model_type": "blip-2", "vision_config": dataclasses.asdict(config)}).vision == config


@torch.inference_mode()
@pytest.mark.parametrize("size", [(48, 48), (24, 56)])
def test_interpolated_positions(
    generators: tuple[Blip2ForConditionalGeneration, Blip2], size: tuple[int, int]
) -> None:
    theirs, ours = generators
    pixels = torch.randn(2, 3, *size)
    expected = theirs.get_image_features(pixels, interpolate_pos_encoding=True, return_dict=True)
    torch.testing.assert_close(ours.vision(pixels, interpolate=True), expected.last_hidden_state, **CLOSE)
    with pytest.raises(ValueError, match="interpolate=True"):
        ours.vision(pixels)


@torch.inference_mode()
def test_logits_with_padding(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    theirs, ours = generators
    pixels, ids, mask = inputs()
    padded = as_theirs(ids, mask)
    expected = theirs(pixels, **padded).logits
    kept = padded["attention_mask"].bool()
    torch.testing.assert_close(ours(pixels, ids, mask)[kept], expected[kept], **CLOSE)


@pytest.mark.parametrize("name", ACTIVATION)
def test_activations(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATION[name](x), ACT2FN[name](x), rtol=0.0, atol=1e-6)
    assert name in ACTIVATIONS


@torch.inference_mode()
def test_padding_changes_nothing(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    _, ours = generators
    pixels, ids, mask = inputs()
    together = ours(pixels, ids, mask)
    for row in range(len(ids)):
        kept = mask[row].bool()
        alone = ours(pixels[row : row + 1], ids[row : row + 1, kept], None)
        torch.testing.assert_close(alone[0, QUERIES:], together[row, QUERIES:][kept], **CLOSE)


def test_loss_and_gradient(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    theirs, ours = generators
    pixels, ids, mask = inputs()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 3] = -100
    expected = theirs(pixels, **as_theirs(ids, mask), labels=F.pad(labels, (QUERIES, 0), value=-100)).loss
    loss = ours.loss(pixels, ids, mask, labels)
    torch.testing.assert_close(loss, expected, **CLOSE)
    (theirs_grad,) = torch.autograd.grad(expected, [theirs.query_tokens])
    (ours_grad,) = torch.autograd.grad(loss, [ours.qformer.query_tokens])
    torch.testing.assert_close(ours_grad, theirs_grad, **CLOSE)


@torch.inference_mode()
def test_one_prefill_serves_every_row(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    """Stepping from one reading of the prompt, with rows reordered and prompts dropped, equals reading it all again."""
    _, ours = generators
    pixels, ids, mask = inputs()
    prefix = ours.embed_image(pixels)
    whole = ours.prefill(prefix, ids, mask, rows=2, max_new_tokens=4)
    split = ours.prefill(
        prefix, ids, mask, rows=2, max_new_tokens=4, prompt_cache=ours.prefill_prefix(prefix)
    )
    for decoding in (whole, split):
        torch.testing.assert_close(decoding.logits, ours(pixels, ids, mask)[:, -1], **CLOSE)
        decoding.decode_step(torch.tensor([10, 11, 12, 13, 14, 15]))
        decoding.reorder_cache(torch.tensor([1, 0, 3, 3, 4, 5]))
        decoding.decode_step(torch.tensor([20, 21, 22, 23, 24, 25]))
        decoding.batch_select_indices(torch.tensor([0, 2]))
        logits = decoding.decode_step(torch.tensor([30, 31, 32, 33]))
        rows = torch.tensor([0, 0, 2, 2])
        new = torch.tensor([[11, 20, 30], [10, 21, 31], [14, 24, 32], [15, 25, 33]])
        again = ours(pixels[rows], torch.cat([ids[rows], new], dim=1), F.pad(mask[rows], (0, 3), value=1))
        torch.testing.assert_close(logits, again[:, -1], **CLOSE)


@torch.inference_mode()
def test_too_long_a_text_is_an_error(generators: tuple[Blip2ForConditionalGeneration, Blip2]) -> None:
    _, ours = generators
    with pytest.raises(ValueError, match="69 positions but the language model has 64"):
        ours(torch.zeros(1, 3, 32, 32), torch.full((1, 64), 5))


@torch.inference_mode()
def test_matching_and_contrast(matchers: tuple[Blip2ForImageTextRetrieval, Blip2Matcher]) -> None:
    theirs, ours = matchers
    pixels, ids, mask = inputs()
    mask = mask.flip(1)  # the matcher's text is padded on the right
    features = ours.vision(pixels)
    expected = theirs(pixels, ids, attention_mask=mask, use_image_text_matching_head=True)
    torch.testing.assert_close(ours.itm_logits(features, ids, mask), expected.logits_per_image, **CLOSE)
    expected = theirs(pixels, ids, attention_mask=mask, use_image_text_matching_head=False)
    image, text = ours.image_embeddings(features), ours.text_embeddings(ids, mask)
    torch.testing.assert_close(image, expected.image_embeds, **CLOSE)
    torch.testing.assert_close(text, expected.text_embeds, **CLOSE)
    similarity = torch.einsum("iqe,te->itq", image, text).amax(-1)
    torch.testing.assert_close(similarity, expected.logits_per_image, **CLOSE)


@torch.inference_mode()
def test_writing_text_leaves_the_queries_as_they_are() -> None:
    """One pass serves ITC and ITG: queries do not see text, and text sees only what stands before it."""
    config = TheirConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=TEXT,
        num_query_tokens=QUERIES,
        architectures=["Blip2ForImageTextRetrieval"],
    )
    ours = make_visible(Blip2Matcher(read_config(config.to_dict())))  # type: ignore[arg-type]
    assert isinstance(ours, Blip2Matcher)
    pixels, ids, _ = inputs()
    mask = torch.ones_like(ids)
    features = ours.vision(pixels)
    queries, logits = ours.queries_and_text_logits(features, ids, mask)
    torch.testing.assert_close(queries, ours.qformer(features), **CLOSE)
    changed = ids.clone()
    changed[:, 4:] = 7
    torch.testing.assert_close(ours.text_logits(features, changed, mask)[:, :4], logits[:, :4], **CLOSE)
    assert not torch.allclose(ours.text_logits(features.flip(0), ids, mask), logits)
