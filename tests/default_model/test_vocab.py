from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import pytest

from blip2.text import Tokenizer
from default_model import vocab
from default_model.language import Language, standard
from default_model.vocab import (
    name_bags,
    names,
    save_language,
    save_matcher,
    train_language,
    train_matcher,
)

transformers = pytest.importorskip("transformers")
SENTENCE = "Question: how many mice are there? Answer: 2\n"


@pytest.fixture(scope="module")
def text(language: Language) -> list[str]:
    return list(islice(language.text_corpus(random.Random(0)), 500))


def test_language_tokenizer(tmp_path: Path, text: list[str], language: Language) -> None:
    tokenizer = train_language(iter(text), language)
    save_language(tokenizer, tmp_path)
    assert [tokenizer.token_to_id(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.token_to_id("<image>") == tokenizer.get_vocab_size() - 1 < vocab.LANGUAGE_VOCABULARY
    assert len(tokenizer.encode("\n", add_special_tokens=False).ids) == 1
    strange = "größe 猫 \U0001f600\t~"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SENTENCE)["input_ids"] == tokenizer.encode(SENTENCE).ids
    assert theirs(SENTENCE)["input_ids"][0] == 2 == theirs.bos_token_id and theirs.pad_token_id == 1


def test_matcher_tokenizer(tmp_path: Path, text: list[str], language: Language) -> None:
    tokenizer = train_matcher(iter(text), language)
    save_matcher(tokenizer, tmp_path)
    ids = tokenizer.encode("A Mouse").ids
    assert ids == tokenizer.encode("a mouse").ids
    assert (ids[0], ids[-1]) == (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.token_to_id("[DEC]") == tokenizer.get_vocab_size() - 1 < vocab.MATCHER_VOCABULARY
    assert (tmp_path / "vocab.txt").read_text().splitlines()[-1] == "[DEC]"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("A mouse, a zebra")["input_ids"] == tokenizer.encode("A mouse, a zebra").ids


def test_every_word_of_a_name_is_one_token_in_every_letter_case(text: list[str], language: Language) -> None:
    tokenizer = train_language(iter(text), language)
    bags = name_bags(language, lambda name: tokenizer.encode(name, add_special_tokens=False).ids)
    assert bags.keys() >= {"teddy bear", "teddy bears", "mice", "scissors", "red"}
    assert all(len(bag) == len(name.split()) for name, forms in bags.items() for bag in forms)
    assert [len(bags[name]) for name in ("mouse", "teddy bear")] == [3, 4]  # " Teddy bear" and " Teddy Bear"
    assert len({tuple(bag) for bag in bags["teddy bear"]}) == 4
    assert not {*bags["mouse"][0]} & {*bags["mouse"][1], *bags["mouse"][2]}


def test_every_line_can_be_read_back(text: list[str], language: Language) -> None:
    tokenizer = train_language(iter(text), language)
    assert all(tokenizer.decode(tokenizer.encode(line).ids) == line for line in text)
    pieces = train_matcher(iter(text), language)
    unknown = pieces.token_to_id("[UNK]")
    assert not [name for name in names(language) if unknown in pieces.encode(name.upper()).ids]


def test_the_vocabularies_hold_the_words_of_all_nouns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = standard()
    lines = list(islice(everything.text_corpus(random.Random(0)), 1_000))
    monkeypatch.setattr(vocab, "NAME_WEIGHT", 3_000 * len(lines) // vocab.LINES)  # as much in relation
    save_language(train_language(iter(lines), everything), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    bags = name_bags(everything, lambda name: tokenizer.encode(name, frame=False))
    split = {
        name
        for name, forms in bags.items()
        for bag in forms
        if len(bag) != len(re.split("(?=[ -])|(?<=-)", name))
    }
    assert not split
    pieces = train_matcher(iter(lines), everything)
    assert all(
        len(pieces.encode(name, add_special_tokens=False).ids) == len(re.findall("[a-z]+|-", name))
        for name in names(everything)
    )
