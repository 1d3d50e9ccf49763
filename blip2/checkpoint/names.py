"""Name tables: our parameter names <-> those of the published files. Prefixes, total in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# ours -> Hugging Face. What follows the prefix is equal on both sides.
HUGGING_FACE: Mapping[str, str] = {
    "vision.class_embedding": "vision_model.embeddings.class_embedding",
    "vision.position_embedding": "vision_model.embeddings.position_embedding",
    "vision.patch_embedding.": "vision_model.embeddings.patch_embedding.",
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
    "language.lm_head.": "language_model.lm_head.",
    "vision_projection.": "vision_projection.",
    "text_projection.": "text_projection.",
    "itm_head.": "itm_head.",
    "itg_head.": "itg_head.",
    "temp": "temp",
}


def translate(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """The name on the table's other side, or None where the table has no such name."""
    for ours, theirs in table:
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            return theirs + name[len(ours) :]
    return None


def to_hugging_face(name: str) -> str:
    """Our parameter name -> Hugging Face's. Raises KeyError for a name that is not ours."""
    theirs = translate(name, HUGGING_FACE.items())
    if theirs is None:
        raise KeyError(name)
    return theirs


def from_hugging_face(name: str) -> str | None:
    """Hugging Face's parameter name -> ours, or None where it names no part of a model."""
    return translate(name, ((theirs, ours) for ours, theirs in HUGGING_FACE.items()))
