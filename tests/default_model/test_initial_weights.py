"""The initial weights do what their comments say, before any training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig, VisionConfig
from blip2.modeling.opt import Opt
from blip2.modeling.qformer import QFormer, QFormerLayer
from blip2.modeling.vision import ImageEncoder
from default_model.batches import Tokenizers
from default_model.initial_weights import (
    init_matching_heads,
    init_mimetic,
    init_query_attention,
    init_weights,
    init_word_embeddings,
    qformer_from_matcher,
)
from default_model.language import Language
from default_model.namer import CODE, name_codes
from default_model.recipe import PARTS, QUERIES
from default_model.vocab import name_bags

VISION = VisionConfig(32, 64, 2, 2, image_size=16, patch_size=4)
QFORMER = QFormerConfig(
    vocab_size=30,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    max_position_embeddings=16,
    encoder_hidden_size=32,
    cross_attention_frequency=1,
)
LANGUAGE = OptConfig(
    vocab_size=40,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    max_position_embeddings=32,
)


def matcher() -> Blip2Matcher:
    model = Blip2Matcher(MatcherConfig(VISION, replace(QFORMER, use_qformer_text_input=True), 3, 16))
    init_weights(model, 0, std=0.1)
    return model


# --- queries ---------------------------------------------------------------------------------------------------------


def qformer(queries: int = QUERIES, **changes: int) -> QFormer:
    model = QFormer(replace(QFORMER, **changes), queries)
    init_weights(model, seed=0)
    return model


def patches(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features that a linear map takes to places and objectness, their middles, and which show an object."""
    generator = torch.Generator().manual_seed(1)
    middles = torch.rand(count, 2, generator=generator)
    shown = torch.rand(count, generator=generator) < 0.5
    content = torch.cat([middles, middles.square(), shown.float()[:, None]], dim=1)
    return content @ torch.randn(5, 32, generator=generator), middles, shown


