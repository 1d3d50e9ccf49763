"""How the tensors of a checkpoint are named and laid out: what `formats` says of each format.

Rules (see `key_mapping`) have Hugging Face's name first. What a format stores besides is listed as dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blip2.checkpoint.key_mapping import HF_HEAD, Rules

# Weights of two dimensions that are no linear layer's.
_TABLES = {
    *("embed_tokens", "embed_positions", "shared", "word_embeddings", "position_embeddings"),
    "relative_attention_bias",
}


@dataclass(frozen=True)
class Layout:
    """How a format names and lays out the tensors of a model.

    eva, clip: rules for the two image encoders; opt, t5: for the two language models; rest: for everything else.
    marks: what names of such a file begin with, by which it is known.
    dropped: what files hold that is no weight of a model, or the same weight once more.
    transposed: whether the weights of linear layers are [in, out], as in Paddle.
    split_qkv_bias: whether the query's and the value's bias are stored apart and the key's, which is zero, is not.
    leading_ones: tensors of CLIP that are stored without their leading sides of 1, and how many these are.
    """

    name: str
    eva: Rules = ()
    clip: Rules = ()
    opt: Rules = ()
    t5: Rules = ()
    rest: Rules = ()
    marks: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    transposed: bool = False
    split_qkv_bias: bool = False
    leading_ones: Mapping[str, int] = field(default_factory=dict, hash=False)

    def rules(self, hf_names: Iterable[str]) -> Rules:
        """The rules that write a model with these names."""
        names = list(hf_names)
        clip = any(name.startswith("vision_model.pre_layernorm.") for name in names)
        t5 = any(name.startswith("language_model.encoder.") for name in names)
        return (*(self.clip if clip else self.eva), *self.rest, *(self.t5 if t5 else self.opt))

    @property
    def all_rules(self) -> Rules:
        """The rules that read any file: no name occurs in two variants."""
        return (*self.eva, *self.clip, *self.rest, *self.opt, *self.t5)

    def is_dropped(self, name: str) -> bool:
        """Whether a stored tensor is left out on purpose."""
        return any(name == drop or (drop.endswith(".") and name.startswith(drop)) for drop in self.dropped)

    def is_transposed(self, hf_name: str, dimensions: int, *, t5: bool) -> bool:
        """Whether a tensor is stored transposed. Paddle's OPT keeps its head as it is, T5's is a linear layer."""
        return (
            self.transposed
            and dimensions == 2
            and hf_name.endswith(".weight")
            and hf_name.split(".")[-2] not in _TABLES
            and (t5 or hf_name != HF_HEAD)
        )


HUGGING_FACE = Layout("hf")
