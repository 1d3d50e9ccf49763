"""Trains the default model's two tokenizers: `python -m default_model.vocab DIR`, where DIR holds the materials.

DIR/tokenizer-language: byte-level BPE with OPT's special ids, its </s> before every text, and "\\n" as one token.
DIR/tokenizer-matcher: WordPiece like BERT's, uncased, with [DEC] as its last entry.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from blip2.evaluate.scenes import LETTER_CASES, in_case
from default_model import easyvqa
from default_model.colours import COLOURS
from default_model.language import Language, standard

LANGUAGE_VOCABULARY = 9_600  # 8,600 of them so that every word of a noun is one token in three letter cases
MATCHER_VOCABULARY = 3_000
LINES = 60_000
NAME_WEIGHT = 3_000  # how often the names' words count, so that they become tokens before frequent pieces do
OPT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in OPT's vocabulary
IMAGE_TOKEN = "<image>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DECODE_TOKEN = "[DEC]"
MAX_POSITIONS = 512


def training_text(language: Language, easy: list[str], seed: int = 0) -> Iterator[str]:
    """Sampled sentences, and easy-VQA's training text."""
    yield from islice(language.text_corpus(random.Random(seed)), LINES)
    yield from easy


def names(language: Language) -> list[str]:
    """Every noun, in the singular and the plural, and every color."""
    forms = (form for noun, entry in language.nouns.items() for form in (noun, entry.plural))
    return list(dict.fromkeys((*forms, *COLOURS)))


def name_bags(language: Language, encode: Callable[[str], list[int]]) -> dict[str, list[list[int]]]:
    """The tokens of each of `names` after a space, in every letter case that questions have, the lower case first.

    encode: text -> ids, without a frame.
    """
    return {
        name: [encode(f" {form}") for form in dict.fromkeys(in_case(name, case) for case in LETTER_CASES)]
        for name in names(language)
    }


def _name_words(language: Language) -> list[str]:
    """The words that names are split into before BPE, in every letter case: " dog", " DOG", " t", "shirt"."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {
        form[slice(*span)]
        for name in names(language)
        for form in (f" {in_case(name, case)}" for case in LETTER_CASES)
        for _, span in splitter.pre_tokenize_str(form)
    }
    return sorted(word for word in words if word.strip().isalpha())


def train_language(text: Iterator[str], language: Language) -> Tokenizer:
    """Byte-level BPE as GPT-2 and OPT have it. Every word of a name is one token after a space, in any case."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LANGUAGE_VOCABULARY - 1,
        special_tokens=list(OPT_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A word that no space begins follows a hyphen: "-shirt".
    words = (word if word.startswith(" ") else f"-{word}" for word in _name_words(language))
    weighted = (word * NAME_WEIGHT for word in words)
    tokenizer.train_from_iterator(chain(text, weighted), trainer)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def train_matcher(text: Iterator[str], language: Language) -> Tokenizer:
    """WordPiece as BERT has it: letters, and the most frequent words whole.

    The texts hold few different words, so nothing between letters and words is needed; and the result is the same
    every time, which that of `tokenizers`' WordPiece trainer is not.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for weight, lines in ((1, text), (NAME_WEIGHT, names(language))):
        for line in lines:
            for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)):
                counts[word] += weight
    characters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    inner = ["##" + c for c in characters if c.isalnum()]
    entries = [*BERT_SPECIALS, *characters, *inner]
    words = sorted((w for w in counts if w not in set(entries)), key=lambda w: (-counts[w], w))
    entries += words[: MATCHER_VOCABULARY - 1 - len(entries)]
    tokenizer = Tokenizer(models.WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT_SPECIALS))
    tokenizer.add_special_tokens([AddedToken(DECODE_TOKEN, special=True)])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_language(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, vocab.json, merges.txt and the two config files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt: without the tokens added afterwards
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    _write(folder / "special_tokens_map.json", {**special, "additional_special_tokens": [IMAGE_TOKEN]})
    added = {
        str(i): _token(t)
        for i, t in [*enumerate(OPT_SPECIALS), (tokenizer.get_vocab_size() - 1, IMAGE_TOKEN)]
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IMAGE_TOKEN],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write(folder / "tokenizer_config.json", config)


def save_matcher(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, vocab.txt and the two config files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIALS, strict=True)
    )
    special["bos_token"] = DECODE_TOKEN
    _write(folder / "special_tokens_map.json", special)
    added = {str(i): _token(t) for i, t in [*enumerate(BERT_SPECIALS), (len(vocabulary) - 1, DECODE_TOKEN)]}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": MAX_POSITIONS,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": True,
        **special,
    }
    _write(folder / "tokenizer_config.json", config)


def _token(content: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags, "special": True}


def main() -> None:
    parser = argparse.ArgumentParser(description="train the default model's tokenizers")
    parser.add_argument("folder", type=Path, help="where default_model.materials put its files")
    args = parser.parse_args()
    language = standard()
    easy = [
        f"Question: {q} Answer: {a}\n"
        for i in easyvqa.load(args.folder, "train")[:800]
        for q, a in i.questions
    ]
    bpe = train_language(training_text(language, easy), language)
    save_language(bpe, args.folder / "tokenizer-language")
    pieces = train_matcher(training_text(language, easy), language)
    save_matcher(pieces, args.folder / "tokenizer-matcher")
    for name, tokenizer in (("language", bpe), ("matcher", pieces)):
        lengths = [len(tokenizer.encode(" " + noun, add_special_tokens=False).ids) for noun in language.nouns]
        print(
            f"{name}: {tokenizer.get_vocab_size()} tokens, {sum(lengths) / len(lengths):.2f} a noun",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
