"""LAVIS's checkpoints: one .pth of a state dict, without settings and without what was frozen in training.

In this file: its tensor names, its config in (read off the shapes, as its files hold none) and out (the YAML of
`from_config`), and the parts it leaves out. Its tokenizers are Hugging Face's, files and all. Followed: LAVIS's
models/blip2_models. All names of tensors and settings are Hugging Face's but where a rule gives LAVIS's beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from blip2.checkpoint.key_mapping import HF_HEAD, HF_OPT_EMBEDDINGS, HF_T5_EMBEDDINGS, Rules
from blip2.checkpoint.layouts import Layout
from blip2.modeling.config import MAX_LAYERS, Blip2Config, MatcherConfig
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.tensors import Tensors

# --- names of tensors -------------------------------------------------------------------------------------------------

_LAYER, _QFORMER = "vision_model.encoder.layers.*", "qformer.encoder.layer"
_EMBEDDINGS = "vision_model.embeddings"
EVA: Rules = (
    (f"{_EMBEDDINGS}.class_embedding", "visual_encoder.cls_token"),
    (f"{_EMBEDDINGS}.position_embedding", "visual_encoder.pos_embed"),
    (f"{_EMBEDDINGS}.patch_embedding.", "visual_encoder.patch_embed.proj."),
    (f"{_LAYER}.layer_norm1.", "visual_encoder.blocks.*.norm1."),
    (f"{_LAYER}.layer_norm2.", "visual_encoder.blocks.*.norm2."),
    (f"{_LAYER}.self_attn.qkv.", "visual_encoder.blocks.*.attn.qkv."),
    (f"{_LAYER}.self_attn.projection.", "visual_encoder.blocks.*.attn.proj."),
    (f"{_LAYER}.mlp.", "visual_encoder.blocks.*.mlp."),
)
_CLIP: Rules = (
    (f"{_EMBEDDINGS}.class_embedding", "visual_encoder.class_embedding"),  # [W] for [1, 1, W]
    (f"{_EMBEDDINGS}.position_embedding", "visual_encoder.positional_embedding"),  # [N, W]
    (f"{_EMBEDDINGS}.patch_embedding.", "visual_encoder.conv1."),
    ("vision_model.pre_layernorm.", "visual_encoder.ln_pre."),
    (f"{_LAYER}.layer_norm1.", "visual_encoder.transformer.resblocks.*.ln_1."),
    (f"{_LAYER}.layer_norm2.", "visual_encoder.transformer.resblocks.*.ln_2."),
    (f"{_LAYER}.self_attn.qkv.weight", "visual_encoder.transformer.resblocks.*.attn.in_proj_weight"),
    (f"{_LAYER}.self_attn.qkv.bias", "visual_encoder.transformer.resblocks.*.attn.in_proj_bias"),
    (f"{_LAYER}.self_attn.projection.", "visual_encoder.transformer.resblocks.*.attn.out_proj."),
    (f"{_LAYER}.mlp.fc1.", "visual_encoder.transformer.resblocks.*.mlp.c_fc."),
    (f"{_LAYER}.mlp.fc2.", "visual_encoder.transformer.resblocks.*.mlp.c_proj."),
)
BERT: Rules = (
    ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    ("embeddings.word_embeddings.", "Qformer.bert.embeddings.word_embeddings."),
    ("embeddings.position_embeddings.", "Qformer.bert.embeddings.position_embeddings."),
    (f"{_QFORMER}.*.attention.attention.", "Qformer.bert.encoder.layer.*.attention.self."),
    (f"{_QFORMER}.*.crossattention.attention.", "Qformer.bert.encoder.layer.*.crossattention.self."),
    (f"{_QFORMER}.", "Qformer.bert.encoder.layer."),
    ("itg_head.dense.", "Qformer.cls.predictions.transform.dense."),
    ("itg_head.LayerNorm.", "Qformer.cls.predictions.transform.LayerNorm."),
    ("itg_head.bias", "Qformer.cls.predictions.bias"),
)
BERT_DROPPED = (
    "Qformer.bert.embeddings.position_ids",  # counted positions
    "Qformer.bert.embeddings.token_type_embeddings.",  # PaddleMIX allocates and never reads it
    "Qformer.cls.predictions.decoder.",  # the word embeddings and `predictions.bias` once more
)
_LAVIS: Rules = (
    *((name, name) for name in ("query_tokens", "itm_head.", "temp")),
    ("vision_model.post_layernorm.", "ln_vision."),
    *BERT,
    ("vision_projection.", "vision_proj."),
    ("text_projection.", "text_proj."),
)
_LAVIS_OPT: Rules = (("language_projection.", "opt_proj."), ("language_model.", "opt_model."))
_LAVIS_T5: Rules = (("language_projection.", "t5_proj."), ("language_model.", "t5_model."))

LAVIS = Layout(
    "lavis",
    eva=EVA,
    clip=_CLIP,
    opt=_LAVIS_OPT,
    t5=_LAVIS_T5,
    rest=_LAVIS,
    marks=("Qformer.", "visual_encoder.", "ln_vision.", "opt_model.", "opt_proj.", "t5_model.", "t5_proj."),
    dropped=(*BERT_DROPPED, "opt_model.model.decoder.version"),
    split_qkv_bias=True,
    leading_ones={f"{_EMBEDDINGS}.class_embedding": 2, f"{_EMBEDDINGS}.position_embedding": 1},
)

# --- config: read -----------------------------------------------------------------------------------------------------

NEWLINE_OF_OPT = 50118  # with which LAVIS ends captions; OPT's own config.json has </s>
# Shapes do not show attention heads. EVA-CLIP's are 88 wide, CLIP's and BERT's 64; how many OPT has, by its width.
_EVA_HEAD_WIDTH, _HEAD_WIDTH = 88, 64
_OPT_HEADS = {768: 12, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72}


def read_lavis_config(
    tensors: Tensors, language: Mapping[str, Any] | None, newline: int | None
) -> dict[str, Any]:
    """The config of a checkpoint, which LAVIS does not store: sizes from the shapes, the rest as LAVIS sets it.

    Args:
        tensors: under Hugging Face's names.
        language: the language model's own config.json, where there is one.
        newline: the id of the token that ends a caption, where there is a tokenizer.

    Returns:
        Parsed JSON in Hugging Face's spelling, for `modeling.config.read_config`.

    Raises:
        CheckpointError: a size that shapes do not show.
    """
    matcher = "itm_head.weight" in tensors
    raw: dict[str, Any] = {
        "model_type": "blip-2",
        "architectures": [f"Blip2For{'ImageTextRetrieval' if matcher else 'ConditionalGeneration'}"],
        "vision_config": _vision(tensors),
        "qformer_config": _qformer(tensors),
        "num_query_tokens": _size(tensors, "query_tokens", 1),
    }
    if matcher:
        return raw | {"image_text_hidden_size": _size(tensors, "vision_projection.weight", 0)}
    if HF_T5_EMBEDDINGS in tensors or (language or {}).get("model_type") == "t5":
        return raw | {"text_config": _t5(tensors, language)}
    return raw | {"text_config": _opt(tensors, language, newline)}


def _size(tensors: Tensors, name: str, side: int) -> int:
    shape = tensors.info(name).shape if name in tensors else ()
    if len(shape) <= side or not shape[side]:
        raise CheckpointError(
            f"{name} is missing, empty or has too few sides; put the model's config.json beside the file"
        )
    return shape[side]


def _layers(tensors: Tensors, pattern: str) -> int:
    """How many layers there are: one more than the highest number."""
    numbers = {match[1] for match in map(re.compile(pattern).match, tensors) if match}
    for number in numbers:
        if len(number) > 4 or int(number) >= MAX_LAYERS:
            raise CheckpointError(
                f"the file has a layer {quoted(number)}; a model has {MAX_LAYERS} layers at most"
            )
    return max(map(int, numbers), default=-1) + 1


def _heads(width: int, head_width: int, part: str) -> int:
    if width % head_width:
        raise CheckpointError(
            f"{part} is {width} wide, from which its attention heads cannot be known; "
            "put the model's config.json beside the file"
        )
    return width // head_width


def _vision(tensors: Tensors) -> dict[str, Any]:
    clip = "vision_model.pre_layernorm.weight" in tensors
    width = _size(tensors, f"{_EMBEDDINGS}.patch_embedding.weight", 0)
    patch = _size(tensors, f"{_EMBEDDINGS}.patch_embedding.weight", 2)
    positions = _size(tensors, f"{_EMBEDDINGS}.position_embedding", 1)
    return {
        "hidden_size": width,
        "intermediate_size": _size(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": _layers(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": _heads(width, _HEAD_WIDTH if clip else _EVA_HEAD_WIDTH, "the image encoder"),
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "layer_norm_eps": 1e-5 if clip else 1e-6,
        "last_norm_eps": 1e-5,
        "qkv_bias": "vision_model.encoder.layers.0.self_attn.qkv.bias" in tensors,
        "pre_norm": clip,
    }


def _qformer(tensors: Tensors) -> dict[str, Any]:
    width = _size(tensors, "query_tokens", 2)
    layers = _layers(tensors, r"qformer\.encoder\.layer\.(\d+)\.")
    crossing = [i for i in range(layers) if f"{_QFORMER}.{i}.crossattention.attention.key.weight" in tensors]
    text = f"{_QFORMER}.0.intermediate.dense.weight" in tensors
    embeddings = "embeddings.word_embeddings.weight"
    section: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width, _HEAD_WIDTH, "the Q-Former"),
        "intermediate_size": _size(tensors, f"{_QFORMER}.0.intermediate_query.dense.weight", 0),
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else max(layers, 1),
        "encoder_hidden_size": _size(tensors, f"{_QFORMER}.0.crossattention.attention.key.weight", 1),
        "use_qformer_text_input": text,
    }
    if embeddings in tensors:
        section["vocab_size"] = _size(tensors, embeddings, 0)
        section["max_position_embeddings"] = _size(tensors, "embeddings.position_embeddings.weight", 0)
    return section


def _opt(tensors: Tensors, language: Mapping[str, Any] | None, newline: int | None) -> dict[str, Any]:
    ends = {"eos_token_id": NEWLINE_OF_OPT if newline is None else newline}
    if language is not None:
        return {**language, "model_type": "opt", **ends}
    decoder = "language_model.model.decoder"
    embeddings = HF_OPT_EMBEDDINGS if HF_OPT_EMBEDDINGS in tensors else HF_HEAD
    width = _size(tensors, embeddings, 1)
    if width not in _OPT_HEADS:
        raise CheckpointError(
            f"a language model {width} wide is none of OPT's; put the model's config.json beside the file"
        )
    return {
        "model_type": "opt",
        "vocab_size": _size(tensors, embeddings, 0),
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": _layers(tensors, r"language_model\.model\.decoder\.layers\.(\d+)\."),
        "num_attention_heads": _OPT_HEADS[width],
        "ffn_dim": _size(tensors, f"{decoder}.layers.0.fc1.weight", 0),
        "max_position_embeddings": _size(tensors, f"{decoder}.embed_positions.weight", 0) - 2,
        **ends,
    }


def _t5(tensors: Tensors, language: Mapping[str, Any] | None) -> dict[str, Any]:
    if language is not None:
        return {**language, "model_type": "t5", "dense_act_fn": "gelu"}  # LAVIS's change: gelu_new in FlanT5
    first = "language_model.encoder.block.0.layer.0.SelfAttention"
    feed = "language_model.encoder.block.0.layer.1.DenseReluDense"
    gated = f"{feed}.wi_0.weight" in tensors
    heads = _size(tensors, f"{first}.relative_attention_bias.weight", 1)
    return {
        "model_type": "t5",
        "vocab_size": _size(tensors, HF_T5_EMBEDDINGS, 0),
        "d_model": _size(tensors, HF_T5_EMBEDDINGS, 1),
        "d_kv": _size(tensors, f"{first}.q.weight", 0) // heads,
        "d_ff": _size(tensors, f"{feed}.wi_0.weight" if gated else f"{feed}.wi.weight", 0),
        "num_heads": heads,
        "num_layers": _layers(tensors, r"language_model\.encoder\.block\.(\d+)\."),
        "num_decoder_layers": _layers(tensors, r"language_model\.decoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": _size(tensors, f"{first}.relative_attention_bias.weight", 0),
        "feed_forward_proj": "gated-gelu" if gated else "gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": HF_HEAD not in tensors,
    }


# --- config: write ----------------------------------------------------------------------------------------------------

# Width of the language model, layers of its decoder -> where LAVIS takes it from.
_LANGUAGES = {
    (2560, 32): "facebook/opt-2.7b",
    (4096, 32): "facebook/opt-6.7b",
    (2048, 24): "google/flan-t5-xl",
    (4096, 24): "google/flan-t5-xxl",
}


def to_lavis_config(config: Blip2Config | MatcherConfig, weights: str) -> str:
    """The model config (YAML) with which LAVIS's `Blip2*.from_config` opens a checkpoint beside it."""
    size = config.vision.image_size
    quoted_path = json.dumps(weights, ensure_ascii=False)  # a JSON string is one of YAML
    lines = ["load_finetuned: True", f"pretrained: {quoted_path}", f"finetuned: {quoted_path}"]
    if config.vision.pre_norm:
        lines.append('vit_model: "clip_L"')
    lines += [f"image_size: {size}", "drop_path_rate: 0", "use_grad_checkpoint: False"]
    lines += ['vit_precision: "fp32"', "freeze_vit: False", f"num_query_token: {config.num_query_tokens}"]
    if isinstance(config, Blip2Config):
        language = config.language
        name = _LANGUAGES.get((language.width, language.depth), "language_model")
        kind = "t5" if language.is_encoder_decoder else "opt"
        lines += [f'{kind}_model: "{name}"', 'prompt: "a photo of"']
    else:
        lines.append(f"embed_dim: {config.image_text_hidden_size}")
    processors = "".join(
        f'    {kind}:\n      train: {{name: "{train}"{extra}}}\n      eval: {{name: "{evaluate}"{extra}}}\n'
        for kind, train, evaluate, extra in (
            ("vis_processor", "blip_image_train", "blip_image_eval", f", image_size: {size}"),
            ("text_processor", "blip_caption", "blip_caption", ""),
        )
    )
    return "model:\n" + "".join(f"  {line}\n" for line in lines) + "\npreprocess:\n" + processors


