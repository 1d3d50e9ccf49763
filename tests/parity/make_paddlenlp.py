"""Makes tests/parity/fixtures/paddlenlp-*: tiny random models of PaddleNLP's own BLIP-2 as it saves them, and logits.

Run where paddlepaddle and paddlenlp are installed, which need be nowhere else:
    python tests/parity/make_paddlenlp.py tests/parity/fixtures
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


def make(folder: Path, language: dict[str, object]) -> None:
    random = np.random.default_rng(0)
    config = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=language, num_query_tokens=4
    )
    model = Blip2ForConditionalGeneration(config)
    for name, parameter in sorted(model.named_parameters()):
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        values = middle + 0.3 * random.standard_normal(parameter.shape)
        parameter.set_value(paddle.to_tensor(values.astype("float32")))
    model.eval()
    pixels = random.standard_normal((2, 3, 32, 32)).astype("float32")
    ids = random.integers(8, 90, (2, 5))
    given = {
        "pixel_values": paddle.to_tensor(pixels),
        "input_ids": paddle.to_tensor(ids),
        "attention_mask": paddle.ones([2, 5], dtype="int64"),
    }
    if language["model_type"] == "t5":
        given["decoder_input_ids"] = paddle.to_tensor(ids)
    with paddle.no_grad():
        found = model(**given, return_dict=True)
    logits = found.logits if hasattr(found, "logits") and found.logits is not None else found[0]
    model.save_pretrained(str(folder))
    np.savez(folder / "expected.npz", pixels=pixels, ids=ids, logits=logits.numpy())
    print(folder, sorted(path.name for path in folder.iterdir()), logits.shape)


if __name__ == "__main__":
    base = Path(sys.argv[1])
    make(base / "paddlenlp-opt", OPTConfig(**OPT).to_dict())
    make(base / "paddlenlp-t5", T5Config(**T5).to_dict())
