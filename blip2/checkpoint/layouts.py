"""Name tables of the other worlds: Hugging Face's tensor names <-> LAVIS's, PaddleNLP's and PaddleMIX's.

A rule is a pair of names, Hugging Face's first. `*` stands for a layer's number, and a name that ends in "." for all
names that begin so; the first rule that fits counts. What a layout stores besides is written down as dropped.
Followed: LAVIS's models/blip2_models, PaddleNLP's transformers/{blip_2,opt,t5}, PaddleMIX's models/blip2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

Rules = tuple[tuple[str, str], ...]

_LAYER = "vision_model.encoder.layers.*"
_EVA: Rules = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    (f"{_LAYER}.layer_norm1.", "visual_encoder.blocks.*.norm1."),
    (f"{_LAYER}.layer_norm2.", "visual_encoder.blocks.*.norm2."),
    (f"{_LAYER}.self_attn.qkv.", "visual_encoder.blocks.*.attn.qkv."),
    (f"{_LAYER}.self_attn.projection.", "visual_encoder.blocks.*.attn.proj."),
    (f"{_LAYER}.mlp.", "visual_encoder.blocks.*.mlp."),
)
_CLIP: Rules = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.class_embedding"),  # [W] for [1, 1, W]
    ("vision_model.embeddings.position_embedding", "visual_encoder.positional_embedding"),  # [N, W]
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.conv1."),
    ("vision_model.pre_layernorm.", "visual_encoder.ln_pre."),
    (f"{_LAYER}.layer_norm1.", "visual_encoder.transformer.resblocks.*.ln_1."),
    (f"{_LAYER}.layer_norm2.", "visual_encoder.transformer.resblocks.*.ln_2."),
    (f"{_LAYER}.self_attn.qkv.weight", "visual_encoder.transformer.resblocks.*.attn.in_proj_weight"),
    (f"{_LAYER}.self_attn.qkv.bias", "visual_encoder.transformer.resblocks.*.attn.in_proj_bias"),
    (f"{_LAYER}.self_attn.projection.", "visual_encoder.transformer.resblocks.*.attn.out_proj."),
    (f"{_LAYER}.mlp.fc1.", "visual_encoder.transformer.resblocks.*.mlp.c_fc."),
    (f"{_LAYER}.mlp.fc2.", "visual_encoder.transformer.resblocks.*.mlp.c_proj."),
)
_BERT: Rules = (
    ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    ("embeddings.word_embeddings.", "Qformer.bert.embeddings.word_embeddings."),
    ("embeddings.position_embeddings.", "Qformer.bert.embeddings.position_embeddings."),
    ("qformer.encoder.layer.*.attention.attention.", "Qformer.bert.encoder.layer.*.attention.self."),
    (
        "qformer.encoder.layer.*.crossattention.attention.",
        "Qformer.bert.encoder.layer.*.crossattention.self.",
    ),
    ("qformer.encoder.layer.", "Qformer.bert.encoder.layer."),
    ("itg_head.dense.", "Qformer.cls.predictions.transform.dense."),
    ("itg_head.LayerNorm.", "Qformer.cls.predictions.transform.LayerNorm."),
    ("itg_head.bias", "Qformer.cls.predictions.bias"),
)
_BERT_DROPPED = (
    "Qformer.bert.embeddings.position_ids",  # counted positions
    "Qformer.bert.embeddings.token_type_embeddings.",  # PaddleMIX allocates and never reads it
    "Qformer.cls.predictions.decoder.",  # the word embeddings and `predictions.bias` once more
)
_LAVIS: Rules = (
    ("query_tokens", "query_tokens"),
    ("vision_model.post_layernorm.", "ln_vision."),
    *_BERT,
    ("vision_projection.", "vision_proj."),
    ("text_projection.", "text_proj."),
    ("itm_head.", "itm_head."),
    ("temp", "temp"),
)
_LAVIS_OPT: Rules = (("language_projection.", "opt_proj."), ("language_model.", "opt_model."))
_LAVIS_T5: Rules = (("language_projection.", "t5_proj."), ("language_model.", "t5_model."))

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
    ("language_model.lm_head.weight", "language_model.lm_head.decoder_weight"),
)
_PADDLE_T5: Rules = (
    ("language_model.lm_head.weight", "language_model.lm_head.weight"),
    ("language_model.", "language_model.t5."),
)
_SAME_IN_PADDLENLP: Rules = tuple(
    (name, name)
    for name in (
        *("vision_model.", "qformer.", "query_tokens", "language_projection.", "embeddings."),
        *("vision_projection.", "text_projection.", "itm_head.", "itg_head.", "temp"),
    )
)
_PADDLEMIX: Rules = (
    *_EVA,
    ("query_tokens", "Qformer.query_tokens"),
    ("vision_model.post_layernorm.", "Qformer.ln_vision."),
    *_BERT,
    ("language_projection.", "Qformer.language_projection."),
    ("vision_projection.", "Qformer.vision_proj."),
    ("text_projection.", "Qformer.text_proj."),
    ("itm_head.", "Qformer.itm_head."),
    ("temp", "temp"),  # [1] for a scalar
)


@dataclass(frozen=True)
class Layout:
    """How a world names and lays out the tensors of a model.

    eva, clip: rules for the two image encoders; opt, t5: for the two language models; rest: for everything else.
    dropped: what files hold that is no weight of a model, or one that stands there twice.
    transposed: whether the weights of linear layers are [in, out].
    split_qkv_bias: whether the query's and the value's bias are stored apart and the key's, which is zero, is not.
    """

    name: str
    eva: Rules
    clip: Rules
    opt: Rules
    t5: Rules
    rest: Rules
    dropped: tuple[str, ...] = ()
    transposed: bool = False
    split_qkv_bias: bool = False

    def rules(self, hugging_face_names: Iterable[str]) -> Rules:
        """The rules that write a model with these names."""
        names = list(hugging_face_names)
        clip = any(name.startswith("vision_model.pre_layernorm.") for name in names)
        t5 = any(name.startswith("language_model.encoder.") for name in names)
        return (*(self.clip if clip else self.eva), *self.rest, *(self.t5 if t5 else self.opt))

    @property
    def all_rules(self) -> Rules:
        """The rules that read any file: the variants' names do not meet."""
        return (*self.eva, *self.clip, *self.rest, *self.opt, *self.t5)

    def is_dropped(self, name: str) -> bool:
        """Whether a stored tensor is left out on purpose."""
        return any(name == each or (each.endswith(".") and name.startswith(each)) for each in self.dropped)


