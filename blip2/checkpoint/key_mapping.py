"""Name tables: our parameter names <-> those of the published files. Prefixes, total in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# The weights that a tied head shares, by our names and by Hugging Face's.
HEAD = "language.lm_head.weight"
OPT_EMBEDDINGS, T5_EMBEDDINGS = "language.embed_tokens.weight", "language.shared.weight"
HF_HEAD = "language_model.lm_head.weight"
HF_OPT_EMBEDDINGS = "language_model.model.decoder.embed_tokens.weight"
HF_T5_EMBEDDINGS = "language_model.shared.weight"

# The position biases that all layers of T5 share are stored with the first of them.
_T5_BIAS = "language_model.{}.block.0.layer.0.SelfAttention.relative_attention_bias"

# ours -> Hugging Face; the first match counts. What follows the prefix is equal on both sides.
HUGGING_FACE: Mapping[str, str] = {
    "vision.class_embedding": "vision_model.embeddings.class_embedding",
    "vision.position_embedding": "vision_model.embeddings.position_embedding",
    "vision.patch_embedding.": "vision_model.embeddings.patch_embedding.",
    "vision.pre_layernorm.": "vision_model.pre_layernorm.",
    "vision.layers.": "vision_model.encoder.layers.",
    "vision.post_layernorm.": "vision_model.post_layernorm.",
    "qformer.query_tokens": "query_tokens",
    "qformer.layernorm.": "qformer.layernorm.",
    "qformer.layers.": "qformer.encoder.layer.",
    "qformer.word_embeddings.": "embeddings.word_embeddings.",
    "qformer.position_embeddings.": "embeddings.position_embeddings.",
    "projection.": "language_projection.",
    "language.embed_tokens.": "language_model.model.decoder.embed_tokens.",
    "language.embed_positions.": "language_model.model.decoder.embed_positions.",
    "language.layers.": "language_model.model.decoder.layers.",
    "language.final_layer_norm.": "language_model.model.decoder.final_layer_norm.",
    "language.shared.": "language_model.shared.",
    "language.encoder.relative_attention_bias.": f"{_T5_BIAS.format('encoder')}.",
    "language.encoder.layers.": "language_model.encoder.block.",
    "language.encoder.final_layer_norm.": "language_model.encoder.final_layer_norm.",
    "language.decoder.relative_attention_bias.": f"{_T5_BIAS.format('decoder')}.",
    "language.decoder.layers.": "language_model.decoder.block.",
    "language.decoder.final_layer_norm.": "language_model.decoder.final_layer_norm.",
    "language.lm_head.": "language_model.lm_head.",
    "vision_projection.": "vision_projection.",
    "text_projection.": "text_projection.",
    "itm_head.": "itm_head.",
    "itg_head.": "itg_head.",
    "temp": "temp",
}


# Hugging Face's other names for one tensor -> ours; files may hold it under all of them.
_COPIES: Mapping[str, str] = {
    f"language_model.{part}.embed_tokens.weight": T5_EMBEDDINGS for part in ("encoder", "decoder")
}


def to_hugging_face(name: str) -> str:
    """Our parameter name -> Hugging Face's. Raises KeyError for a name that is not ours."""
    foreign = _rename(name, HUGGING_FACE.items())
    if foreign is None:
        raise KeyError(name)
    return foreign


def from_hugging_face(name: str) -> str | None:
    """Hugging Face's parameter name -> ours, or None where it names no part of a model.

    Its word embeddings of T5 have three names.
    """
    return _COPIES.get(name) or _rename(name, ((foreign, ours) for ours, foreign in HUGGING_FACE.items()))


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """The name on the table's other side, or None where the table has no such name."""
    for old, new in table:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    return None
