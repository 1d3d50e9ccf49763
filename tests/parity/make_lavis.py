"""Makes tests/parity/fixtures/lavis-*: tiny random models of LAVIS's own BLIP-2 as it saves them, and what they gave.

Run where salesforce-lavis (1.0.2), transformers (4.33), tokenizers, huggingface-hub (0.17), timm (0.4.12), einops,
omegaconf and iopath are installed beside torch, which need be nowhere else:
    python tests/parity/make_lavis.py tests/parity/fixtures
    python tests/parity/make_lavis.py FOLDER.pth EXPECTED.npz   # does LAVIS open what `blip2 convert` made of one?
Only sizes are changed: what LAVIS would download is made here, and what BLIP-2 does not use is not imported.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import BatchEncoding, BertTokenizer


def _bare(package: str) -> None:
    """Let a package's modules be imported without its __init__, which imports every model there is."""
    base, *inner = package.split(".")
    if not inner:
        spec = importlib.util.find_spec(base)
        assert spec is not None and spec.submodule_search_locations is not None
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(sys.modules[base].__path__[0], *inner)
    module = types.ModuleType(package)
    module.__path__ = [str(path)]
    sys.modules[package] = module


for _package in ("lavis", "lavis.models", "timm", "timm.models"):
    _bare(_package)
for _absent in ("torchvision.datasets.utils", "pandas", "fairscale.nn.checkpoint.checkpoint_activations"):
    _parts = _absent.split(".")
    for _i in range(len(_parts)):  # nothing of these is ever called
        sys.modules[".".join(_parts[: _i + 1])] = mock.MagicMock(__path__=[])
sys.modules["timm.models.hub"] = mock.MagicMock()

from lavis.models.base_model import BaseModel  # noqa: E402

sys.modules["lavis.models"].BaseModel = BaseModel  # where the registry looks for it
from lavis.models.blip2_models import blip2, blip2_opt, blip2_t5  # noqa: E402
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM  # noqa: E402
from lavis.models.eva_vit import VisionTransformer  # noqa: E402

KINDS = {"stage1": "temp", "opt": "opt_proj.bias", "t5": "t5_proj.bias"}  # and what only its checkpoints hold
SPREAD = {
    "stage1": 0.3,
    "opt": 0.3,
    "t5": 0.15,
}  # T5 does not scale its scores: wider weights make rounding visible
PX, QUERIES, TEXT = 32, 4, 12
WORDS = ("a", "photo", "of", "the", "red", "cat", "and", "two", "dogs", "by", "sea", "in", "it")
TEXTS = ["a photo of the red cat", "two dogs by the sea and a cat in it"]
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 40,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
VISION = {
    "hidden_size": 88,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": PX,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "encoder_hidden_size": 88,
}


def eva(img_size: int, *_: object) -> VisionTransformer:
    """LAVIS's image encoder, smaller: eps, biases and pooling as `create_eva_vit_g` has them."""
    return VisionTransformer(
        img_size=img_size,
        patch_size=VISION["patch_size"],
        use_mean_pooling=False,
        embed_dim=VISION["hidden_size"],
        depth=VISION["num_hidden_layers"],
        num_heads=VISION["num_attention_heads"],
        mlp_ratio=VISION["intermediate_size"] / VISION["hidden_size"],
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )


class LanguageTokenizer:
    """Words to ids as OPT's (</s> before) or T5's (</s> after) tokenizer returns them."""

    padding_side = "right"

    def __init__(self, pad_token_id: int, end: int, first: bool) -> None:
        self.pad_token_id, self.end, self.first, self.seen = pad_token_id, end, first, []

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **_: object) -> Any:
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = [5 + WORDS.index(word) for word in text.rstrip("\n").split()] + [4] * text.endswith("\n")
            frame = [self.end] if add_special_tokens else []
            rows.append(frame + ids if self.first else ids + frame)
        if isinstance(texts, str) and not add_special_tokens:
            return BatchEncoding({"input_ids": rows[0]})
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_token_id] * (longest - len(row)) for row in rows])
        self.seen.append(ids)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != self.pad_token_id).long()})


