"""The model that ships: its captions and answers for the example images; transformers opens both of its folders."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from PIL import Image

import blip2
from blip2.images import load_image, to_pixels
from blip2.registry import ASSETS, DEFAULT_FOLDER, DEFAULT_MATCHER_FOLDER

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each picture shows by examples/README.md; a good caption holds the words.
SHOWN = {
    "rose.jpg": ["rose"],
    "easy-vqa.png": ["green circle"],
    "two-rabbits.jpg": ["two rabbits"],
    "triangle-and-square.jpg": ["a blue triangle", "an orange square"],
    "four-pineapples.jpg": ["pineapples"],
    "mermaid-and-cat.jpg": ["a mermaid and a cat"],
    "penguin-gravestone-mixers.jpg": ["penguin", "cement mixer", "gravestone"],
    "swallow-and-balloon.jpg": ["a swallow and a hot air balloon"],
}


@pytest.fixture(scope="module")
def model() -> blip2.Predictor:
    return blip2.load()


def test_it_names_itself(model: blip2.Predictor) -> None:
    assert repr(model) == f"<blip2.Predictor 'default' on {model.device}, fp32>"


@pytest.mark.parametrize("name", SHOWN)
def test_captions_name_what_is_there(model: blip2.Predictor, name: str) -> None:
    caption = model.caption(EXAMPLES / name)
    assert all(words in caption for words in SHOWN[name]), caption


def test_answers(model: blip2.Predictor) -> None:
    shape = model.encode(EXAMPLES / "easy-vqa.png")
    assert model.ask(shape, "what shape is in the image?") == "circle"
    assert model.ask(shape, "what color is the shape?") == "green"
    fruit = model.encode(EXAMPLES / "four-pineapples.jpg")
    assert model.ask(fruit, "is there a pineapple?") == "yes"
    assert model.ask(fruit, "is there a bus?") == "no"
    two = model.encode(EXAMPLES / "mermaid-and-cat.jpg")
    assert model.ask(two, "how many things are there?") == "2"
    assert model.ask(two, "what is on the left?") == "mermaid"
    assert model.ask(two, "is there a cat?") == "yes"


def test_matching_prefers_the_right_text(model: blip2.Predictor) -> None:
    right, wrong = model.match(EXAMPLES / "rose.jpg", ["a rose", "two cement mixers"])
    assert right.probability > 0.5 > wrong.probability
    assert right.similarity > wrong.similarity


def test_folders_are_small() -> None:
    total = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert total <= 40e6


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="convolutions are oneDNN's, packed")
def test_a_picture_is_the_same_to_the_last_bit_alone_and_in_a_batch(model: blip2.Predictor) -> None:
    images, processor = [load_image(EXAMPLES / name) for name in SHOWN], model.generator.image_processor
    for image, together in zip(images, to_pixels(images, processor), strict=True):
        assert torch.equal(to_pixels([image], processor)[0], together)


@pytest.mark.parametrize("name", ["rose.jpg", "penguin-gravestone-mixers.jpg"])
def test_transformers_says_the_same(model: blip2.Predictor, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(
        DEFAULT_FOLDER, dtype=torch.float32
    ).eval()
    processor = transformers.Blip2Processor.from_pretrained(DEFAULT_FOLDER)
    with Image.open(EXAMPLES / name) as image:
        inputs = processor(images=image.convert("RGB"), text="a photo of", return_tensors="pt")
    ids = theirs.generate(**inputs, num_beams=5, max_new_tokens=30)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(new, skip_special_tokens=True).strip() == model.caption(EXAMPLES / name)


def test_transformers_matches_the_same(model: blip2.Predictor) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(
        DEFAULT_MATCHER_FOLDER, dtype=torch.float32
    ).eval()
    processor = transformers.Blip2Processor.from_pretrained(DEFAULT_MATCHER_FOLDER)
    text = "a rose"
    pixels = processor.image_processor(
        images=Image.open(EXAMPLES / "rose.jpg").convert("RGB"), return_tensors="pt"
    )
    words = processor.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        logits = theirs(
            pixel_values=pixels["pixel_values"],
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            use_image_text_matching_head=True,
        ).logits_per_image
    (match,) = model.match(EXAMPLES / "rose.jpg", [text])
    assert match.probability == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-4)
