"""What a BLIP-2 model is made of: frozen configs, and strict reading and writing of Hugging Face's config.json.

Field names are those of config.json. `read_config` accepts what transformers accepts, old style and new;
`to_hf` gives back what transformers opens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

MAX_LAYERS = 200  # OPT-175B has 96
MAX_SIZE = 2**24  # of any number in a config
MAX_IMAGE_PX = 2**14
T5_TRAINED_TOKENS = 512  # the longest text T5 was trained on; its positions have no end
Mode = Literal["int8", "int4"]  # how weights can be quantized; here, as this file needs no torch
MODES: tuple[Mode, ...] = ("int8", "int4")
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


class ConfigError(ValueError):
    """A config.json that describes no BLIP-2 model this package can build."""


MAX_END_TOKENS = 100
_EPS = (1e-15, 0.1)  # of norms: 1e-12 to 1e-5 in all models; less is 0 in fp32


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    _check(
        least <= value <= most, f"{name} is {value!r}, expected {least:g} to {most:g}"
    )  # NaN is in no range


def _shown(value: object) -> str:
    """A value from a file as a message may show it."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: a ViT with pre-norm blocks. The defaults are EVA-CLIP ViT-g/14 at 224 px."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    last_norm_eps: float = 0.0  # of the norm after the blocks, where it differs as in LAVIS; 0: as the others
    qkv_bias: bool = True
    pre_norm: bool = False  # CLIP's: a norm before the blocks, and then no bias on the patches

    def __post_init__(self) -> None:
        _check_layers("vision_config", self, "hidden_act")
        _check_range("vision_config.layer_norm_eps", self.layer_norm_eps, *_EPS)
        if self.last_norm_eps:
            _check_range("vision_config.last_norm_eps", self.last_norm_eps, *_EPS)
        _check(
            self.patch_size <= self.image_size <= MAX_IMAGE_PX,
            f"vision_config: image_size {self.image_size} is smaller than patch_size {self.patch_size} "
            f"or larger than {MAX_IMAGE_PX}",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Positions the encoder works on: every patch, and the class position before them."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer: a BERT whose queries cross-attend to the image in every n-th layer."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = False

    def __post_init__(self) -> None:
        _check_layers("qformer_config", self, "hidden_act")
        _check_range("qformer_config.layer_norm_eps", self.layer_norm_eps, *_EPS)
        _check_range("qformer_config.hidden_dropout_prob", self.hidden_dropout_prob, 0, 0.99)
        _check(
            self.cross_attention_frequency > 0,
            f"qformer_config: cross_attention_frequency is {self.cross_attention_frequency}, must be at least 1",
        )


class _EndTokens:
    eos_token_id: int | tuple[int, ...]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)


@dataclass(frozen=True)
class OptConfig(_EndTokens):
    """The language model OPT. The defaults are OPT-2.7B as BLIP-2 uses it: captions end at a newline (50118)."""

    vocab_size: int = 50272
    hidden_size: int = 2560
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    ffn_dim: int = 10240
    max_position_embeddings: int = 2048
    activation_function: str = "relu"
    bos_token_id: int = 2
    pad_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 50118
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        _check_layers("text_config", self, "activation_function")

    model_type: ClassVar[str] = "opt"
    is_encoder_decoder: ClassVar[bool] = False
    decoder_start_token_id: ClassVar[int | None] = None  # it continues the prompt
    word_embeddings: ClassVar[str] = "embed_tokens"  # the module that holds them

    @property
    def width(self) -> int:
        """Of the embeddings, and so of the prefix."""
        return self.hidden_size

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return self.num_hidden_layers

    @property
    def keys_per_position(self) -> int:
        """Key values that one position takes, in all layers."""
        return self.depth * self.width

    def matrix_values(self, *, decode_step: bool = False) -> int:
        """Values of the layers' matrices; `decode_step`: of those that every new token reads."""
        return self.depth * (4 * self.width * self.width + 2 * self.width * self.ffn_dim)

    def prompt_positions(self, max_new_tokens: int) -> int:
        """How many positions prefix and prompt may take."""
        return self.max_position_embeddings - max_new_tokens


