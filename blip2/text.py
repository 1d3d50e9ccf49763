"""Text <-> token ids, prompts, and the cleaning of training text.

A `Tokenizer` is read from the files of a checkpoint. By default text is only text: "</s>" or "<image>" typed by a user
is encoded as the characters it is made of and never becomes a special token, where transformers parses it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.strict_json import MAX_JSON_BYTES, read_json, read_small_file
from blip2.tensorfiles.texts import decode_text
from blip2.tokenizerfiles import (
    MAX_TOKENIZER_BYTES,
    check_added,
    check_merges,
    check_tokenizer,
    check_vocabulary,
)

CAPTION_PROMPT = "a photo of"
QUESTION_PROMPT = "Question: {} Answer:"
SHORT_QUESTION_PROMPT = "Question: {} Short answer:"
MAX_WORDS = 50
MAX_TEXT = (
    1 << 15
)  # characters: more than any model reads, and encoding a hundred times as many takes gigabytes

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model",  # the last is never read here, but other tools ask for it
)  # fmt: skip

# What OPT's, BERT's and T5's tokenizers assume where their files are silent.
_OPT_SPECIAL = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
_BERT_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
_T5_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_USUAL = {models.WordPiece: _BERT_SPECIAL, models.Unigram: _T5_SPECIAL}
_SPECIAL_NAMES = tuple(dict.fromkeys((*_OPT_SPECIAL, *_BERT_SPECIAL)))


class TextError(ValueError):
    """Tokenizer files that cannot be read, or text that cannot be encoded."""


class Tokenizer:
    """Text <-> token ids, as a checkpoint's files define it. Safe to share between threads."""

    def __init__(self, backend: Backend, special: Mapping[str, str] | None = None) -> None:
        """
        Args:
            backend: a tokenizer of the `tokenizers` library; its padding and truncation are not used.
            special: the names of the special tokens, as tokenizer_config.json has them: {"pad_token": "<pad>", ...}.
        """
        self._backend = backend
        self._special = dict(special or {})

    @classmethod
    def load(cls, folder: str | Path, *, parse_special: bool = False) -> Tokenizer:
        """Read tokenizer.json (T5's too), else vocab.json + merges.txt (OPT's), else vocab.txt (BERT's).

        Args:
            parse_special: let special tokens be written in text, as transformers does by default.

        Raises:
            TextError: none of these files, or broken ones.
        """
        with _library_errors(f"the tokenizer files in {folder} cannot be read"):
            return cls._load(Path(folder), parse_special)

    @classmethod
    def _load(cls, folder: Path, parse_special: bool) -> Tokenizer:
        config = _read_json(folder / "tokenizer_config.json")
        special_map = _read_json(folder / "special_tokens_map.json")
        added = config.get("added_tokens_decoder")
        # The older layout keeps the names of the special tokens in a file of its own, which takes precedence.
        named = config if isinstance(added, Mapping) else config | special_map
        tokens = {name: _added_token(named[name]) for name in _SPECIAL_NAMES if named.get(name)}
        if (folder / "tokenizer.json").is_file():
            raw = _read_json(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
            check_tokenizer(raw)
            backend = Backend.from_str(json.dumps(raw, ensure_ascii=False))  # nothing but what was checked
            backend.no_padding()
            backend.no_truncation()
            usual = _USUAL.get(type(backend.model), _OPT_SPECIAL)
            tokens = {
                name: token
                for name, token in _defaults(tokens, usual).items()
                if backend.token_to_id(token.content) is not None
            }
            if backend.post_processor is None or "add_bos_token" in config or "add_eos_token" in config:
                _frame(backend, *_ends(tokens, config))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokens = _defaults(tokens, _OPT_SPECIAL)
            backend = _read_bpe(folder, config)
            _add_tokens(backend, folder, added, tokens)
            _frame(backend, *_ends(tokens, config))
        elif (folder / "vocab.txt").is_file():
            tokens = _defaults(tokens, _BERT_SPECIAL)
            backend = _read_wordpiece(folder, config, tokens["unk_token"].content)
            _add_tokens(backend, folder, added, tokens)
            _frame(backend, tokens["cls_token"], tokens["sep_token"])
        elif (folder / "spiece.model").is_file():
            raise TextError(
                f"{folder} holds T5's vocabulary as spiece.model alone, which is not read here; put the "
                "tokenizer.json of the same model beside it (transformers writes one: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
            )
        else:
            raise TextError(
                f"{folder} holds no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or vocab.txt"
            )
        _check_stripped(backend)
        backend.encode_special_tokens = not parse_special
        if isinstance(backend.model, models.Unigram) and not parse_special:
            _break_special_tokens(backend)
        return cls(backend, {name: token.content for name, token in tokens.items()})

    def __len__(self) -> int:
        """How many token ids there are, added tokens included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token, None where there is no such token."""
        index: int | None = self._backend.token_to_id(token)
        return index

    def special_id(self, name: str) -> int | None:
        """The id of "bos_token", "eos_token", "cls_token", ...; None where the tokenizer has no such token."""
        return self.token_id(self._special[name]) if name in self._special else None

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch; 0 where the files name none, for masked positions change nothing."""
        return self.special_id("pad_token") or 0

    def encode(self, text: str, *, max_length: int | None = None, frame: bool = True) -> list[int]:
        """Text -> token ids.

        Args:
            max_length: cut the text so that there are no more ids than this, those of the frame included.
            frame: put the tokens around the text that its model expects (OPT: `</s>` first; T5: `</s>` last; BERT:
                [CLS] and [SEP]).
        """
        if not isinstance(text, str):
            raise TextError(f"expected text, got {type(text).__name__}")
        if max_length is not None:
            text = text[:MAX_TEXT]
        _check_encodable(text, "text")
        with _library_errors("the text cannot be encoded"):
            encoding = self._backend.encode(text, add_special_tokens=False)
            if max_length is not None:
                room = max_length - (self._backend.num_special_tokens_to_add(False) if frame else 0)
                if room < 0:
                    raise TextError(f"max_length is {max_length}, which leaves no room for the text")
                encoding.truncate(room)
            if frame:
                encoding = self._backend.post_process(encoding)
        return list(encoding.ids)

    def encode_batch(
        self, texts: Sequence[str], *, pad: Literal["left", "right"] = "left", max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Texts -> ids and mask, both int64 [B, T]; padded on the left for a model that goes on writing.

        Raises:
            TextError: no texts, or something that is not text.
        """
        if isinstance(texts, str) or not texts:
            raise TextError("expected a list with at least one text")
        rows = [torch.tensor(self.encode(text, max_length=max_length), dtype=torch.int64) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id, padding_side=pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=pad)
        return ids, mask

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special: bool = True) -> str:
        """Token ids -> text; ids beyond the vocabulary (a padded one has them) give nothing."""
        values = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        with _library_errors("the tokens cannot be decoded"):
            text: str = self._backend.decode(values, skip_special_tokens=skip_special)
        return text

    def largest_id(self) -> int:
        """The largest id that a text may be encoded to; special tokens that no text gives do not count."""
        added = self._backend.get_added_tokens_decoder().items()
        words = self._backend.get_vocab(with_added_tokens=False).values()
        return max([*words, *(i for i, token in added if not token.special), *self.encode("")])


