"""A tokenizer.json before the library reads it: what would crash it, or make it work or remember without end.

The library trusts its files. Here are the kinds of steps and the sizes that tokenizers of BLIP-2's models have (OPT's
and GPT-2's byte-level BPE, T5's unigram model, BERT's WordPiece, in all spellings of transformers); anything else is
refused. No step makes a text longer than by a small factor, no pattern is matched in more than linear time.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from blip2.tensorfiles.errors import UnsupportedFileError, quoted

MAX_TOKENIZER_BYTES = 6 << 20  # of one file; T5's has 2.4 million, OPT's up to 4.3 with all its line breaks
_MAX_PIECES = 1 << 18  # T5 has 32,100, OPT 50,265
_MAX_ID = 1 << 24
_MAX_PIECE = 1024  # characters; OPT's longest is 128
_MAX_UNIGRAM_PIECE = 128  # every length is tried at every place of a text; T5's longest is 16
_MAX_UNIGRAM = 3 << 18  # bytes of all its pieces, each a node for the library; T5 has 0.2 million
_MAX_ADDED, _MAX_ADDED_TEXT = 4096, 1 << 16  # T5 has 103 added tokens
_MAX_WORD = 200  # of max_input_chars_per_word, whose square is work; BERT's is 100
_MAX_STEPS = 6
_MAX_TEMPLATE = 16
_MAX_SEGMENT = 32  # characters that one is normalized to; NFKC's longest is 18

_UNICODE = {"NFC", "NFD", "NFKC", "NFKD"}
# The steps that a tokenizer's parts may be made of, and where a sequence of them is listed.
_STEPS: Mapping[str, tuple[str, frozenset[str]]] = {
    "normalizer": (
        "normalizers",
        frozenset(
            {"BertNormalizer", "Lowercase", "Precompiled", "Replace", "Strip", "StripAccents", *_UNICODE}
        ),
    ),
    "pre_tokenizer": (
        "pretokenizers",
        frozenset({"BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Whitespace", "WhitespaceSplit"}),
    ),
    "post_processor": (
        "processors",
        frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}),
    ),
    "decoder": ("decoders", frozenset({"ByteLevel", "Metaspace", "WordPiece"})),
}
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_PATTERNS = (" {2,}",)  # T5's, by transformers: spaces that follow each other


def check_tokenizer(raw: Mapping[str, Any]) -> None:
    """Check what a tokenizer.json holds. Raises UnsupportedFileError, which says what is not to be read here."""
    known = {"version", "truncation", "padding", "added_tokens", "model", *_STEPS}
    if unknown := raw.keys() - known:
        raise _refused(f"an entry {quoted(min(unknown))} that tokenizers do not have")
    _check_model(raw.get("model"))
    check_added(raw.get("added_tokens") or [])
    for part in _STEPS:
        _check_steps(part, raw.get(part))
    for name in ("truncation", "padding"):  # not used, but the library reads them
        setting = raw.get(name)
        if setting is not None and (not isinstance(setting, dict) or len(str(setting)) > 1000):
            raise _refused(f"no settings of {name}")


def _check_model(model: Any) -> None:
    """Check a tokenizer's model: its vocabulary, and what else decides how much work encoding a text is."""
    if not isinstance(model, dict):
        raise _refused("no model")
    if "type" in model and model["type"] not in _MODELS:
        raise _refused(f"a model of type {quoted(model['type'])}; known are {', '.join(_MODELS)}")
    check_vocabulary(model.get("vocab"))
    check_merges(model.get("merges") or [])
    size = len(model["vocab"])
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        text = model.get(name) or ""
        if not isinstance(text, str) or len(text) > _MAX_PIECE:
            raise _refused(f"{name} {quoted(text)}, expected a text of up to {_MAX_PIECE:,} characters")
    longest, unknown = model.get("max_input_chars_per_word", 1), model.get("unk_id")
    if not _whole(longest, _MAX_WORD):
        raise _refused(f"max_input_chars_per_word {quoted(longest)}, expected up to {_MAX_WORD}")
    if unknown is not None and not _whole(unknown, size - 1):
        raise _refused(f"unk_id {quoted(unknown)}, but {size:,} pieces")
    if model.get("dropout"):
        raise _refused("dropout: every text would be encoded in another way each time; set it to null")


def check_vocabulary(vocabulary: Any) -> None:
    """Check pieces: {text: id}, or T5's list of [text, score]."""
    if not isinstance(vocabulary, dict | list) or not 1 <= len(vocabulary) <= _MAX_PIECES:
        count = len(vocabulary) if isinstance(vocabulary, dict | list) else "no"
        raise _refused(f"{count} pieces, expected up to {_MAX_PIECES:,}")
    if isinstance(vocabulary, dict):
        for piece, index in vocabulary.items():
            if not _whole(index, _MAX_ID) or len(piece) > _MAX_PIECE:
                raise _refused(f"a piece {quoted(piece)} with id {quoted(index)}")
        return
    characters = 0
    for entry in vocabulary:
        if (
            not isinstance(entry, list)
            or [*map(type, entry)] not in ([str, float], [str, int])
            or not 1 <= len(entry[0]) <= _MAX_UNIGRAM_PIECE
            or not abs(entry[1]) <= 1e6  # of a logarithm: T5's are -2 to -14
        ):
            raise _refused(f"a piece {quoted(str(entry)[:80])}, expected its text and its score")
        characters += len(entry[0].encode())
    if characters > _MAX_UNIGRAM:
        raise _refused(f"pieces of {characters:,} bytes in all, over {_MAX_UNIGRAM:,}")