def test_initial_queries_attend_to_the_object_whose_middle_is_in_their_part() -> None:
    features, middles, shown = patches(3000)
    model = qformer()
    init_query_attention(model, features, middles, shown, seed=2)
    layer = model.layers[0]
    assert isinstance(layer, QFormerLayer) and layer.crossattention is not None
    cross = layer.crossattention.attention
    with torch.inference_mode():
        query = cross.query(layer.attention(model.layernorm(model.query_tokens)))[0]  # [Q, W]
        key = cross.key(features)
        heads = query.unflatten(-1, (4, 8)).transpose(0, 1), key.unflatten(-1, (4, 8)).permute(1, 2, 0)
        attention = (heads[0] @ heads[1] / 8**0.5).softmax(-1)  # [H, Q, K]
    assert (attention * shown).sum(-1)[:, :PARTS].min() > 0.9
    mean = attention @ middles  # [H, Q, 2]
    for part in range(PARTS):
        centre = torch.tensor([part % 4 + 0.5, part // 4 + 0.5]) / 4
        torch.testing.assert_close(mean[:, part], centre.expand(4, -1), atol=0.08, rtol=0)
    torch.testing.assert_close(mean[:, PARTS], torch.full((4, 2), 0.5), atol=0.05, rtol=0)  # everywhere


@pytest.mark.parametrize(
    "wrong", [{"queries": 15}, {"queries": 36}, {"encoder_hidden_size": 64}, {"num_attention_heads": 16}]
)
def test_a_qformer_of_another_shape_is_refused(wrong: dict[str, int]) -> None:
    features, middles, shown = patches(50)
    with pytest.raises(ValueError, match="cannot be aimed at image features"):
        init_query_attention(qformer(**wrong), features, middles, shown, seed=0)


# --- language model --------------------------------------------------------------------------------------------------


def test_a_noun_has_one_vector_in_every_letter_case(language: Language, words: Tokenizers) -> None:
    opt = Opt(replace(LANGUAGE, vocab_size=len(words.language), hidden_size=CODE))
    init_weights(opt, 0, std=0.001)
    codes = name_codes(language.noun_categories)
    bags = name_bags(language, lambda text: words.language.encode(text, frame=False))
    nouns = [noun for noun in codes if " " not in noun]
    forms = [form for noun in nouns for form in bags[noun]]
    vectors = torch.stack([codes[noun] for noun in nouns for _ in bags[noun]])
    init_word_embeddings(opt, vectors, forms, seed=7)
    with torch.inference_mode():
        sums = torch.stack([opt.embed_tokens.weight[form].sum(0) for form in forms])
    likeness = torch.nn.functional.cosine_similarity(sums[:, None], sums[None], dim=-1)
    same = (vectors[:, None] == vectors[None]).all(-1)
    assert len({tuple(form) for form in bags["bear"]}) == 3
    assert likeness[same].min() > 0.95
    assert torch.allclose(likeness, vectors @ vectors.mT, atol=0.1)
    assert (sums.norm(dim=1) - 1).abs().max() < 0.15


def test_mimetic_start() -> None:
    """Query and key weights correlate, value and output weights negate, patches have distinct positions."""
    encoder = ImageEncoder(VisionConfig(64, 128, 2, 2, image_size=32, patch_size=4))
    init_weights(encoder, 0)
    init_mimetic(encoder, 0)
    width = 64
    for layer in encoder.layers:
        query, key, value = layer.self_attn.qkv.weight.chunk(3)
        half = width // 2  # of the first head
        meeting = query[:half].mT @ key[:half]
        assert meeting.diagonal().mean() > 5 * meeting.fill_diagonal_(0).mean().abs()
        handed_on = layer.self_attn.projection.weight @ value
        assert -0.6 < handed_on.diagonal().mean() < -0.2
    places = encoder.position_embedding[0, 1:]
    assert torch.pdist(places).min() > 0.1
    assert (encoder.position_embedding[0, 0].abs() <= 0.04).all()


def test_matching_heads_look_for_equal_tokens() -> None:
    language = Opt(LANGUAGE)
    init_weights(language, 0)
    init_matching_heads(language, 0)
    ids = torch.tensor([[2, 7, 11, 5, 30, 8, 19, 7]])  # the last is the second of an equal pair
    x = language.embed(ids) + language.embed_positions(torch.arange(2, 10))
    first = language.layers[0]
    query, key, _ = first.self_attn._project(first.self_attn_layer_norm(x))
    scores = (query @ key.mT)[0, :, -1, :-1]  # [heads, earlier tokens]
    assert (scores[:2].argmax(-1) == 1).all()
    second = scores[:2].topk(2).values[:, 1]
    assert (scores[:2, 1] > 2 * second).all()


def test_initialise() -> None:
    model = matcher()
    for name, p in model.named_parameters():
        if "norm" in name.lower():
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif "bias" in name:
            assert (p == 0).all(), name
        elif p.ndim >= 2:
            assert 0.05 < p.std() < 0.12, name
            assert p.abs().max() <= 0.2, name
    assert model.temp is not None
    assert model.temp.item() == pytest.approx(0.07)
    layer = model.qformer.layers[0]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
    assert torch.equal(model.vision.patch_embedding.weight, matcher().vision.patch_embedding.weight)


def test_stage_1_hands_over_to_stage_2() -> None:
    source, target = matcher(), Blip2(Blip2Config(VISION, QFORMER, LANGUAGE, 3))
    init_weights(target, 1, std=0.1)
    qformer_from_matcher(source, target)
    image = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target.qformer(target.vision(image)), source.qformer(source.vision(image)))
    smaller = Blip2(Blip2Config(VISION, replace(QFORMER, num_hidden_layers=1), LANGUAGE, 3))
    with pytest.raises(ValueError, match=r"qformer does not fit.*layers\.1"):
        qformer_from_matcher(source, smaller)