# --- tokenizer files -----------------------------------------------------------------------------------------------


def _read_bpe(folder: Path, config: Mapping[str, Any]) -> Backend:
    """GPT-2's byte-level BPE, as OPT uses it."""
    lines = filter(None, _read_lines(folder / "merges.txt"))
    merges: Any = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    vocabulary = _read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    check_vocabulary(vocabulary)
    check_merges(merges)
    backend = Backend(models.BPE(vocabulary, merges, fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_wordpiece(folder: Path, config: Mapping[str, Any], unknown: str) -> Backend:
    """BERT's WordPiece, which the stage-1 model reads."""
    lines = _read_lines(folder / "vocab.txt")
    vocab = {line: i for i, line in enumerate(lines) if line or i < len(lines) - 1}
    check_vocabulary(vocab)
    backend = Backend(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _check_stripped(backend: Backend) -> None:
    """Refuse an added token that is white space and takes more of it from the text beside it.

    The library would let every space of a text begin a token that holds all the spaces after it.
    """
    for token in backend.get_added_tokens_decoder().values():
        text = token.content
        if token.normalized and backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if (token.lstrip or token.rstrip) and not text.strip():
            raise TextError(f"the added token {quoted(token.content)} is white space with lstrip or rstrip")


def _break_special_tokens(backend: Backend) -> None:
    """Keep special tokens in text from being found: a unigram model has them among its pieces. Split off their first
    letter."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    if not special:
        return
    first = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special)
    apart = pre_tokenizers.Split(Regex(first), "isolated")
    before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, apart])


def _ends(
    tokens: Mapping[str, AddedToken], config: Mapping[str, Any]
) -> tuple[AddedToken | None, AddedToken | None]:
    """The tokens before and after every text. Without a tokenizer_config.json they are OPT's: `</s>` first."""
    first = tokens.get("bos_token") if config.get("add_bos_token", not config) else None
    return first, tokens.get("eos_token") if config.get("add_eos_token") else None


def _frame(backend: Backend, first: AddedToken | None, last: AddedToken | None) -> None:
    """Let every text begin with `first` and end with `last`."""
    before, after = (f"{token.content}:0" if token else "" for token in (first, last))
    names = {token.content for token in (first, last) if token}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A:0 {after}".strip(),
        special_tokens=[(name, backend.token_to_id(name)) for name in names],
    )


def _add_tokens(backend: Backend, folder: Path, listed: Any, tokens: Mapping[str, AddedToken]) -> None:
    """Add what the vocabulary lacks: the tokens listed in tokenizer_config.json or added_tokens.json, then `tokens`."""
    special = {token.content for token in tokens.values()}
    if isinstance(listed, Mapping):
        added = {int(i): _added_token(token) for i, token in listed.items()}
    else:
        listed = _read_json(folder / "added_tokens.json")
        added = {
            int(i): AddedToken(content, normalized=content not in special, special=content in special)
            for content, i in listed.items()
        }
    check_added([{"content": token.content, "id": i} for i, token in added.items()])
    known = {token.content for token in added.values()}
    unlisted = [token for token in tokens.values() if token.content not in known]
    backend.add_tokens(
        [*(added[i] for i in sorted(added)), *unlisted]
    )  # at once: each call looks at all again
    for i, token in added.items():
        if (index := backend.token_to_id(token.content)) != i:
            raise TextError(
                f"the added token {quoted(token.content)} should have id {i} but gets {index}: "
                "vocabulary and added tokens do not belong together"
            )


def _defaults(tokens: dict[str, AddedToken], names: Mapping[str, str]) -> dict[str, AddedToken]:
    return {name: _added_token(content) for name, content in names.items()} | tokens


def _added_token(value: Any) -> AddedToken:
    """A token as tokenizer_config.json spells it: its text, or an object with its text and how it is matched."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise TextError(f"a special token in the tokenizer's files is {quoted(value)}, expected text")
    flags = {
        name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value
    }
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)


def _read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        return read_json(path, optional=True, limit=limit)
    except CheckpointError as error:
        raise TextError(str(error)) from error


def _read_lines(path: Path) -> list[str]:
    content = read_small_file(path, MAX_TOKENIZER_BYTES, "a vocabulary")
    return decode_text(content, str(path)).replace("\r\n", "\n").split("\n")


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Turn what the library raises into TextError: bare Exceptions, and its panics, which are no Exceptions at all."""
    try:
        yield
    except TextError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TextError(f"{problem}: {str(error)[:500]}") from error
        raise


# --- prompts -------------------------------------------------------------------------------------------------------


_SHOWS_NOTHING = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me")  # control, format, space, and marks on a letter
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters by category, drawn as space


def is_blank(text: str) -> bool:
    """Whether nothing of a text is to be seen: it is empty, or white space, control and zero-width characters alone."""
    return all(char in _BLANK_LETTERS or unicodedata.category(char) in _SHOWS_NOTHING for char in text)


def check_text(text: str, what: str = "question") -> str:
    """The text. Raises TextError where it is blank, cannot be encoded or is no text at all. what: for the message."""
    if not isinstance(text, str):
        raise TextError(f"expected a {what}, got {type(text).__name__}")
    if is_blank(text):
        held = f"holds only {text[:20]!a}" if text else "is empty"
        raise TextError(f"the {what} {held}; write some words")
    _check_encodable(text, what)
    return text


def _check_encodable(text: str, what: str) -> None:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # a lone surrogate
        raise TextError(f"the {what} holds bytes that are no Unicode characters; is it typed as UTF-8?")
    if len(text) > MAX_TEXT:
        raise TextError(f"the {what} has {len(text):,} characters, over {MAX_TEXT:,}; shorten it")


def question_prompt(question: str, *, short: bool = False) -> str:
    """The prompt that makes a language model answer a question about the image; `short`: as published for FlanT5."""
    if not isinstance(question, str):
        raise TextError(f"expected a question, got {type(question).__name__}")
    return (SHORT_QUESTION_PROMPT if short else QUESTION_PROMPT).format(question.strip())


def chat_prompt(turns: Sequence[tuple[str, str]], question: str) -> str:
    """The prompt for the next answer of a conversation: the (question, answer) turns so far, then the question."""
    before = [f"{question_prompt(earlier)} {answer.strip().rstrip('.')}." for earlier, answer in turns]
    return " ".join([*before, question_prompt(question)])


# --- training text -------------------------------------------------------------------------------------------------

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text: str, *, max_words: int = MAX_WORDS) -> str:
    """A caption as BLIP-2 was trained on: lower case, most punctuation a space, at most `max_words` words."""
    spaced = re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, *, max_words: int = MAX_WORDS) -> str:
    """A question as BLIP-2 was trained on: lower case, most punctuation gone (`?` stays), at most `max_words` words."""
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split(" ")[:count])
