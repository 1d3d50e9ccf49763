"""The name tables: total in both directions, and layouts told apart by the content of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2.checkpoint import open_tensors
from blip2.checkpoint.formats import detect_layout
from blip2.checkpoint.formats.lavis import LAVIS
from blip2.checkpoint.formats.paddle import PADDLEMIX, PADDLENLP
from blip2.checkpoint.key_mapping import rename
from blip2.checkpoint.layouts import HUGGING_FACE, Layout

VARIANTS = ("opt", "opt-untied", "t5", "clip", "matcher", "matcher-itg")


@pytest.mark.parametrize("layout", [LAVIS, PADDLENLP, PADDLEMIX], ids=lambda layout: layout.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_goes_there_and_back(variant: str, layout: Layout, variants: dict[str, Path]) -> None:
    if layout is PADDLEMIX and variant == "clip":
        pytest.skip("PaddleMIX has no such encoder")
    with open_tensors(variants[variant]) as tensors:
        names = [*tensors]
    rules = layout.rules(names)
    foreign = [rename(name, rules) for name in names]
    assert None not in foreign
    assert len({*foreign}) == len(names)
    for name, other in zip(names, foreign, strict=True):
        assert other is not None
        assert rename(other, layout.all_rules, back=True) == name
        assert not layout.is_dropped(other)


def test_names_of_other_formats() -> None:
    """A few of each, as their own code spells them."""
    for layout, foreign, hugging_face in (
        (
            LAVIS,
            "visual_encoder.blocks.38.attn.proj.bias",
            "vision_model.encoder.layers.38.self_attn.projection.bias",
        ),
        (LAVIS, "visual_encoder.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
        (LAVIS, "ln_vision.weight", "vision_model.post_layernorm.weight"),
        (
            LAVIS,
            "Qformer.bert.encoder.layer.11.attention.self.query.weight",
            "qformer.encoder.layer.11.attention.attention.query.weight",
        ),
        (LAVIS, "opt_model.lm_head.weight", "language_model.lm_head.weight"),
        (LAVIS, "t5_model.shared.weight", "language_model.shared.weight"),
        (
            LAVIS,
            "visual_encoder.transformer.resblocks.21.attn.in_proj_weight",
            "vision_model.encoder.layers.21.self_attn.qkv.weight",
        ),
        (
            PADDLENLP,
            "language_model.opt.decoder.layers.31.linear2.weight",
            "language_model.model.decoder.layers.31.fc2.weight",
        ),
        (PADDLENLP, "language_model.lm_head.decoder_weight", "language_model.lm_head.weight"),
        (
            PADDLENLP,
            "language_model.t5.decoder.block.0.layer.2.DenseReluDense.wo.weight",
            "language_model.decoder.block.0.layer.2.DenseReluDense.wo.weight",
        ),
        (PADDLEMIX, "Qformer.ln_vision.bias", "vision_model.post_layernorm.bias"),
        (PADDLEMIX, "Qformer.language_projection.weight", "language_projection.weight"),
    ):
        assert rename(foreign, layout.all_rules, back=True) == hugging_face
    assert rename("Qformer.nonesuch", LAVIS.all_rules, back=True) is None
    assert LAVIS.is_dropped("Qformer.bert.embeddings.position_ids")
    assert LAVIS.is_dropped("Qformer.cls.predictions.decoder.weight")
    assert not LAVIS.is_dropped("Qformer.cls.predictions.bias")


def test_layouts_are_told_apart() -> None:
    assert detect_layout({"vision_model.post_layernorm.bias": (8,)}) is HUGGING_FACE
    assert detect_layout({"query_tokens": (1, 4, 8), "ln_vision.weight": (8,)}) is LAVIS
    assert detect_layout({"opt_model.lm_head.weight": (9, 8)}) is LAVIS
    assert detect_layout({"language_model.opt.decoder.final_layer_norm.bias": (8,)}) is PADDLENLP
    assert detect_layout({"Qformer.bert.x": (8,), "Qformer.ln_vision.bias": (8,)}) is PADDLEMIX
    linear = {"language_projection.weight": (24, 32), "language_projection.bias": (32,)}
    assert detect_layout(linear) is PADDLENLP  # [in, out]
    assert detect_layout(linear | {"language_projection.bias": (24,)}) is HUGGING_FACE
