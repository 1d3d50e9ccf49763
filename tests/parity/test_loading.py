"""transformers' folders load with equal outputs, and ours open in transformers with equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")
from reference import (
    CLOSE,
    QFORMER,
    QUERIES,
    TEXT,
    VISION,
    make_visible,
    our_logits,
    reopened,
    rewrite,
    their_blip2,
    their_logits,
    without_image_token,
)
from transformers import Blip2Config as TheirConfig
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    GPT2Tokenizer,
)

from blip2.checkpoint import load_model, load_processors, open_tensors, save_model
from blip2.images import ImageProcessor, to_pixels
from blip2.modeling.blip2 import Blip2, Blip2Matcher

HEAD, WORDS = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def their_matcher(seed: int = 0) -> Blip2ForImageTextRetrieval:
    config = TheirConfig(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=TEXT,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    model = make_visible(Blip2ForImageTextRetrieval(config), seed)
    assert isinstance(model, Blip2ForImageTextRetrieval)
    return model


@torch.inference_mode()
def their_scores(theirs: Blip2ForImageTextRetrieval) -> tuple[Tensor, Tensor]:
    """ITM logits of image i with text i, and ITC similarity of every image with every text."""
    pixels, ids, mask = matching_inputs()
    inputs: dict[str, Any] = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    itm = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    return itm, theirs(**inputs, use_image_text_matching_head=False).logits_per_image


@torch.inference_mode()
def our_scores(ours: Blip2 | Blip2Matcher) -> tuple[Tensor, Tensor]:
    assert isinstance(ours, Blip2Matcher)
    pixels, ids, mask = matching_inputs()
    features = ours.vision(pixels)
    similarity = ours.image_embeddings(features) @ ours.text_embeddings(ids, mask).T  # [images, Q, texts]
    return ours.itm_logits(features, ids, mask), similarity.amax(dim=1)


def matching_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = torch.randint(3, 60, (2, 5), generator=generator) * mask
    return torch.randn(2, 3, 32, 32, generator=generator), ids, mask


# --- theirs -> ours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_their_folder(dtype: torch.dtype, shards: str, tied: bool, tmp_path: Path) -> None:
    theirs = their_blip2(tie_word_embeddings=tied).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "40KB")
    ours = load_model(tmp_path, dtype=torch.float32)
    assert isinstance(ours, Blip2)
    assert ours.config.language.tie_word_embeddings == tied
    assert (ours.language.lm_head.weight is ours.language.embed_tokens.weight) == tied
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(our_logits(ours), their_logits(theirs.float()), **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    """Without a dtype the weights stay what they are, and the model runs."""
    theirs = their_blip2().to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    difference = (our_logits(ours).float() - their_logits(theirs.float())).abs().max()
    assert difference < {torch.float32: 1e-4, torch.float16: 0.2, torch.bfloat16: 1.5}[dtype]


def test_a_wider_qformer(tmp_path: Path) -> None:
    """Published fp16 files keep their Q-Former in fp32."""
    theirs = their_blip2().half()
    theirs.qformer.float()
    theirs.query_tokens.data = theirs.query_tokens.data.float()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours, Blip2)
    assert {parameter.dtype for parameter in ours.qformer.parameters()} == {torch.float32}
    for part in (ours.vision, ours.projection, ours.language):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float16}
    mixed = our_logits(ours)
    assert mixed.dtype == torch.float16
    expected = their_logits(theirs.float())
    assert (mixed.float() - expected).abs().max() < 0.2
    torch.testing.assert_close(our_logits(load_model(tmp_path, dtype="fp32")), expected, **CLOSE)


@pytest.mark.parametrize("announced", [True, False])
def test_heads_absent_equal_and_different(announced: bool, tmp_path: Path) -> None:
    """What is stored counts, whatever config.json says of tying."""
    theirs = their_blip2(tie_word_embeddings=announced)
    theirs.save_pretrained(tmp_path)
    words = theirs.get_input_embeddings().weight.detach()
    other = torch.randn(words.shape, generator=torch.Generator().manual_seed(1))

    rewrite(tmp_path, **{HEAD: words})
    equal = load_model(tmp_path)
    rewrite(tmp_path, **{HEAD: None})
    absent = load_model(tmp_path)
    rewrite(tmp_path, **{HEAD: words, WORDS: None})
    head_alone = load_model(tmp_path)
    rewrite(tmp_path, **{HEAD: other, WORDS: words})
    different = load_model(tmp_path)

    theirs.get_output_embeddings().weight = torch.nn.Parameter(words.clone())
    for ours in (equal, absent, head_alone):
        assert ours.language.lm_head.weight is ours.language.embed_tokens.weight
        torch.testing.assert_close(our_logits(ours), their_logits(theirs), **CLOSE)
    theirs.get_output_embeddings().weight = torch.nn.Parameter(other)
    assert different.language.lm_head.weight is not different.language.embed_tokens.weight
    torch.testing.assert_close(our_logits(different), their_logits(theirs), **CLOSE)


def test_configs_of_older_and_newer_files(tmp_path: Path) -> None:
    """No image token and the bare vocabulary, then the image token and a padded one: the same logits for its words."""
    theirs = their_blip2(vocab_size=100)
    theirs.save_pretrained(tmp_path / "old")
    raw = without_image_token(tmp_path / "old")
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    position_ids = torch.arange(20)[None]
    rewrite(tmp_path / "old", **{"embeddings.position_ids": position_ids})  # a buffer of older files
    old = load_model(tmp_path / "old")
    assert old.config.image_token_id is None

    theirs.resize_token_embeddings(128, mean_resizing=False)
    theirs.save_pretrained(tmp_path / "new")
    new = load_model(tmp_path / "new")
    assert new.config.image_token_id == 97
    assert our_logits(new).shape[-1] == 128
    torch.testing.assert_close(our_logits(new)[..., :100], our_logits(old), **CLOSE)


def test_a_vocabulary_config_json_does_not_know(tmp_path: Path) -> None:
    theirs = their_blip2(vocab_size=128)
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = load_model(tmp_path)
    assert ours.config.language.vocab_size == 128
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), **CLOSE)


def test_no_end_token(tmp_path: Path) -> None:
    """null is not silence: transformers then ends no text, whatever its default."""
    their_blip2(eos_token_id=None).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert isinstance(ours, Blip2)
    assert ours.config.language.eos_token_id == ()
    save_model(ours, tmp_path / "ours")
    assert reopened(tmp_path / "ours").generation_config.eos_token_id is None
    assert load_model(tmp_path / "ours").config == ours.config


def test_their_matcher(tmp_path: Path) -> None:
    theirs = their_matcher()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    ours = load_model(tmp_path)
    for mine, expected in zip(our_scores(ours), their_scores(theirs), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


# --- ours -> theirs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_our_folder(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    their_blip2(tie_word_embeddings=tied).save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert save_model(ours, tmp_path / "ours", shard_bytes=shard_bytes) == tmp_path / "ours"
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    with open_tensors(tmp_path / "ours") as tensors:
        assert (HEAD in tensors) != tied
        sizes = [file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")]
        assert max(sizes) <= max(shard_bytes, max(tensors.info(name).nbytes for name in tensors)) + 5_000
    theirs = reopened(tmp_path / "ours")
    torch.testing.assert_close(their_logits(theirs), our_logits(ours), **CLOSE)
    assert theirs.generation_config.eos_token_id == 7
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(our_logits(again), our_logits(ours))


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_folder_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    their_blip2().save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", dtype=dtype)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype="auto")
    assert theirs.get_input_embeddings().weight.dtype == dtype
    ours = load_model(tmp_path / "ours", dtype="fp32")
    torch.testing.assert_close(our_logits(ours), their_logits(theirs.float().eval()), **CLOSE)


def test_our_matcher(tmp_path: Path) -> None:
    their_matcher().save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours", shard_bytes=40_000)
    theirs = reopened(tmp_path / "ours", Blip2ForImageTextRetrieval)
    for mine, expected in zip(our_scores(load_model(tmp_path / "ours")), their_scores(theirs), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


def test_our_folder_has_a_processor(tmp_path: Path) -> None:
    """From an image and a prompt to logits, each side with its own processor, from one folder."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["a photo of a cat and a dog"], vocab_size=262, special_tokens=["<s>", "<pad>", "</s>"]
    )
    (tmp_path / "trained").mkdir()
    trained.save_model(str(tmp_path / "trained"))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "trained", add_bos_token=True, **special)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    their_blip2(vocab_size=280).save_pretrained(tmp_path / "theirs")
    without_image_token(tmp_path / "theirs")  # found from the tokenizer when saving
    ours = load_model(tmp_path / "theirs")
    image_processor = ImageProcessor(32, mean=(0.4, 0.5, 0.6))
    save_model(ours, tmp_path / "ours", tokenizer=tmp_path / "tokenizer", image_processor=image_processor)

    theirs = reopened(tmp_path / "ours")
    processor = Blip2Processor.from_pretrained(tmp_path / "ours")
    image = Image.linear_gradient("L").convert("RGB")
    inputs = processor(images=image, text="a photo of", return_tensors="pt")
    assert inputs["input_ids"][0, :QUERIES].tolist() == [len(tokenizer)] * QUERIES
    with torch.inference_mode():
        expected = theirs(**inputs).logits

    assert load_processors(tmp_path / "ours")[0] == image_processor
    pixels = to_pixels([image], load_processors(tmp_path / "ours")[0])
    ids, mask = load_processors(tmp_path / "ours")[1].encode_batch(["a photo of"])
    assert torch.equal(pixels, inputs["pixel_values"])
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels, ids, mask), expected, **CLOSE)