HUGGING_FACE = Layout("hf", (), (), (), (), ())
LAVIS = Layout(
    "lavis",
    _EVA,
    _CLIP,
    _LAVIS_OPT,
    _LAVIS_T5,
    _LAVIS,
    dropped=(*_BERT_DROPPED, "opt_model.model.decoder.version"),
    split_qkv_bias=True,
)
PADDLENLP = Layout("paddlenlp", (), (), _PADDLE_OPT, _PADDLE_T5, _SAME_IN_PADDLENLP, transposed=True)
PADDLEMIX = Layout(
    "paddlemix",
    (),
    (),
    _PADDLE_OPT,
    _PADDLE_T5,
    _PADDLEMIX,
    dropped=_BERT_DROPPED,
    transposed=True,
)

# What a file's names begin with, by which it is known; the first that fits counts.
_MARKS: tuple[tuple[Layout, tuple[str, ...]], ...] = (
    (PADDLEMIX, ("Qformer.ln_vision.", "Qformer.query_tokens", "Qformer.language_projection.")),
    (
        LAVIS,
        ("Qformer.", "visual_encoder.", "ln_vision.", "opt_model.", "opt_proj.", "t5_model.", "t5_proj."),
    ),
    (PADDLENLP, ("language_model.opt.", "language_model.t5.", "language_model.lm_head.decoder_weight")),
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of a file, from its tensors' names and shapes.

    Where names say nothing, a linear layer does: its bias is as long as its weight's first side in torch, and as the
    second in Paddle.
    """
    for layout, marks in _MARKS:
        if any(name.startswith(marks) for name in shapes):
            return layout
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and shape[0] != shape[1]:
            bias = shapes.get(name.removesuffix("weight") + "bias")
            if bias is not None:
                return PADDLENLP if bias == shape[1:] else HUGGING_FACE
    return HUGGING_FACE


# Weights of two dimensions that are no linear layer's. Paddle's OPT keeps its head as it is, T5's is a linear layer.
_TABLES = (
    "embed_tokens",
    "embed_positions",
    "shared",
    "word_embeddings",
    "position_embeddings",
    "relative_attention_bias",
)


def is_transposed(name: str, dimensions: int, layout: Layout, *, t5: bool) -> bool:
    """Whether the layout stores the tensor with this Hugging Face name the other way round."""
    return (
        layout.transposed
        and dimensions == 2
        and name.endswith(".weight")
        and name.split(".")[-2] not in _TABLES
        and (t5 or name != "language_model.lm_head.weight")
    )


def to_theirs(name: str, rules: Rules) -> str | None:
    """Hugging Face's name -> the layout's, None where it has none."""
    return _rename(name, _compiled(rules, False))


def to_hugging_face(name: str, rules: Rules) -> str | None:
    """The layout's name -> Hugging Face's, None where it has none."""
    return _rename(name, _compiled(rules, True))


def _rename(name: str, patterns: tuple[tuple[re.Pattern[str], str], ...]) -> str | None:
    for pattern, template in patterns:
        found = pattern.fullmatch(name)
        if found:
            return template.format(*found.groups())
    return None


@cache
def _compiled(rules: Rules, back: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    def pattern(name: str) -> re.Pattern[str]:
        return re.compile(re.escape(name).replace(r"\*", r"(\d+)") + ("(.+)" if name.endswith(".") else ""))

    def template(name: str) -> str:
        return name.replace("*", "{}") + ("{}" if name.endswith(".") else "")

    pairs = ((right, left) if back else (left, right) for left, right in rules)
    return tuple((pattern(old), template(new)) for old, new in pairs)
