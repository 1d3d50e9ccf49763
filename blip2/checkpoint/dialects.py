"""The other worlds' settings: Paddle's config.json to Hugging Face's and back, and what LAVIS leaves to be derived.

All of these are parsed JSON in Hugging Face's spelling, for `config.read_config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from blip2.modeling.config import MAX_LAYERS, MAX_SIZE, Blip2Config, MatcherConfig, OptConfig, T5Config, to_hf
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.tensors import CheckpointError, Tensors, UnsupportedFileError, quoted

MAX_JSON_BYTES = 64 << 20  # T5's tokenizer.json has 2.4 million


def read_json_file(file: Path) -> dict[str, Any]:
    """A JSON file of settings. Raises CheckpointError where there is none, or a broken one."""
    if not file.exists():
        raise CheckpointError(f"{file.parent} holds no {file.name}; give the folder a model was saved to")
    with ExitStack() as stack:
        content = FileBytes(file, stack)
        if content.size > MAX_JSON_BYTES:
            raise UnsupportedFileError(f"{file}: settings of {content.size:,} bytes; restore the file")
        text = content.read(0, content.size, "a file of settings")
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        raise CheckpointError(f"{file} is no valid JSON; restore the file") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a {type(raw).__name__}, expected an object; restore the file")
    return raw


NEWLINE_OF_OPT = 50118  # with which LAVIS ends captions; its config.json says </s>

# --- Paddle -----------------------------------------------------------------------------------------------------------

# Hugging Face's word for a setting of OPT -> PaddleNLP's, and what PaddleNLP takes where config.json is silent.
_OPT_WORDS = {
    "ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "do_layer_norm_before": "normalize_before",
}
_OPT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "ffn_dim": 8192,
    "num_attention_heads": 32,
}
_PADDLENLP_VISION_EPS = 1e-5
# The same for PaddleMIX's image encoder.
_VISION_WORDS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "image_size": "img_size",
    "layer_norm_eps": "epsilon",
}


def from_paddle(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Paddle's config.json in Hugging Face's spelling, its own defaults filled in."""
    vision = _respelled(_section(raw, "vision_config"), _VISION_WORDS)
    if "intermediate_size" not in vision and {"mlp_ratio", "hidden_size"} <= vision.keys():
        width, ratio = vision["hidden_size"], vision["mlp_ratio"]
        sizes = type(width) is int and 0 < width <= MAX_SIZE and type(ratio) in (int, float)
        if not sizes or not 0 < ratio <= MAX_SIZE:
            raise CheckpointError(
                f"config.json: an image encoder {quoted(width)} wide, mlp_ratio {quoted(ratio)}"
            )
        vision["intermediate_size"] = int(width * ratio)
    vision = {"layer_norm_eps": _PADDLENLP_VISION_EPS} | vision
    text = _section(raw, "text_config")
    if text.get("model_type", "opt") == "opt":
        text = _OPT_DEFAULTS | _respelled(text, _OPT_WORDS)
    return {**raw, "vision_config": vision, "text_config": text}


def _respelled(section: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    said = dict(section)
    for theirs, own in words.items():
        if own in said and theirs not in said:
            said[theirs] = said[own]
    return said


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name) or {}
    return dict(section) if isinstance(section, Mapping) else {}


def to_paddle(config: Blip2Config | MatcherConfig, dtype: str) -> dict[str, Any]:
    """The config.json that PaddleNLP opens; for the stage-1 model, which it does not have, PaddleMIX."""
    raw = to_hf(config) | {"dtype": dtype}
    if isinstance(config, MatcherConfig):
        vision = raw["vision_config"]
        vision |= {own: vision[theirs] for theirs, own in _VISION_WORDS.items()}
        vision |= {
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "in_chans": 3,
            "class_num": 1000,
        }
        qformer = raw["qformer_config"]
        qformer |= {"num_query_tokens": config.num_query_tokens, "embed_dim": config.image_text_hidden_size}
        return raw | {"train_mode": "stage1", "freeze_vit": True, "max_txt_len": 32}
    text = raw["text_config"]
    if text["model_type"] == "opt":
        raw["text_config"] = {_OPT_WORDS.get(name, name): value for name, value in text.items()}
    return raw


# --- LAVIS ------------------------------------------------------------------------------------------------------------

# Attention heads are not to be seen in shapes. EVA-CLIP's are 88 wide, CLIP's and BERT's 64; OPT's by its width.
_EVA_HEAD, _HEAD = 88, 64
_OPT_HEADS = {768: 12, 2048: 32, 2560: 32, 4096: 32, 5120: 40, 7168: 56, 9216: 72}