@dataclass(frozen=True)
class T5Config(_EndTokens):
    """The language model T5. The defaults are FlanT5-XL as BLIP-2 uses it: with plain gelu in its feed-forward."""

    vocab_size: int = 32128
    d_model: int = 2048
    d_kv: int = 64
    d_ff: int = 5120
    num_layers: int = 24
    num_decoder_layers: int = 24
    num_heads: int = 32
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "gelu"
    is_gated_act: bool = True
    scale_decoder_outputs: bool = False  # times d_model ** -0.5 before the head
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_depth("text_config", self.num_layers, self.num_decoder_layers)
        _check_range("text_config.layer_norm_epsilon", self.layer_norm_epsilon, *_EPS)
        _check(
            self.num_heads * self.d_kv <= MAX_SIZE,
            f"text_config: {self.num_heads} attention heads of {self.d_kv} are more than any model has",
        )
        _check_activation("text_config.dense_act_fn", self.dense_act_fn)
        count, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        _check(
            count >= 4 and count % 2 == 0 and longest > count // 2,
            f"text_config: {count} position buckets up to a distance of {longest} cannot be built; "
            "expected an even number of them, and a distance of more than half of it",
        )

    model_type: ClassVar[str] = "t5"
    is_encoder_decoder: ClassVar[bool] = True
    word_embeddings: ClassVar[str] = "shared"

    @property
    def width(self) -> int:
        """As `OptConfig.width`."""
        return self.d_model

    @property
    def depth(self) -> int:
        """As `OptConfig.depth`."""
        return self.num_decoder_layers

    @property
    def keys_per_position(self) -> int:
        """As `OptConfig.keys_per_position`."""
        return self.depth * self.num_heads * self.d_kv

    def matrix_values(self, *, decode_step: bool = False) -> int:
        """As `OptConfig.matrix_values`."""
        attention = 4 * self.d_model * self.num_heads * self.d_kv
        forward = (3 if self.is_gated_act else 2) * self.d_model * self.d_ff
        if decode_step:  # keys and values of the prompt are there
            return self.depth * (attention + attention // 2 + forward)
        return self.num_layers * (attention + forward) + self.depth * (2 * attention + forward)

    def prompt_positions(self, max_new_tokens: int) -> int:
        """As `OptConfig.prompt_positions`."""
        return T5_TRAINED_TOKENS


LanguageConfig = OptConfig | T5Config
LANGUAGE_CONFIGS: tuple[type[LanguageConfig], ...] = (OptConfig, T5Config)


@dataclass(frozen=True)
class StemFacts:
    """The network that a model's images go through first, as stored.

    origin: the network and its licence. image_px: side of the images it takes.
    """

    origin: str
    image_px: int
    tensors: int
    parameters: int
    disk_bytes: int


@dataclass(frozen=True)
class Blip2Config:
    """The generating model: image encoder, Q-Former, projection, language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig = field(default_factory=OptConfig)
    num_query_tokens: int = 32
    image_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_widths(self.vision, self.qformer)


@dataclass(frozen=True)
class MatcherConfig:
    """The stage-1 model: image encoder and Q-Former with its text branch, for ITC, ITM and ITG."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=lambda: QFormerConfig(use_qformer_text_input=True))
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256

    def __post_init__(self) -> None:
        _check_widths(self.vision, self.qformer)
        _check(
            self.qformer.use_qformer_text_input,
            "the stage-1 model needs the Q-Former's text branch: qformer_config.use_qformer_text_input must be true",
        )


def _check_layers(section: str, config: VisionConfig | QFormerConfig | OptConfig, activation: str) -> None:
    """Layers, heads and the activation, which the field of that name holds."""
    _check_depth(section, config.num_hidden_layers)
    width, heads = config.hidden_size, config.num_attention_heads
    _check(
        heads > 0 and width % heads == 0,
        f"{section}: hidden_size {width} cannot be divided into {heads} attention heads",
    )
    _check_activation(f"{section}.{activation}", getattr(config, activation))


def _check_depth(section: str, *layers: int) -> None:
    # A file that lies about this would have us build layers for ever.
    deepest = max(layers)
    _check(deepest <= MAX_LAYERS, f"{section}: {deepest} layers; known are models of up to {MAX_LAYERS}")


def _check_activation(section: str, name: str) -> None:
    _check(name in ACTIVATIONS, f"{section} is {_shown(name)}; known activations: {', '.join(ACTIVATIONS)}")


def _check_widths(vision: VisionConfig, qformer: QFormerConfig) -> None:
    _check(
        vision.hidden_size == qformer.encoder_hidden_size,
        f"the Q-Former reads image features {qformer.encoder_hidden_size} wide, "
        f"but the image encoder's are {vision.hidden_size} wide",
    )


# --- config.json -> config -----------------------------------------------------------------------------------------

# What transformers assumes where a nested text_config is silent; `_read_t5` completes the rest of T5's.
_OPT_DEFAULTS = OptConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072, eos_token_id=2
)
_T5_DEFAULTS = T5Config(d_model=512, d_ff=2048, num_layers=6, num_heads=8)
# Settings of OPT that no BLIP-2 checkpoint uses and this package does not build.
_OPT_REQUIRED: dict[str, Any] = {
    "do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}  # fmt: skip

Config = TypeVar("Config", VisionConfig, QFormerConfig, OptConfig, T5Config)


def _pick(defaults: Config, section: str, raw: Mapping[str, Any]) -> Config:
    """The defaults with the keys of `raw` they know, the type of each one checked."""
    values: dict[str, Any] = {}
    for name, default in asdict(defaults).items():
        if (value := raw.get(name)) is None:
            continue
        if isinstance(default, float) and isinstance(value, int):
            value = float(_whole(f"{section}.{name}", value, 0))
        if name in ("image_size", "patch_size") and isinstance(value, list):
            _check(
                bool(value) and all(side == value[0] for side in value),
                f"{section}.{name} is {_shown(value)}; only square images and patches are supported",
            )
            value = value[0]
        if name == "eos_token_id" and isinstance(value, list):
            _check(
                len(value) <= MAX_END_TOKENS,
                f"{section}.{name} lists {len(value):,} tokens, over {MAX_END_TOKENS}",
            )
            value = tuple(_whole(f"{section}.{name}", token, 0) for token in value)
        elif type(default) is int:
            value = _whole(f"{section}.{name}", value, -1 if name.endswith("_token_id") else 1)
        else:
            expected = type(default).__name__
            good = type(value) is type(default) and (type(value) is not float or math.isfinite(value))
            _check(good, f"{section}.{name} is {_shown(value)}, expected {expected}")
        values[name] = value
    return replace(defaults, **values)


def _whole(section: str, value: object, least: int = 1) -> int:
    """A whole number that a model may have."""
    good = type(value) is int and least <= value <= MAX_SIZE
    _check(good, f"{section} is {str(value)[:80]!r}, expected a whole number from {least} to {MAX_SIZE:,}")
    assert type(value) is int
    return value


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    _check(
        isinstance(section, Mapping), f"config.json: {name} is a {type(section).__name__}, expected an object"
    )
    return section


def read_config(raw: Mapping[str, Any]) -> Blip2Config | MatcherConfig:
    """Read a parsed Hugging Face config.json.

    Where the file is silent its writer's defaults hold, which are those of transformers' config classes. Whether the
    file is the generating model or the stage-1 model is read from `architectures`.

    Raises:
        ConfigError: no BLIP-2 config, a value of the wrong type, sizes that do not fit each other, or a language
            model this package does not build.
    """
    _check(isinstance(raw, Mapping), f"config.json holds a {type(raw).__name__}, expected an object")
    model_type = raw.get("model_type")
    _check(
        model_type in ("blip-2", "blip_2", "blip2"),
        f"config.json says model_type {_shown(model_type)}; expected 'blip-2'. Is this the folder of another model?",
    )
    vision = _pick(VisionConfig(), "vision_config", _section(raw, "vision_config"))
    queries = _whole("num_query_tokens", raw.get("num_query_tokens", 32))
    architectures = raw.get("architectures") or []
    _check(
        isinstance(architectures, list), f"architectures is {_shown(architectures)}, expected a list of names"
    )
    # transformers overwrites the width the Q-Former reads with the image encoder's, so files may hold a stale one.
    section = {**_section(raw, "qformer_config"), "encoder_hidden_size": vision.hidden_size}
    qformer = _pick(QFormerConfig(), "qformer_config", section)
    if any("ImageTextRetrieval" in str(name) for name in architectures):
        shared_width = _whole("image_text_hidden_size", raw.get("image_text_hidden_size") or 256)
        return MatcherConfig(vision, qformer, queries, shared_width)
    text = _section(raw, "text_config")
    kind = text.get("model_type", "opt")
    _check(
        isinstance(kind, str) and kind in _READERS,
        f"the language model is {_shown(kind)}; this version builds {' and '.join(map(repr, _READERS))}",
    )
    language = _READERS[kind](text)
    image_token = raw.get("image_token_index", raw.get("image_token_id"))
    if image_token is not None:
        image_token = _whole("image_token_index", image_token, 0)
    return Blip2Config(vision, qformer, language, queries, image_token)


def _read_opt(text: Mapping[str, Any]) -> OptConfig:
    for name, needed in _OPT_REQUIRED.items():
        _check(
            text.get(name, needed) == needed,
            f"text_config.{name} is {_shown(text.get(name))}; BLIP-2 needs {needed!r}",
        )
    language = _pick(_OPT_DEFAULTS, "text_config", _settings(text))
    embedded = text.get("word_embed_proj_dim") or language.hidden_size
    _check(
        embedded == language.hidden_size,
        f"text_config.word_embed_proj_dim {_shown(embedded)} differs from hidden_size {language.hidden_size}: "
        "not supported",
    )
    return language


def _read_t5(text: Mapping[str, Any]) -> T5Config:
    """What a T5 config leaves out is completed as transformers does; what it spells out counts."""
    settings = _settings(text)
    form = settings.get("feed_forward_proj", "relu")
    gated, _, activation = form.rpartition("-") if isinstance(form, str) else ("?", "", "")
    _check(
        gated in ("", "gated"),
        f"text_config.feed_forward_proj is {_shown(form)}, expected an activation, or 'gated-' before it",
    )
    tied = settings.get("tie_word_embeddings", True)
    completed = {
        "num_decoder_layers": settings.get("num_layers", _T5_DEFAULTS.num_layers),
        "dense_act_fn": "gelu_new" if form == "gated-gelu" else activation,
        "is_gated_act": gated == "gated",
        "scale_decoder_outputs": tied,
        "tie_word_embeddings": tied,
    }
    return _pick(_T5_DEFAULTS, "text_config", completed | settings)


def _settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a text_config; null is as good as absent."""
    settings = {name: value for name, value in text.items() if value is not None}
    if "eos_token_id" in text and text["eos_token_id"] is None:  # but here it says that nothing ends a text
        settings["eos_token_id"] = []
    return settings


_READERS: dict[str, Callable[[Mapping[str, Any]], LanguageConfig]] = {"opt": _read_opt, "t5": _read_t5}


# --- config -> config.json -----------------------------------------------------------------------------------------


def to_hf(config: Blip2Config | MatcherConfig) -> dict[str, Any]:
    """The config.json that transformers opens: the inverse of `read_config`."""
    vision = asdict(config.vision)
    if not config.vision.last_norm_eps:
        del vision["last_norm_eps"]  # transformers has one eps
    raw: dict[str, Any] = {
        "model_type": "blip-2",
        "vision_config": {"model_type": "blip_2_vision_model", **vision},
        "qformer_config": {"model_type": "blip_2_qformer", **asdict(config.qformer)},
        "num_query_tokens": config.num_query_tokens,
    }
    if isinstance(config, MatcherConfig):
        return raw | {
            "architectures": ["Blip2ForImageTextRetrieval"],
            "image_text_hidden_size": config.image_text_hidden_size,
            "text_config": {"model_type": "opt"},
        }
    language = config.language
    text = asdict(language) | {"model_type": language.model_type}
    if isinstance(language.eos_token_id, tuple):
        text["eos_token_id"] = list(language.eos_token_id) or None
    if isinstance(language, OptConfig):
        text["word_embed_proj_dim"] = language.hidden_size
    else:
        activation = language.dense_act_fn.removesuffix("_new")
        form = f"gated-{activation}" if language.is_gated_act else activation
        text |= {"is_encoder_decoder": True, "feed_forward_proj": form}
    raw |= {
        "architectures": ["Blip2ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": language.tie_word_embeddings,
        "use_decoder_only_language_model": not language.is_encoder_decoder,
    }
    return raw if config.image_token_id is None else raw | {"image_token_index": config.image_token_id}