def check_merges(merges: Any) -> None:
    """Check the merges of a BPE model: "a b" or ["a", "b"]."""
    if not isinstance(merges, list) or len(merges) > _MAX_PIECES:
        raise _refused(f"merges that are no list of up to {_MAX_PIECES:,}")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list | tuple) or [*map(type, pair)] != [str, str]:
            raise _refused(f"a merge {quoted(str(merge)[:80])}, expected two pieces")


def check_added(added: Any) -> None:
    """Check the tokens that are added to a vocabulary."""
    if not isinstance(added, list) or len(added) > _MAX_ADDED:
        raise _refused(f"added tokens that are no list of up to {_MAX_ADDED:,}")
    characters = 0
    for token in added:
        text = token.get("content") if isinstance(token, dict) else None
        if (
            not isinstance(text, str)
            or not 1 <= len(text) <= _MAX_PIECE
            or not _whole(token.get("id"), _MAX_ID)
        ):
            raise _refused(f"an added token {quoted(str(token)[:80])}, expected its content and its id")
        characters += len(text)
    if characters > _MAX_ADDED_TEXT:
        raise _refused(f"added tokens of {characters:,} characters in all, over {_MAX_ADDED_TEXT:,}")


def _check_steps(part: str, value: Any) -> None:
    """A part of the tokenizer: nothing, a step, or a sequence of steps."""
    if value is None:
        return
    listed, kinds = _STEPS[part]
    steps: Any = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = value.get(listed)
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS:
        raise _refused(f"a {part} that is no sequence of up to {_MAX_STEPS} steps")
    seen: list[str] = []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise _refused(f"a {part} of type {quoted(kind)}; known are {', '.join(sorted(kinds))}")
        # two that replace characters by many could multiply what they do
        seen.append("Precompiled" if kind in _UNICODE else kind)
        if check := _CHECKS.get(kind):
            check(step)
        elif len(str(step)) > 1000:
            raise _refused(f"a {part} with settings of {len(str(step)):,} characters")
    if len(set(seen)) < len(seen):
        raise _refused(f"a {part} with two steps of one kind")


def _check_replace(step: Mapping[str, Any]) -> None:
    """Nothing may be replaced by more characters than it has, and no pattern be searched for but a known one."""
    pattern, content = step.get("pattern"), step.get("content")
    form, sought = (
        next(iter(pattern.items())) if isinstance(pattern, dict) and len(pattern) == 1 else ("", "")
    )
    shortest = 2 if form == "Regex" and sought in _PATTERNS else 0
    if form == "String" and isinstance(sought, str) and len(sought) <= _MAX_PIECE:
        shortest = len(sought)
    if not isinstance(content, str) or not shortest or len(content) > shortest:
        raise _refused(
            f"a Replace of {quoted(str(pattern)[:80])} by {quoted(content)}; known is one of text by text that is no "
            f"longer, or of the pattern {_PATTERNS[0]!r}"
        )


def _check_template(step: Mapping[str, Any]) -> None:
    for name in ("single", "pair"):
        if not isinstance(step.get(name), list) or len(step[name]) > _MAX_TEMPLATE:
            raise _refused(f"a template that is no list of up to {_MAX_TEMPLATE} tokens")
    texts = [piece for piece in step["single"] if not isinstance(piece, dict) or "Sequence" in piece]
    if len(texts) > 1:  # each is a copy
        raise _refused("a template that repeats the text")
    tokens = step.get("special_tokens")
    if not isinstance(tokens, dict) or len(tokens) > _MAX_TEMPLATE:
        raise _refused(f"a template with more than {_MAX_TEMPLATE} special tokens")
    for name, token in tokens.items():
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or len(ids) > _MAX_TEMPLATE or not all(_whole(i, _MAX_ID) for i in ids):
            raise _refused(f"a template whose token {quoted(name)} has no ids")


def _check_ends(step: Mapping[str, Any]) -> None:
    for name in ("sep", "cls"):
        end = step.get(name)
        if not isinstance(end, list) or [*map(type, end)] != [str, int] or not _whole(end[1], _MAX_ID):
            raise _refused(f"no token and id of {name}")


def _check_charsmap(step: Mapping[str, Any]) -> None:
    """SentencePiece's table of normalized characters: a double-array trie, then the texts that its leaves point to.

    The library follows both without looking. In a unit: bits 10-30 the offset of its children, bit 9 whether that
    counts 256 times, bit 8 whether one of them is a leaf; a leaf has bit 31 and the place of its text.
    """
    problem = "a precompiled_charsmap that is broken"
    try:
        content = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
        length = int.from_bytes(content[:4], "little")
        units = np.frombuffer(content, "<u4", length // 4, 4).astype(np.int64)
        texts = content[4 + length :].decode()
    except (TypeError, ValueError) as error:  # too short, no base64, no UTF-8
        raise _refused(problem) from error
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    inner = units >> 31 == 0
    if length % 4 or not len(units) or not (children[inner] | 0xFF < len(units)).all() or not inner[0]:
        raise _refused(problem)
    leaves = units[children[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    bounds = np.append(np.frombuffer(texts.encode(), np.uint8) & 0xC0 != 0x80, True)  # where characters begin
    if not (leaves < len(bounds)).all() or not bounds[leaves].all():
        raise _refused(problem)
    if max(map(len, texts.split("\0"))) > _MAX_SEGMENT:
        raise _refused(f"a precompiled_charsmap that makes more than {_MAX_SEGMENT} characters of one")


_CHECKS = {
    "Precompiled": _check_charsmap,
    "Replace": _check_replace,
    "TemplateProcessing": _check_template,
    "BertProcessing": _check_ends,
    "RobertaProcessing": _check_ends,
}


def _whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _refused(what: str) -> UnsupportedFileError:
    return UnsupportedFileError(f"it holds {what}; get the files of the published model again")