# --- what is left out -------------------------------------------------------------------------------------------------

# The image encoders LAVIS takes from elsewhere are a layer or two deeper than it uses them: width -> layers too many.
UNUSED_LAYERS: Mapping[tuple[int, ...], tuple[int, ...]] = {(1408,): (39, 40), (1024,): (22, 23)}


def check_parts(tensors: Tensors) -> None:
    """Refuse a checkpoint that was saved without some of its parts, naming them and where to get them.

    Raises:
        CheckpointError: a part is missing.
    """
    missing = []
    if "query_tokens" not in tensors:
        missing.append(
            "its Q-Former: it is a part of a model, to be given as vision= or language= with another file"
        )
    if not any(name.startswith("vision_model.encoder.layers.0.") for name in tensors):
        missing.append(
            "its image encoder (visual_encoder.*), which was frozen and left out; "
            "give it as vision=: EVA-CLIP's eva_vit_g.pth, or clip_vit_L.pth for a _vitL model"
        )
    if "itm_head.weight" not in tensors:
        t5 = any(name.startswith("language_model.encoder.") for name in tensors)
        first = "language_model.decoder.block.0." if t5 else "language_model.model.decoder.layers.0."
        if not any(name.startswith(first) for name in tensors):
            projection = "language_projection.weight"
            shape = tensors.info(projection).shape if projection in tensors else ()
            fitting = [name for (width, _), name in _LANGUAGES.items() if shape[:1] == (width,)]
            missing.append(
                "its language model (opt_model.* or t5_model.*), which was frozen and left out; "
                f"give it as language=: the folder of {' or '.join(fitting) or 'OPT or T5'}"
            )
    if missing:
        raise CheckpointError(f"the file lacks {'; and '.join(missing)}")
