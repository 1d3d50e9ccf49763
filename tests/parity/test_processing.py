"""Images and text beside transformers: the same pixels bit for bit, the same token ids, the same decoded text."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

pytest.importorskip("transformers")
from transformers import BertTokenizer, Blip2Processor, BlipImageProcessorPil, GPT2Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blip2.images import ImageProcessor, load_image, to_pixels
from blip2.text import Tokenizer

# --- images ----------------------------------------------------------------------------------------------------


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8))


def their_pixels(image: Image.Image, **settings: object) -> torch.Tensor:
    pixels: torch.Tensor = BlipImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("size", [(640, 480), (364, 364), (31, 500), (1, 9), (1000, 3), (225, 223)])
def test_pixels_are_equal_bit_for_bit(size: tuple[int, int]) -> None:
    image = noise(*size)
    for side in (224, 364, 30):
        ours = to_pixels([image], ImageProcessor(side))
        assert torch.equal(ours, their_pixels(image, size={"height": side, "width": side}))


def test_pixels_of_other_settings(tmp_path: Path) -> None:
    settings = {
        "size": {"height": 40, "width": 40},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.9, 0.8, 0.7],
        "rescale_factor": 1 / 127.5,
    }
    BlipImageProcessorPil(**settings).save_pretrained(tmp_path)
    ours = to_pixels([noise(50, 60)], ImageProcessor.load(tmp_path, 224))
    assert torch.equal(ours, their_pixels(noise(50, 60), **settings))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "PA", "YCbCr"])
def test_pixels_of_other_modes(mode: str) -> None:
    image = noise(40, 30, 4)
    assert image.mode == "RGBA"
    image = (
        image if mode == "RGBA" else image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)
    )
    assert torch.equal(to_pixels([load_image(image)], ImageProcessor(384)), their_pixels(image))


def test_pixels_of_a_transparent_palette() -> None:
    file = io.BytesIO()
    noise(20, 20).convert("P").save(file, "PNG", transparency=bytes(range(256)))
    with Image.open(file) as image:
        assert torch.equal(to_pixels([load_image(image)], ImageProcessor(384)), their_pixels(image))


def test_pixels_of_a_turned_photo_with_exif_off() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise(50, 20).save(file, "JPEG", exif=exif)
    theirs = their_pixels(Image.open(file))
    assert torch.equal(to_pixels([load_image(file.getvalue(), exif=False)], ImageProcessor(384)), theirs)
    assert not torch.equal(to_pixels([load_image(file.getvalue())], ImageProcessor(384)), theirs)


# --- text ------------------------------------------------------------------------------------------------------

WORDS = """a photo of a cat. two dogs on a sofa, what are they doing? Question: how many? Answer: three.
The café's naïve résumé; 日本語のテキスト and emoji 🙂🙃 don't can't we'll 1234 56.78 (brackets) [more] {these}"""
TEXTS = [
    "",
    " ",
    "a photo of",
    "a photo of ",
    "  two   spaces  between\tand tabs",
    "line one\nline two\n\nline four\n",
    "Question: How many dogs are there? Answer:",
    "café naïve résumé Ünïcödé ﬁ ligature",
    "cafe\u0301 decomposed",
    "日本語のテキスト 中文",
    "🙂🙃👩‍👩‍👧 flags 🇫🇷",
    "don't we'll I'M",
    "control \x00\x01 \u200b zero width \ufeff",
    "x" * 300,
    "1234567890 1e-5 3.14",
    "UPPER lower MiXeD",
    "xyzzy unknownword §§§",
]
SPECIAL_TEXTS = [
    "typed </s> inside",
    "<pad><unk> <s>",
    "[CLS] a [MASK] b [SEP]",
    " </s> ",
    "<image>two<image>",
    "[PAD]",
]


def opt_folder(folder: Path) -> Path:
    """vocab.json and merges.txt with OPT's special tokens, trained on the spot."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([WORDS] * 3, vocab_size=420, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    folder.mkdir()
    trained.save_model(str(folder))
    return folder


def opt(folder: Path, **options: object) -> GPT2Tokenizer:
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer.from_pretrained(opt_folder(folder), add_bos_token=True, **special, **options)


def bert(folder: Path) -> BertTokenizer:
    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator([WORDS] * 3, vocab_size=300, min_frequency=1)
    folder.mkdir()
    trained.save_model(str(folder))
    return BertTokenizer.from_pretrained(folder)


def as_saved(theirs: PreTrainedTokenizerBase, folder: Path) -> None:
    theirs.save_pretrained(folder)