def derive(tensors: Tensors, language: Mapping[str, Any] | None, newline: int | None) -> dict[str, Any]:
    """A config.json in Hugging Face's spelling for tensors under its names, with LAVIS's own settings.

    Args:
        language: the language model's own config.json, where there is one.
        newline: the id of the token that ends a caption, where a tokenizer says it.

    Raises:
        CheckpointError: a size that shapes do not tell.
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
    if "language_model.shared.weight" in tensors or (language or {}).get("model_type") == "t5":
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
    numbers = {found[1] for found in map(re.compile(pattern).match, tensors) if found}
    for number in numbers:
        if len(number) > 4 or int(number) >= MAX_LAYERS:
            raise CheckpointError(
                f"the file speaks of layer {quoted(number)}; known are up to {MAX_LAYERS} layers"
            )
    return max(map(int, numbers), default=-1) + 1


def _heads(width: int, each: int, whose: str) -> int:
    if width % each:
        raise CheckpointError(
            f"{whose} is {width} wide, which does not tell its attention heads; "
            "put the model's config.json beside the file"
        )
    return width // each


def _vision(tensors: Tensors) -> dict[str, Any]:
    clip = "vision_model.pre_layernorm.weight" in tensors
    width = _size(tensors, "vision_model.embeddings.patch_embedding.weight", 0)
    patch = _size(tensors, "vision_model.embeddings.patch_embedding.weight", 2)
    positions = _size(tensors, "vision_model.embeddings.position_embedding", 1)
    return {
        "hidden_size": width,
        "intermediate_size": _size(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": _layers(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": _heads(width, _HEAD if clip else _EVA_HEAD, "the image encoder"),
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
    crossing = [
        i
        for i in range(layers)
        if f"qformer.encoder.layer.{i}.crossattention.attention.key.weight" in tensors
    ]
    text = "qformer.encoder.layer.0.intermediate.dense.weight" in tensors
    words = "embeddings.word_embeddings.weight"
    said: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width, _HEAD, "the Q-Former"),
        "intermediate_size": _size(tensors, "qformer.encoder.layer.0.intermediate_query.dense.weight", 0),
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else max(layers, 1),
        "encoder_hidden_size": _size(
            tensors, "qformer.encoder.layer.0.crossattention.attention.key.weight", 1
        ),
        "use_qformer_text_input": text,
    }
    if words in tensors:
        said["vocab_size"] = _size(tensors, words, 0)
        said["max_position_embeddings"] = _size(tensors, "embeddings.position_embeddings.weight", 0)
    return said


def _opt(tensors: Tensors, language: Mapping[str, Any] | None, newline: int | None) -> dict[str, Any]:
    ends = {"eos_token_id": NEWLINE_OF_OPT if newline is None else newline}
    if language is not None:
        return {**language, "model_type": "opt", **ends}
    decoder = "language_model.model.decoder"
    words = next(
        (
            each
            for each in (f"{decoder}.embed_tokens.weight", "language_model.lm_head.weight")
            if each in tensors
        ),
        "",
    )
    width = _size(tensors, words, 1)
    if width not in _OPT_HEADS:
        raise CheckpointError(
            f"a language model {width} wide is none of OPT's; put the model's config.json beside the file"
        )
    return {
        "model_type": "opt",
        "vocab_size": _size(tensors, words, 0),
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
        "vocab_size": _size(tensors, "language_model.shared.weight", 0),
        "d_model": _size(tensors, "language_model.shared.weight", 1),
        "d_kv": _size(tensors, f"{first}.q.weight", 0) // heads,
        "d_ff": _size(tensors, f"{feed}.wi_0.weight" if gated else f"{feed}.wi.weight", 0),
        "num_heads": heads,
        "num_layers": _layers(tensors, r"language_model\.encoder\.block\.(\d+)\."),
        "num_decoder_layers": _layers(tensors, r"language_model\.decoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": _size(tensors, f"{first}.relative_attention_bias.weight", 0),
        "feed_forward_proj": "gated-gelu" if gated else "gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": "language_model.lm_head.weight" not in tensors,
    }


# Width of the language model, layers of its decoder -> where LAVIS takes it from.
LANGUAGES = {
    (2560, 32): "facebook/opt-2.7b",
    (4096, 32): "facebook/opt-6.7b",
    (2048, 24): "google/flan-t5-xl",
    (4096, 24): "google/flan-t5-xxl",
}


def to_lavis(config: Blip2Config | MatcherConfig, weights: str) -> str:
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
        depth = language.num_hidden_layers if isinstance(language, OptConfig) else language.num_decoder_layers
        name = LANGUAGES.get((language.width, depth), "language_model")
        lines += [
            f'{"t5" if isinstance(language, T5Config) else "opt"}_model: "{name}"',
            'prompt: "a photo of"',
        ]
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


# --- tokenizers -------------------------------------------------------------------------------------------------------

# What Hugging Face calls a tokenizer -> what PaddleNLP calls it.
_TOKENIZERS = {
    "GPT2Tokenizer": "GPTTokenizer",
    "GPT2TokenizerFast": "GPTTokenizer",
    "T5TokenizerFast": "T5Tokenizer",
    "BertTokenizerFast": "BertTokenizer",
}


def tokenizer_changes(folder: Path, *, paddle: bool) -> dict[str, str]:
    """The tokenizer files that another world wants otherwise than they are: name -> content."""
    made: dict[str, str] = {}
    settings = _read_json(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class")
    words = _TOKENIZERS if paddle else {"GPTTokenizer": "GPT2Tokenizer"}
    if isinstance(kind, str) and kind in words:
        made["tokenizer_config.json"] = (
            json.dumps(settings | {"tokenizer_class": words[kind]}, indent=2) + "\n"
        )
    model = _read_json(folder / "tokenizer.json").get("model")
    if (
        paddle
        and isinstance(model, dict)
        and model.get("type") == "BPE"
        and not (folder / "merges.txt").is_file()
    ):
        # Paddle's own tokenizers read the older pair of files
        vocabulary, pairs = model.get("vocab"), model.get("merges")
        try:
            merges = [each if isinstance(each, str) else " ".join(each) for each in pairs or ()]
        except TypeError as error:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: its merges are no pairs of words") from error
        made["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False)
        made["merges.txt"] = "".join(f"{line}\n" for line in ("#version: 0.2", *merges))
    return made


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none."""
    return read_json_file(file) if file.exists() else {}
