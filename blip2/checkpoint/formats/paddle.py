"""Paddle's checkpoints: PaddleNLP's, and PaddleMIX's for the stage-1 model, which PaddleNLP has not.

In this file: their tensor names, their config.json in and out, and the tokenizer files that PaddleNLP reads.
Followed: PaddleNLP's transformers/{blip_2,opt,t5}, PaddleMIX's models/blip2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2.checkpoint.formats.lavis import BERT, BERT_DROPPED, EVA
from blip2.checkpoint.key_mapping import HF_HEAD, Rules
from blip2.checkpoint.layouts import Layout
from blip2.modeling.config import MAX_SIZE, Blip2Config, MatcherConfig, to_hf
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.strict_json import read_json
from blip2.tokenizerfiles import MAX_TOKENIZER_BYTES

# --- names of tensors -------------------------------------------------------------------------------------------------

_DECODER, _PADDLE_DECODER = "language_model.model.decoder", "language_model.opt.decoder"
_PADDLE_OPT: Rules = (
    (f"{_DECODER}.embed_tokens.", "language_model.opt.embeddings.word_embeddings."),
    (f"{_DECODER}.embed_positions.", "language_model.opt.embeddings.position_embeddings."),
    (f"{_DECODER}.layers.*.self_attn_layer_norm.", f"{_PADDLE_DECODER}.layers.*.norm1."),
    (f"{_DECODER}.layers.*.self_attn.", f"{_PADDLE_DECODER}.layers.*.self_attn."),
    (f"{_DECODER}.layers.*.fc1.", f"{_PADDLE_DECODER}.layers.*.linear1."),
    (f"{_DECODER}.layers.*.fc2.", f"{_PADDLE_DECODER}.layers.*.linear2."),
    (f"{_DECODER}.layers.*.final_layer_norm.", f"{_PADDLE_DECODER}.layers.*.norm2."),
    (f"{_DECODER}.final_layer_norm.", f"{_PADDLE_DECODER}.final_layer_norm."),
    (HF_HEAD, "language_model.lm_head.decoder_weight"),
)
_PADDLE_T5: Rules = ((HF_HEAD, HF_HEAD), ("language_model.", "language_model.t5."))
_SAME_IN_PADDLENLP: Rules = tuple(
    (name, name)
    for name in (
        *("vision_model.", "qformer.", "query_tokens", "language_projection.", "embeddings."),
        *("vision_projection.", "text_projection.", "itm_head.", "itg_head.", "temp"),
    )
)
_PADDLEMIX: Rules = (
    *EVA,
    ("query_tokens", "Qformer.query_tokens"),
    ("vision_model.post_layernorm.", "Qformer.ln_vision."),
    *BERT,
    ("language_projection.", "Qformer.language_projection."),
    ("vision_projection.", "Qformer.vision_proj."),
    ("text_projection.", "Qformer.text_proj."),
    ("itm_head.", "Qformer.itm_head."),
    ("temp", "temp"),  # [1] for a scalar
)

# PaddleMIX's image encoder and Q-Former are LAVIS's, ported to Paddle under LAVIS's names.
PADDLENLP = Layout(
    "paddlenlp",
    opt=_PADDLE_OPT,
    t5=_PADDLE_T5,
    rest=_SAME_IN_PADDLENLP,
    marks=("language_model.opt.", "language_model.t5.", "language_model.lm_head.decoder_weight"),
    transposed=True,
)
PADDLEMIX = Layout(
    "paddlemix",
    opt=_PADDLE_OPT,
    t5=_PADDLE_T5,
    rest=_PADDLEMIX,
    marks=("Qformer.ln_vision.", "Qformer.query_tokens", "Qformer.language_projection."),
    dropped=BERT_DROPPED,
    transposed=True,
)

# --- config -----------------------------------------------------------------------------------------------------------

# Hugging Face's name of a setting of OPT -> PaddleNLP's, and what PaddleNLP takes where config.json is silent.
_OPT_SETTINGS = {
    "ffn_dim": "intermediate_size", "activation_function": "hidden_act", "do_layer_norm_before": "normalize_before",
}  # fmt: skip
_OPT_DEFAULTS = {"hidden_size": 2048, "num_hidden_layers": 24, "ffn_dim": 8192, "num_attention_heads": 32}
_PADDLENLP_VISION_EPS = 1e-5
# The same for PaddleMIX's image encoder.
_VISION_SETTINGS = {
    "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "image_size": "img_size", "layer_norm_eps": "epsilon",
}  # fmt: skip


def read_paddle_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Paddle's config.json, parsed -> the same in Hugging Face's spelling, with Paddle's own defaults."""
    vision = _renamed(_section(raw, "vision_config"), _VISION_SETTINGS)
    if "intermediate_size" not in vision and {"mlp_ratio", "hidden_size"} <= vision.keys():
        width, ratio = vision["hidden_size"], vision["mlp_ratio"]
        sizes = type(width) is int and 0 < width <= MAX_SIZE and type(ratio) in (int, float)
        if not sizes or not 0 < ratio <= MAX_SIZE:
            problem = f"an image encoder {quoted(width)} wide, mlp_ratio {quoted(ratio)}"
            raise CheckpointError(f"config.json: {problem}")
        vision["intermediate_size"] = int(width * ratio)
    vision = {"layer_norm_eps": _PADDLENLP_VISION_EPS} | vision
    text = _section(raw, "text_config")
    if text.get("model_type", "opt") == "opt":
        text = _OPT_DEFAULTS | _renamed(text, _OPT_SETTINGS)
    return {**raw, "vision_config": vision, "text_config": text}