def draw(model: nn.Module, seed: int, spread: float) -> None:
    """Every parameter at random, none of them zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        drawn = middle + spread * torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn.half().float()  # exact in the file, which is half the size
    if hasattr(model, "temp"):
        model.temp.data.fill_(0.25)


def build(kind: str) -> Any:
    """LAVIS's model, tiny."""
    bert = blip2.BertConfig(
        vocab_size=5 + len(WORDS), **{n: v for n, v in QFORMER.items() if n != "encoder_hidden_size"}
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        tokenizer = BertTokenizer(str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    opt = blip2_opt.OPTForCausalLM(blip2_opt.OPTConfig(**OPT))
    t5 = blip2_t5.T5ForConditionalGeneration(blip2_t5.T5Config(**T5, dense_act_fn="gelu"))
    with (
        mock.patch.object(blip2, "create_eva_vit_g", eva),
        mock.patch.object(blip2.Blip2Base, "init_tokenizer", return_value=tokenizer),
        mock.patch.object(blip2.BertConfig, "from_pretrained", return_value=bert),
        mock.patch.object(
            blip2.BertLMHeadModel, "from_pretrained", lambda _, config: blip2.BertLMHeadModel(config)
        ),
        mock.patch.object(
            blip2_opt.AutoTokenizer, "from_pretrained", lambda *_, **__: LanguageTokenizer(1, 2, True)
        ),
        mock.patch.object(blip2_opt.OPTForCausalLM, "from_pretrained", lambda *_, **__: opt),
        mock.patch.object(
            blip2_t5.T5TokenizerFast, "from_pretrained", lambda *_: LanguageTokenizer(0, 1, False)
        ),
        mock.patch.object(blip2_t5.T5Config, "from_pretrained", lambda *_: blip2_t5.T5Config(**T5)),
        mock.patch.object(blip2_t5.T5ForConditionalGeneration, "from_pretrained", lambda *_, **__: t5),
    ):
        size = {"img_size": PX, "num_query_token": QUERIES, "max_txt_len": TEXT, "vit_precision": "fp32"}
        if kind == "stage1":
            model = Blip2ITM(**size, embed_dim=16)
        elif kind == "opt":
            model = blip2_opt.Blip2OPT(**size, prompt="a photo of")
        else:
            model = blip2_t5.Blip2T5(**size)
    model = model.float().eval()
    if kind == "opt":
        model.opt_model.tie_weights()
    return model


@torch.no_grad()
def run(model: Any, kind: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What LAVIS makes of two images with a text each, and the ids it read."""
    samples = {"image": pixels, "text_input": TEXTS}
    if kind == "stage1":
        # of two images each has one negative, so nothing is drawn
        losses = super(Blip2ITM, model).forward(samples)
        read = model.tokenizer(
            TEXTS, padding="max_length", max_length=TEXT, truncation=True, return_tensors="pt"
        )
        same = {"image": pixels, "text_input": [TEXTS[0], TEXTS[0]]}
        return {
            "ids": read.input_ids.numpy(),
            "mask": read.attention_mask.numpy(),
            "dec": np.array(model.tokenizer.bos_token_id),
            **{part: getattr(losses, f"loss_{part}").numpy() for part in ("itc", "itm", "lm")},
            "itm_logits": model(same, match_head="itm").numpy(),
            "itc_scores": model(same, match_head="itc").numpy(),
        }
    words = model.opt_tokenizer if kind == "opt" else model.t5_tokenizer
    words.seen.clear()
    loss = model(samples | {"text_output": ["a cat", "two dogs by the sea"]})["loss"]
    return {"loss": loss.numpy(), **{f"ids_{i}": ids.numpy() for i, ids in enumerate(words.seen)}}


def settings(kind: str) -> dict[str, Any]:
    """The config.json put beside: tiny language models' heads are not to be seen in their shapes."""
    # the activation is LAVIS's own choice, whatever T5's config says
    language = (
        {"model_type": "opt"} | OPT if kind == "opt" else {"model_type": "t5", "dense_act_fn": "gelu"} | T5
    )
    return {
        "model_type": "blip-2",
        "vision_config": VISION | {"layer_norm_eps": 1e-6},
        "qformer_config": QFORMER,
        "text_config": language,
        "num_query_tokens": QUERIES,
    }


def make(base: Path, kind: str) -> None:
    model = build(kind)
    draw(model, seed=0, spread=SPREAD[kind])
    pixels = torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(1))
    folder = base / f"lavis-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    outputs = run(model, kind, pixels)
    np.savez(folder / "expected.npz", pixels=pixels.numpy(), **outputs)
    state = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, folder / "checkpoint.pth")
    if kind != "stage1":
        (folder / "config.json").write_text(json.dumps(settings(kind), indent=2) + "\n")
    print(folder, {name: value.tolist() for name, value in outputs.items() if value.size < 5})


def check(file: Path, expected: Path) -> None:
    held = torch.load(file)["model"]
    kind = next(kind for kind, name in KINDS.items() if name in held)
    model = build(kind)
    draw(model, seed=2, spread=SPREAD[kind])
    print(model.load_from_pretrained(str(file)))
    wanted = np.load(expected)
    for name, value in run(model, kind, torch.from_numpy(wanted["pixels"])).items():
        difference = np.abs(value - wanted[name]).max()
        print(kind, name, "largest difference", difference)
        assert difference < 1e-5


if __name__ == "__main__":
    store = f"file://{tempfile.mktemp()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    if len(sys.argv) == 3:
        check(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        for kind in KINDS:
            make(Path(sys.argv[1]), kind)
