"""Makes tests/parity/fixtures/paddlenlp-*: tiny random models of PaddleNLP's own BLIP-2 as it saves them, and logits.

Run where paddlepaddle and paddlenlp (3.0.0b4) are installed, which need be nowhere else:
    python tests/parity/make_paddlenlp.py tests/parity/fixtures
    python tests/parity/make_paddlenlp.py FOLDER EXPECTED.npz   # does PaddleNLP open what `blip2 convert` made of one?
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config

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
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def make(folder: Path, language: dict[str, object], spread: float) -> None:
    random = np.random.default_rng(0)
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=language, num_query_tokens=4
    )
    model = Blip2ForConditionalGeneration(config)
    for name, parameter in sorted(model.named_parameters()):
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        values = middle + spread * random.standard_normal(parameter.shape)
        parameter.set_value(paddle.to_tensor(values.astype("float32")))
    model.eval()
    pixels = random.standard_normal((2, 3, 32, 32)).astype("float32")
    ids = random.integers(8, 90, (2, 5))
    logits = run(model, pixels, ids)
    model.save_pretrained(str(folder))
    np.savez(folder / "expected.npz", pixels=pixels, ids=ids, logits=logits)
    print(folder, logits.shape)


def run(model: Blip2ForConditionalGeneration, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Logits of the text; T5 reads it and writes it."""
    inputs = {
        "pixel_values": paddle.to_tensor(pixels),
        "input_ids": paddle.to_tensor(ids),
        "attention_mask": paddle.ones(ids.shape, dtype="int64"),
    }
    if model.config.text_config.model_type == "t5":
        inputs["decoder_input_ids"] = paddle.to_tensor(ids)
    with paddle.no_grad():
        return model.eval()(**inputs, return_dict=True).logits.numpy()


def check(folder: Path, expected: Path) -> None:
    wanted = np.load(expected)
    model = Blip2ForConditionalGeneration.from_pretrained(str(folder))
    difference = np.abs(run(model, wanted["pixels"], wanted["ids"]) - wanted["logits"]).max()
    print(folder, "largest difference of a logit", difference)
    assert difference < 1e-5


if __name__ == "__main__":
    base = Path(sys.argv[1])
    if len(sys.argv) == 3:
        check(base, Path(sys.argv[2]))
    else:
        make(base / "paddlenlp-opt", OPTConfig(**OPT).to_dict(), spread=0.3)
        # T5 does not scale its scores: wider weights make rounding visible
        make(base / "paddlenlp-t5", T5Config(**T5).to_dict(), spread=0.15)
