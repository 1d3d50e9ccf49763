"""Every variant of the family, tiny and random, as a folder in Hugging Face's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import END_OF_TEXT, PAD, make_visible, write_bert_tokenizer, write_opt_tokenizer

from blip2.checkpoint import save_model
from blip2.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig, T5Config, VisionConfig
from blip2.model import Blip2, Blip2Matcher

VARIANTS = ("opt", "opt-untied", "t5", "clip", "matcher", "matcher-itg")

# Widths by which the attention heads of EVA-CLIP (88) and of CLIP and BERT (64) are told.
EVA = VisionConfig(
    hidden_size=88,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=32,
    patch_size=8,
)
CLIP = replace(EVA, hidden_size=64, hidden_act="quick_gelu", layer_norm_eps=1e-5, pre_norm=True)


def qformer(vision: VisionConfig, vocabulary: int, *, text: bool = False) -> QFormerConfig:
    return QFormerConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=40,
        max_position_embeddings=20,
        encoder_hidden_size=vision.hidden_size,
        use_qformer_text_input=text,
    )


def make(variant: str, newline: int, bert_words: int) -> Blip2 | Blip2Matcher:
    """The model of a variant, every parameter drawn at random."""
    model: Blip2 | Blip2Matcher
    if variant.startswith("matcher"):
        text = MatcherConfig(EVA, qformer(EVA, bert_words, text=True), 4, image_text_hidden_size=16)
        model = Blip2Matcher(text, itg=variant == "matcher-itg")
    else:
        vision = CLIP if variant == "clip" else EVA
        opt = OptConfig(
            vocab_size=304,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=96,
            bos_token_id=END_OF_TEXT,
            pad_token_id=PAD,
            eos_token_id=newline,
            tie_word_embeddings=variant != "opt-untied",
        )
        t5 = T5Config(
            vocab_size=304, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4
        )
        language = t5 if variant == "t5" else opt
        model = Blip2(Blip2Config(vision, qformer(vision, 30522), language, num_query_tokens=4))
    make_visible(model, seed=VARIANTS.index(variant))
    if variant == "opt":
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):  # as EVA-CLIP has it: nothing is added to keys
                parameter.data.chunk(3)[1].zero_()
    return model


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """variant -> folder."""
    base = tmp_path_factory.mktemp("variants")
    newline, bert_words = write_opt_tokenizer(base / "words"), write_bert_tokenizer(base / "bert")
    folders = {}
    for variant in VARIANTS:
        model = make(variant, newline, bert_words)
        words = base / ("bert" if variant.startswith("matcher") else "words")
        folders[variant] = save_model(model, base / variant, tokenizer=words)
    return folders


@torch.inference_mode()
def outputs(model: Blip2 | Blip2Matcher) -> list[torch.Tensor]:
    """What a model makes of two images and texts."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    ids, mask = torch.randint(3, 60, (2, 5), generator=generator), torch.ones(2, 5, dtype=torch.int64)
    if isinstance(model, Blip2):
        return [model(pixels, ids, mask, ids if isinstance(model.config.language, T5Config) else None)]
    features = model.vision(pixels)
    found = [model.image_embeddings(features), model.text_embeddings(ids, mask), model.itm_logits(features, ids, mask)]
    return found if model.itg_head is None else [*found, model.itg_logits(features, ids, mask)]
