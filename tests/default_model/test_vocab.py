from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest

from default_model import vocab
from default_model.language import Language
from default_model.vocab import save_language, save_matcher, train_language, train_matcher

transformers = pytest.importorskip("transformers")
SENTENCE = "Question: how many mice are there? Answer: 2\n"


@pytest.fixture(scope="module")
def text(language: Language) -> list[str]:
    return list(islice(language.text_corpus(random.Random(0)), 500))


def test_language_tokenizer(tmp_path: Path, text: list[str]) -> None:
    tokenizer = train_language(iter(text))
    save_language(tokenizer, tmp_path)
    assert [tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.token_to_id("<image>") == tokenizer.get_vocab_size() - 1 < vocab.LANGUAGE_VOCABULARY
    assert len(tokenizer.encode("\n", add_special_tokens=False).ids) == 1
    strange = "größe 猫 \U0001f600\t~"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SENTENCE)["input_ids"] == tokenizer.encode(SENTENCE).ids
    assert theirs(SENTENCE)["input_ids"][0] == 2 == theirs.bos_token_id and theirs.pad_token_id == 1


def test_matcher_tokenizer(tmp_path: Path, text: list[str]) -> None:
    tokenizer = train_matcher(iter(text))
    save_matcher(tokenizer, tmp_path)
    ids = tokenizer.encode("A Mouse").ids
    assert ids == tokenizer.encode("a mouse").ids
    assert (ids[0], ids[-1]) == (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.token_to_id("[DEC]") == tokenizer.get_vocab_size() - 1 < vocab.MATCHER_VOCABULARY
    assert (tmp_path / "vocab.txt").read_text().splitlines()[-1] == "[DEC]"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("A mouse, a zebra")["input_ids"] == tokenizer.encode("A mouse, a zebra").ids
