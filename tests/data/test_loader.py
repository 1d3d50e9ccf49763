"""Batches: pure in (seed, position), every text once an epoch, targets where they belong."""

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from blip2.data.loader import DecoderBatches, EncoderDecoderBatches, ExampleBatches, MatcherBatches
from blip2.data.sources import DataError, Sample
from blip2.images import ImageProcessor, load_image, to_pixels
from blip2.text import Tokenizer

PROCESSOR = ImageProcessor(size=8)
END, PAD = 2, 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """OPT's way with text, one token a byte: `</s>` first."""
    vocabulary = {"<s>": 0, "<pad>": PAD, "</s>": END}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, []))
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="</s>:0 $A:0", special_tokens=[("</s>", END)]
    )
    return Tokenizer(backend, {"bos_token": "</s>", "pad_token": "<pad>"})


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    noise = np.random.default_rng(0)
    samples = []
    for i in range(5):
        Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        texts = tuple(f"text {i}{c}" for c in "abc"[: 1 + i % 3])
        samples.append(Sample(str(i), tmp_path / f"{i}.png", texts))
    return samples  # 1 + 2 + 3 + 1 + 2 = 9 texts


def batches_of(samples: list[Sample], batch_size: int, seed: int = 0, **options: Any) -> ExampleBatches:
    return ExampleBatches(samples, PROCESSOR, batch_size=batch_size, seed=seed, **options)


def decoded(tokenizer: Tokenizer, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row[row != PAD]) for row in ids]


def test_pure_in_the_position(samples: list[Sample], tokenizer: Tokenizer) -> None:
    first = DecoderBatches(batches_of(samples, 2, seed=3), tokenizer)
    copy = pickle.loads(pickle.dumps(first))  # as a data process gets it
    batches = {position: first[position] for position in (0, 9, 4, 1)}
    for position in (1, 9, 0, 4):
        for name, tensor in copy[position].items():
            assert torch.equal(tensor, batches[position][name]), name
    assert not torch.equal(batches[0]["pixels"], batches[4]["pixels"])
    other = DecoderBatches(batches_of(samples, 2, seed=4), tokenizer)
    assert not torch.equal(other[0]["pixels"], batches[0]["pixels"])


def test_every_text_once_an_epoch(samples: list[Sample], tokenizer: Tokenizer) -> None:
    examples = batches_of(samples, 3)
    batches = MatcherBatches(examples, tokenizer)
    assert examples.batches_per_epoch == 3
    orders = []
    for epoch in range(2):
        texts = [text for i in range(3) for text in decoded(tokenizer, batches[3 * epoch + i]["ids"])]
        assert Counter(texts) == Counter(text for sample in samples for text in sample.captions)
        orders.append(texts)
    assert orders[0] != orders[1]


def test_image_ids_tell_equal_images(samples: list[Sample], tokenizer: Tokenizer) -> None:
    batch = MatcherBatches(batches_of(samples, 9), tokenizer)[0]
    for text, image in zip(decoded(tokenizer, batch["ids"]), batch["image_ids"].tolist()):
        assert text[5] == str(image)
    assert batch["mask"].sum().item() == 9 * 8  # </s> and seven letters each


def test_several_texts_an_image(samples: list[Sample], tokenizer: Tokenizer) -> None:
    examples = batches_of(samples, 5, texts_per_image=3, augment=False)
    batch = DecoderBatches(examples, tokenizer)[0]
    assert batch["pixels"].shape == (5, 3, 8, 8)
    assert batch["input_ids"].shape[0] == 9
    for text, image in zip(decoded(tokenizer, batch["input_ids"]), batch["image_index"].tolist()):
        expected = to_pixels([load_image(samples[int(text[5])].image)], PROCESSOR)[0]
        assert torch.equal(batch["pixels"][image], expected)
    with pytest.raises(DataError, match="one text a row, not 3"):
        MatcherBatches(examples, tokenizer)


def test_targets_are_the_caption_and_its_end(samples: list[Sample], tokenizer: Tokenizer) -> None:
    one = [Sample("x", samples[0].image, ("A Dog.", "cats"))]
    examples = batches_of(one, 2)
    batch = DecoderBatches(examples, tokenizer, prompt="a photo of ")[0]
    targets = {}
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        length = int(mask.sum())
        assert ids[0] == END
        assert (ids[length:] == PAD).all()
        assert ((labels == ids) | (labels == -100)).all()
        targets[tokenizer.decode(ids[:length])] = tokenizer.decode(labels[labels != -100])
    assert targets == {"a photo of a dog\n": " a dog\n", "a photo of cats\n": " cats\n"}
    plain = DecoderBatches(examples, tokenizer)[0]
    assert (plain["labels"][:, 0] == -100).all()
    assert sorted(tokenizer.decode(row[row != -100]) for row in plain["labels"]) == ["a dog\n", "cats\n"]
    assert DecoderBatches(examples, tokenizer, max_tokens=4)[0]["input_ids"].shape == (2, 4)


def test_answers_follow_their_question(samples: list[Sample], tokenizer: Tokenizer) -> None:
    question = [Sample("x", samples[0].image, (), "How many?", ("Two",))]
    batch = DecoderBatches(batches_of(question, 1), tokenizer, prompt="unused", max_tokens=64)[0]
    assert decoded(tokenizer, batch["input_ids"]) == ["Question: how many? Answer: two\n"]
    assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == " two\n"


def test_t5_reads_the_prompt_and_writes_the_text(samples: list[Sample], t5_folder: Path) -> None:
    tokenizer = Tokenizer.load(t5_folder)
    one = [
        Sample("x", samples[0].image, ("A red Cat.", "dogs")),
        Sample("y", samples[1].image, (), "Why?", ("Yes",)),
    ]
    batch = EncoderDecoderBatches(batches_of(one, 3), tokenizer, prompt="a photo of")[0]
    inputs = {}
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        prompt, target = ids[mask.bool()], labels[labels != -100]
        assert prompt[-1] == target[-1] == tokenizer.special_id("eos_token")
        assert (ids[len(prompt) :] == tokenizer.pad_id).all()
        inputs[tokenizer.decode(target)] = tokenizer.decode(prompt)
    assert inputs == {"a red cat": "a photo of", "dogs": "a photo of", "yes": "Question: why? Short answer:"}

    split = EncoderDecoderBatches(batches_of(one[:1] * 20, 40), tokenizer, split=True)
    batches = [split[position] for position in (0, 1)]
    texts = set()
    for row in range(40):
        labels = batches[0]["labels"][row]
        prompt = tokenizer.decode(batches[0]["input_ids"][row])
        texts.add(f"{prompt}|{tokenizer.decode(labels[labels != -100])}")
    assert texts == {"|a red cat", "a|red cat", "a red|cat", "|dogs"}
    assert torch.equal(split[0]["labels"], batches[0]["labels"])
    assert batches[0]["labels"].tolist() != batches[1]["labels"].tolist()


def test_an_unreadable_image_is_replaced(
    samples: list[Sample], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    samples[2].image.write_bytes(b"no image")
    batches = MatcherBatches(batches_of(samples, 9), tokenizer)
    with caplog.at_level(logging.WARNING):
        batch = batches[0]
    assert len(batch["pixels"]) == 9
    assert not any(text.startswith("text 2") for text in decoded(tokenizer, batch["ids"]))
    assert "2.png" in caplog.text
    for sample in samples:
        sample.image.write_bytes(b"")
    with pytest.raises(DataError, match="images in a row cannot be read"):
        batches[0]


def test_too_few_texts(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="9 rows of texts do not fill a batch of 10"):
        batches_of(samples, 10)
