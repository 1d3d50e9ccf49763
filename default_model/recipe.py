"""The default model's sizes and how long each stage trains. Everything else about a stage is in stages.py."""

from __future__ import annotations

from dataclasses import replace

from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig, VisionConfig
from blip2.train.loop import FitOptions
from default_model.kinds import Kind, Share

IMAGE_PX = 128
PARTS = 16  # a square number: each of these queries starts with one part of the image
QUERIES = PARTS + 1  # the last one reads the whole image

VISION = VisionConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=IMAGE_PX,
    patch_size=16,
)


def language_config(vocab_size: int, eos_token_id: int) -> OptConfig:
    """The language model. Captions and answers end at `eos_token_id`, the newline."""
    return OptConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        ffn_dim=1024,
        max_position_embeddings=256,
        eos_token_id=eos_token_id,
    )


def qformer_config(vocab_size: int) -> QFormerConfig:
    """The Q-Former, its text branch included. As it has few layers, all of them read the image."""
    return QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        max_position_embeddings=64,
        cross_attention_frequency=1,
        encoder_hidden_size=VISION.hidden_size,
        use_qformer_text_input=True,
    )


def matcher_config(vocab_size: int) -> MatcherConfig:
    """The stage-1 model."""
    return MatcherConfig(VISION, qformer_config(vocab_size), QUERIES, image_text_hidden_size=128)


def generator_config(language: OptConfig, image_token_id: int) -> Blip2Config:
    """The model that captions and answers."""
    qformer = replace(qformer_config(QFormerConfig().vocab_size), use_qformer_text_input=False)
    return Blip2Config(VISION, qformer, language, QUERIES, image_token_id)


# The batches are in batches.py.
_COMMON = FitOptions(steps=1, weight_decay=0.05, warmup_steps=100, workers=1, save_every_s=120)

MUON_SCALE = 6.0  # Muon trains the matrices of all blocks, at this multiple of the others' learning rate
QFORMER_MUON_SCALE = 3.0  # for the Q-Former, whose initial weights should not change too fast
FINETUNE_MUON_SCALE = 1.5  # at 6 the image encoder forgets, and the loss does not fall until the rate does
FINETUNE_LANGUAGE_MUON_SCALE = 5.0

SPECIMENS = 2  # of every cut-out, for the names the stem gives
PHOTOGRAPH_PARTS = 512  # of unlabelled photographs, for the same
# Pictures kept as the stem sees them; 98 KB each.
PICTURES: dict[Kind, int] = {
    "scene": 32_768,
    "varied": 98_304,
    "easy": 4_000,
    "photograph": 6_144,
    "pasted": 12_288,
}
# A photograph's name is one of 17 slots, a scene has several: with a third of the pictures names were read badly.
QUERY_SHARES: dict[Share, float] = {
    "scene": 0.1,
    "varied": 0.4,
    "easy": 0.05,
    "photograph": 0.1,
    "pasted": 0.1,
    "imagined": 0.25,
}
TEXT_SHARES: dict[Share, float] = {
    "scene": 0.1,
    "varied": 0.42,
    "easy": 0.06,
    "photograph": 0.1,
    "pasted": 0.1,
    "imagined": 0.22,
}
MATCH_SHARES: dict[Share, float] = {
    "scene": 0.15,
    "varied": 0.55,
    "easy": 0.05,
    "photograph": 0.0,
    "pasted": 0.1,
    "imagined": 0.15,
}

LANGUAGE_OPTIONS = replace(_COMMON, steps=9_000, lr=1e-3, min_lr=1e-5)
QUERIES_OPTIONS = replace(_COMMON, steps=4_000, lr=1e-3, min_lr=1e-5)
STAGE1_OPTIONS = replace(_COMMON, steps=2_500, lr=1e-3, min_lr=1e-5)
STAGE2_OPTIONS = replace(_COMMON, steps=500, lr=1e-3, min_lr=1e-5)
FINETUNE_OPTIONS = replace(_COMMON, steps=4_000, lr=6e-4, min_lr=1e-6)
