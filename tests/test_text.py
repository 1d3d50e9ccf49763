"""Tokenizer files as they are found, text that stays text, prompts, and the cleaning of training text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from blip2.text import (
    CAPTION_PROMPT,
    TextError,
    Tokenizer,
    chat_prompt,
    check_text,
    clean_caption,
    clean_question,
    question_prompt,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vocabulary of whole words with OPT's special tokens, as tokenizer.json."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "s"]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    backend.enable_padding(length=30)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_batches(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids, mask = tokenizer.encode_batch(["a photo of a cat", "", "cat"])
    assert ids.tolist() == [[2, 4, 5, 6, 4, 7], [1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 2, 7]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    ids, mask = tokenizer.encode_batch(["cat", "a photo of a cat"], pad="right", max_length=3)
    assert ids.tolist() == [[2, 7, 1], [2, 4, 5]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_text_never_becomes_a_special_token(folder: Path) -> None:
    assert Tokenizer.load(folder).encode("a </s>") == [2, 4, 3, 8, 3]
    assert Tokenizer.load(folder, parse_special=True).encode("a </s>") == [2, 4, 2]


def test_decoding_passes_over_ids_beyond_the_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode([2, 4, 7, 5000]) == "a cat"
    assert tokenizer.decode(torch.tensor([2, 7]), skip_special=False) == "</s> cat"


def _special_ids(tokenizer: Tokenizer) -> tuple[int | None, int | None, int]:
    return tokenizer.special_id("bos_token"), tokenizer.special_id("eos_token"), tokenizer.pad_id


def test_names_of_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert _special_ids(tokenizer) == (2, 2, 1)
    assert len(tokenizer) == 9
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "cat"}})
    )
    tokenizer = Tokenizer.load(folder)
    assert _special_ids(tokenizer) == (0, 7, 1)
    assert tokenizer.encode("a") == [2, 4]  # what stands in tokenizer.json counts ...
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    assert Tokenizer.load(folder).encode("a") == [0, 4]  # ... unless the settings say otherwise


def test_without_a_word_about_it_text_begins_as_for_opt(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    assert Tokenizer.load(folder).encode("a") == [2, 4]


def test_what_is_no_text_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(TextError, match="expected text, got NoneType"):
        tokenizer.encode(None)  # type: ignore[arg-type]
    for texts in ("a photo", []):
        with pytest.raises(TextError, match="a list with at least one text"):
            tokenizer.encode_batch(texts)
    with pytest.raises(TextError, match="leaves no room"):
        tokenizer.encode("a", max_length=0)


def test_broken_files_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TextError, match=r"tokenizer_config.json holds a list, expected an object"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TextError, match=r"tokenizer_config.json is no valid JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"bos_token": 7}')
    with pytest.raises(TextError, match="a special token in the tokenizer's files is 7"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match=r"the tokenizer files in .* cannot be read"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TextError, match=r"holds no tokenizer: expected tokenizer.json, vocab.json"):
        Tokenizer.load(folder)


def test_added_tokens_must_fit_their_vocabulary(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "added_tokens.json").write_text('{"[DEC]": 6}')
    assert Tokenizer.load(tmp_path).token_id("[DEC]") == 6
    (tmp_path / "added_tokens.json").write_text('{"[DEC]": 30522}')
    with pytest.raises(TextError, match=r"'\[DEC\]' should have id 30522 but gets 6"):
        Tokenizer.load(tmp_path)


def test_t5_files(t5_folder: Path, tmp_path: Path) -> None:
    shutil.copy(t5_folder / "tokenizer.json", tmp_path)  # alone: the names are T5's own
    tokenizer = Tokenizer.load(tmp_path)
    assert _special_ids(tokenizer) == (None, 1, 0)
    ids = tokenizer.encode(" a photo\n of the cat")
    assert tokenizer.decode(ids) == "a photo of the cat"
    assert ids[-1] == 1
    assert 1 not in tokenizer.encode("a </s>", frame=False)
    assert len(tokenizer.encode("a photo of the cat", max_length=3)) == 3
    (tmp_path / "tokenizer.json").rename(tmp_path / "spiece.model")
    with pytest.raises(TextError, match=r"spiece.model alone.*save_pretrained"):
        Tokenizer.load(tmp_path)


# --- prompts ---------------------------------------------------------------------------------------------------


def test_prompts() -> None:
    assert CAPTION_PROMPT == "a photo of"
    assert question_prompt(" how many {}? ") == "Question: how many {}? Answer:"
    assert question_prompt("how many?", short=True) == "Question: how many? Short answer:"
    assert chat_prompt([], "what is it?") == "Question: what is it? Answer:"
    assert (
        chat_prompt([("what is it?", "a cat"), ("really?", " yes. ")], "why?")
        == "Question: what is it? Answer: a cat. Question: really? Answer: yes. Question: why? Answer:"
    )


@pytest.mark.parametrize("text", ["?", "a", "漢", " \u200bé", "\u0301a", "\U0001f339", "\ue000"])
def test_text_that_shows_something(text: str) -> None:
    assert check_text(text) == text


BLANK = ("", " \t\r\n", "\u200b\ufeff", "\0\x1b\x07", "\u202e\u2066", "\u2028\xa0\u3000", "\ufe0f\u0301")


@pytest.mark.parametrize("text", [*BLANK, "\u3164\u2800 \u1160"])
def test_text_that_shows_nothing_is_refused(text: str) -> None:
    with pytest.raises(TextError, match=r"the caption (is empty|holds only .*); write some words"):
        check_text(text, "caption")


# --- cleaning: expected values are LAVIS's -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Cat, on a mat.", "a cat, on a mat"),
        ('He said: "Hi (there)!" #1; ~5*', "he said hi there 1 5"),
        ("Isn't it? Yes - it's 50%", "isn't it? yes - it's 50%"),
        ("  many   spaces\n\nand lines \n", "many spaces and lines"),
        ("a\nb", "a\nb"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_caption(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("What is this (really)?", "what is this really?"),
        ("Is it 3:30 p.m.?  ", "is it 330 pm?"),
        ("  Why?", "  why?"),
    ],
)
def test_clean_question(text: str, cleaned: str) -> None:
    assert clean_question(text) == cleaned


def test_long_text_is_cut_to_50_words() -> None:
    text = " ".join(f"w{i}" for i in range(60))
    assert clean_caption(text).split() == clean_question(text).split() == [f"w{i}" for i in range(50)]
    assert clean_caption(text, max_words=2) == "w0 w1"