def as_tokenizer_json_alone(theirs: PreTrainedTokenizerBase, folder: Path) -> None:
    theirs.save_pretrained(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def as_published_years_ago(theirs: PreTrainedTokenizerBase, folder: Path) -> None:
    """The vocabulary in its old files; special tokens as objects, and named in a file of their own."""
    folder.mkdir()
    for source in (folder.parent / "trained").iterdir():
        shutil.copy(source, folder)
    special = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    detailed = {
        name: {"content": token, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
        for name, token in special.items()
    }
    config: dict[str, object] = {"tokenizer_class": type(theirs).__name__, "model_max_length": 512}
    if isinstance(theirs, GPT2Tokenizer):
        config |= {"add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | detailed))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def as_bare_vocabulary(theirs: PreTrainedTokenizerBase, folder: Path) -> None:
    shutil.copytree(folder.parent / "trained", folder)


LAYOUTS = [as_saved, as_tokenizer_json_alone, as_published_years_ago, as_bare_vocabulary]
Pair = tuple[PreTrainedTokenizerBase, Tokenizer, Tokenizer]


KINDS = {f"{make.__name__}-{save.__name__}": (make, save) for make in (opt, bert) for save in LAYOUTS}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Theirs, ours, and ours that parses special tokens in text as theirs does."""
    make: Callable[[Path], PreTrainedTokenizerBase]
    make, save = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = make(folder / "trained")
    save(theirs, folder / "saved")
    return theirs, Tokenizer.load(folder / "saved"), Tokenizer.load(folder / "saved", parse_special=True)


def test_ids_are_equal(pair: Pair) -> None:
    theirs, ours, parsing = pair
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected, text
        assert parsing.encode(text) == expected, text
        assert ours.encode(text, frame=False) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_special_tokens_in_text(pair: Pair) -> None:
    theirs, ours, parsing = pair
    for text in SPECIAL_TEXTS:
        assert parsing.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], text
        inside = set(ours.encode(text, frame=False))
        assert not inside & (set(theirs.all_special_ids) - {theirs.unk_token_id}), text


def test_batches_are_equal(pair: Pair) -> None:
    theirs, ours, _ = pair
    for side in ("left", "right"):
        expected = theirs(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        ids, mask = ours.encode_batch(TEXTS, pad=side)
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])


def test_truncation_is_equal(pair: Pair) -> None:
    theirs, ours, _ = pair
    for text in TEXTS:
        for length in (2, 5, 9):
            expected = theirs(text, truncation=True, max_length=length)["input_ids"]
            assert ours.encode(text, max_length=length) == expected, text


def test_decoding_is_equal(pair: Pair) -> None:
    theirs, ours, _ = pair
    rows = [theirs(text)["input_ids"] for text in TEXTS]
    rows += np.random.default_rng(0).integers(0, len(theirs), (20, 12)).tolist()
    for row in rows:
        for skip in (True, False):
            assert ours.decode(row, skip_special=skip) == theirs.decode(row, skip_special_tokens=skip)
        assert ours.decode(torch.tensor(row)) == theirs.decode(row, skip_special_tokens=True)


def test_names_are_equal(pair: Pair) -> None:
    theirs, ours, _ = pair
    assert len(ours) == len(theirs)
    assert ours.pad_id == theirs.pad_token_id
    if isinstance(theirs, BertTokenizer):
        assert (ours.special_id("cls_token"), ours.special_id("sep_token")) == (
            theirs.cls_token_id,
            theirs.sep_token_id,
        )
    else:
        assert (ours.special_id("bos_token"), ours.special_id("eos_token")) == (
            theirs.bos_token_id,
            theirs.eos_token_id,
        )
        assert ours.encode("a photo of")[0] == ours.token_id("</s>")


def test_the_image_token_of_a_processor(tmp_path: Path) -> None:
    theirs = Blip2Processor(BlipImageProcessorPil(), opt(tmp_path / "trained"), num_query_tokens=4)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.load(tmp_path / "saved")
    image = ours.token_id("<image>")
    assert image == theirs.tokenizer.convert_tokens_to_ids("<image>")
    inputs = theirs(images=noise(9, 9), text="a photo of")
    assert inputs["input_ids"][0] == [image] * 4 + ours.encode("a photo of")
    assert image not in ours.encode("an <image> that is none")
    assert ImageProcessor.load(tmp_path / "saved", 224).size == 384


def test_tokens_added_beside_the_vocabulary(tmp_path: Path) -> None:
    """added_tokens.json, the older place for them."""
    theirs = opt(tmp_path / "trained")
    as_published_years_ago(theirs, tmp_path / "saved")
    (tmp_path / "saved" / "added_tokens.json").write_text(json.dumps({"newword": len(theirs)}))
    theirs = GPT2Tokenizer.from_pretrained(tmp_path / "saved")
    ours = Tokenizer.load(tmp_path / "saved")
    for text in (*TEXTS, "a newword here", "newwords"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.token_id("newword") == len(theirs) - 1
