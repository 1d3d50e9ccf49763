"""Small random models in transformers' form, and the same weights in ours. For the tests beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Blip2Config as TheirConfig
from transformers import Blip2ForConditionalGeneration

from blip2.checkpoint.key_mapping import from_hugging_face
from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import Blip2Config, read_config

QUERIES, IMAGE_TOKEN, PAD, VOCABULARY = 4, 97, 1, 100
CLOSE = {"rtol": 0.0, "atol": 1e-4}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 60,
    "max_position_embeddings": 20,
}
TEXT = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}
T5_TEXT = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "eos_token_id": 7,
    "decoder_start_token_id": 0,
}


def make_visible(module: nn.Module, seed: int = 0, spread: float = 0.3) -> nn.Module:
    """Draw every parameter anew, none of them zero or one: a bias, norm or embedding left out must show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data = middle + spread * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def their_config(text: dict[str, Any]) -> TheirConfig:
    return TheirConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )


def their_blip2(seed: int = 0, **text: Any) -> Blip2ForConditionalGeneration:
    """transformers' model, 32 px and 4 queries; `text` overrides the language model's config."""
    model = make_visible(Blip2ForConditionalGeneration(their_config(TEXT | text)), seed)
    assert isinstance(model, Blip2ForConditionalGeneration)
    return model


def their_t5(seed: int = 0, *, head: bool = True, **text: Any) -> Blip2ForConditionalGeneration:
    """The same with T5; `head`: one of its own, not the word embeddings' weight."""
    model = Blip2ForConditionalGeneration(their_config(T5_TEXT | text))
    if head:
        language = model.language_model
        language.lm_head.weight = nn.Parameter(torch.empty_like(language.shared.weight))
    model = make_visible(model, seed, spread=0.2)  # its scores are not scaled: wider ones magnify rounding
    assert isinstance(model, Blip2ForConditionalGeneration)
    return model


def ours_from(theirs: Blip2ForConditionalGeneration) -> Blip2:
    """Our model with their weights, every one of them."""
    config = read_config(theirs.config.to_dict())
    assert isinstance(config, Blip2Config)
    # as loading finds out
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    ours = Blip2(replace(config, language=replace(config.language, tie_word_embeddings=tied))).eval()
    ours.load_state_dict({from_hugging_face(name): tensor for name, tensor in theirs.state_dict().items()})
    return ours


@dataclass(frozen=True)
class Prompts:
    """A batch as both sides take it: left-padded text for ours, image tokens before the text for theirs."""

    pixels: Tensor  # [B, 3, 32, 32]
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]

    def row(self, i: int) -> Prompts:
        """Prompt i alone, without its padding."""
        kept = self.mask[i].bool()
        return Prompts(self.pixels[i : i + 1], self.ids[i : i + 1, kept], self.mask[i : i + 1, kept])

    def padded_right(self) -> tuple[Tensor, Tensor]:
        """Ids and mask with the padding after the text."""
        ids, mask = torch.full_like(self.ids, PAD), torch.zeros_like(self.mask)
        for i, kept in enumerate(self.mask.bool()):
            length = int(kept.sum())
            ids[i, :length], mask[i, :length] = self.ids[i, kept], 1
        return ids, mask

    def theirs(self) -> dict[str, Tensor]:
        """pixel_values, input_ids and attention_mask for transformers: padding, image tokens, text."""
        ids, mask = [], []
        for row, kept in zip(self.ids, self.mask):
            padding = len(row) - int(kept.sum())
            ids.append(torch.tensor([PAD] * padding + [IMAGE_TOKEN] * QUERIES + row[kept.bool()].tolist()))
            mask.append(torch.tensor([0] * padding + [1] * (len(ids[-1]) - padding)))
        return {
            "pixel_values": self.pixels,
            "input_ids": torch.stack(ids),
            "attention_mask": torch.stack(mask),
        }


def prompts(lengths: tuple[int, ...] = (2, 5, 3), seed: int = 0) -> Prompts:
    """Random images and prompts of these lengths: `</s>` (2), then words."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(len(lengths), 3, 32, 32, generator=generator)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, -length:] = torch.randint(8, 90, (length,), generator=generator)
        ids[i, -length] = 2
        mask[i, -length:] = 1
    return Prompts(pixels, ids, mask)


# --- folders ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def their_logits(theirs: Blip2ForConditionalGeneration, **inputs: Tensor) -> Tensor:
    logits: Tensor = theirs(**prompts((4, 4)).theirs(), **inputs).logits
    return logits


@torch.inference_mode()
def our_logits(ours: Any, *inputs: Tensor) -> Tensor:
    assert isinstance(ours, Blip2)
    batch = prompts((4, 4))
    return ours(batch.pixels, batch.ids, batch.mask, *inputs)


def reopened(folder: Path, kind: Any = Blip2ForConditionalGeneration) -> Any:
    """transformers' model from our folder, with nothing missing and nothing left over."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change, add or (None) remove tensors of a saved model."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_image_token(folder: Path) -> dict[str, Any]:
    """Remove the image token from a folder's config.json; returns the config, to be changed further."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    return config