def _renamed(section: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A section of Paddle's with Hugging Face's names of settings too."""
    return {hf: section[paddle] for hf, paddle in names.items() if paddle in section} | dict(section)


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name) or {}
    return dict(section) if isinstance(section, Mapping) else {}


def to_paddle_config(config: Blip2Config | MatcherConfig, dtype: str) -> dict[str, Any]:
    """The config.json that PaddleNLP opens; for the stage-1 model, which it does not have, PaddleMIX."""
    raw = to_hf(config) | {"dtype": dtype}
    if isinstance(config, MatcherConfig):
        vision = raw["vision_config"]
        vision |= {paddle: vision[hf] for hf, paddle in _VISION_SETTINGS.items()}
        ratio = vision["intermediate_size"] / vision["hidden_size"]
        vision |= {"mlp_ratio": ratio, "in_chans": 3, "class_num": 1000}
        qformer = raw["qformer_config"]
        qformer |= {"num_query_tokens": config.num_query_tokens, "embed_dim": config.image_text_hidden_size}
        return raw | {"train_mode": "stage1", "freeze_vit": True, "max_txt_len": 32}
    text = raw["text_config"]
    if text["model_type"] == "opt":
        raw["text_config"] = {_OPT_SETTINGS.get(name, name): value for name, value in text.items()}
    return raw


# --- tokenizer --------------------------------------------------------------------------------------------------------

# What Hugging Face calls a tokenizer -> what PaddleNLP calls it.
_TOKENIZERS = {
    "GPT2Tokenizer": "GPTTokenizer",
    "GPT2TokenizerFast": "GPTTokenizer",
    "T5TokenizerFast": "T5Tokenizer",
    "BertTokenizerFast": "BertTokenizer",
}


def tokenizer_changes(folder: Path, *, paddle: bool) -> dict[str, str]:
    """The tokenizer files of a folder that PaddleNLP wants otherwise (or, not `paddle`, others): name -> content.

    PaddleNLP has its own names of tokenizer classes, and reads vocab.json and merges.txt where Hugging Face has
    a tokenizer.json.
    """
    changes: dict[str, str] = {}
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    name = settings.get("tokenizer_class")
    names = _TOKENIZERS if paddle else {"GPTTokenizer": "GPT2Tokenizer"}
    if isinstance(name, str) and name in names:
        settings["tokenizer_class"] = names[name]
        changes["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    tokenizer = read_json(folder / "tokenizer.json", optional=True, limit=MAX_TOKENIZER_BYTES)
    model = tokenizer.get("model")
    has_pairs = (folder / "merges.txt").is_file()
    if paddle and isinstance(model, dict) and model.get("type") == "BPE" and not has_pairs:
        vocabulary, pairs = model.get("vocab"), model.get("merges")
        try:
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs or ()]
        except TypeError as error:
            file = folder / "tokenizer.json"
            raise CheckpointError(f"{file}: its merges are no pairs of tokens") from error
        changes["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False)
        changes["merges.txt"] = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
    return changes
