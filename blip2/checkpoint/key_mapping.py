"""Names of parameters: rules between two sets of names, and those between ours and Hugging Face's.

A rule is a pair of names. `*` stands for a layer's number, and a name that ends in "." for all names that begin so; the
first rule that fits counts. Rules are total in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

Rules = tuple[tuple[str, str], ...]

# The weights that a tied head shares, by our names and by Hugging Face's.
HEAD = "language.lm_head.weight"
WORD_EMBEDDINGS = ("language.embed_tokens.weight", "language.shared.weight")  # OPT's, T5's
HF_HEAD = "language_model.lm_head.weight"
HF_OPT_EMBEDDINGS = "language_model.model.decoder.embed_tokens.weight"
HF_T5_EMBEDDINGS = "language_model.shared.weight"

# The position biases that all layers of T5 share are stored with the first of them.
_T5_BIAS = "language_model.{}.block.0.layer.0.SelfAttention.relative_attention_bias"

# Our name, Hugging Face's name.
_RULES: Rules = (
    ("vision.class_embedding", "vision_model.embeddings.class_embedding"),
    ("vision.position_embedding", "vision_model.embeddings.position_embedding"),
    ("vision.patch_embedding.", "vision_model.embeddings.patch_embedding."),
    ("vision.pre_layernorm.", "vision_model.pre_layernorm."),
    ("vision.layers.", "vision_model.encoder.layers."),
    ("vision.post_layernorm.", "vision_model.post_layernorm."),
    ("qformer.query_tokens", "query_tokens"),
    ("qformer.layernorm.", "qformer.layernorm."),
    ("qformer.layers.", "qformer.encoder.layer."),
    ("qformer.word_embeddings.", "embeddings.word_embeddings."),
    ("qformer.position_embeddings.", "embeddings.position_embeddings."),
    ("projection.", "language_projection."),
    ("language.embed_tokens.", "language_model.model.decoder.embed_tokens."),
    ("language.embed_positions.", "language_model.model.decoder.embed_positions."),
    ("language.layers.", "language_model.model.decoder.layers."),
    ("language.final_layer_norm.", "language_model.model.decoder.final_layer_norm."),
    ("language.shared.", "language_model.shared."),
    ("language.encoder.relative_attention_bias.", f"{_T5_BIAS.format('encoder')}."),
    ("language.encoder.layers.", "language_model.encoder.block."),
    ("language.encoder.final_layer_norm.", "language_model.encoder.final_layer_norm."),
    ("language.decoder.relative_attention_bias.", f"{_T5_BIAS.format('decoder')}."),
    ("language.decoder.layers.", "language_model.decoder.block."),
    ("language.decoder.final_layer_norm.", "language_model.decoder.final_layer_norm."),
    ("language.lm_head.", "language_model.lm_head."),
    *((name, name) for name in ("vision_projection.", "text_projection.", "itm_head.", "itg_head.", "temp")),
)


# Hugging Face's other names for one tensor -> ours; files may hold it under all of them.
_COPIES: Mapping[str, str] = {
    f"language_model.{part}.embed_tokens.weight": WORD_EMBEDDINGS[1] for part in ("encoder", "decoder")
}


def to_hugging_face(name: str) -> str:
    """Our parameter name -> Hugging Face's. Raises KeyError for a name that is not ours."""
    hf_name = rename(name, _RULES)
    if hf_name is None:
        raise KeyError(name)
    return hf_name


def from_hugging_face(name: str) -> str | None:
    """Hugging Face's parameter name -> ours, or None where it names no part of a model.

    Its word embeddings of T5 have three names.
    """
    return _COPIES.get(name) or rename(name, _RULES, back=True)


def rename(name: str, rules: Rules, *, back: bool = False) -> str | None:
    """The name on the rules' right side, or (`back`) their left, by the first that fits; None where none does."""
    for pattern, template in _compiled(rules, back):
        if match := pattern.fullmatch(name):
            return template.format(*match.groups())
    return None


@cache
def _compiled(rules: Rules, back: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    def pattern(name: str) -> re.Pattern[str]:
        return re.compile(re.escape(name).replace(r"\*", r"(\d+)") + ("(.+)" if name.endswith(".") else ""))

    def template(name: str) -> str:
        return name.replace("*", "{}") + ("{}" if name.endswith(".") else "")

    pairs = ((right, left) if back else (left, right) for left, right in rules)
    return tuple((pattern(old), template(new)) for old, new in pairs)
