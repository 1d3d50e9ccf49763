"""Tokenizer files made to crash, hang or swallow memory: a few honest ones, and what can be done to them."""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

Files = dict[str, bytes]  # of a tokenizer's folder, by name
LIES = (
    None, True, -1, 2**32, 10**30, 1e300, 0.5, "", "x", "\ud800", "x" * 70_000, [], {}, [[]], ["x"] * 5000, {"x": 1},
)  # fmt: skip


def charsmap(pairs: dict[str, str]) -> bytes:
    """SentencePiece's table for single bytes: a trie of one level, then the texts."""
    units, texts = [0] * 768, b""
    units[0] = 256 << 10  # the root's children: 256 and on
    for i, (char, text) in enumerate(pairs.items()):
        place, leaf = 256 ^ ord(char), 512 + i
        units[place] = (place ^ leaf) << 10 | 1 << 8 | ord(char)
        units[leaf] = 1 << 31 | len(texts)
        texts += text.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def _added(*names: str) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": name, **flags, "special": True} for i, name in enumerate(names)]


def _template(first: str, last: str) -> dict[str, Any]:
    def token(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [token(first)] * bool(first) + text + [token(last)] * bool(last)
    ids = {name: {"id": name, "ids": [1], "tokens": [name]} for name in (first, last) if name}
    return {"type": "TemplateProcessing", "single": single, "pair": single * 2, "special_tokens": ids}


def _tokenizer(model: dict[str, Any], added: list[str], **parts: Any) -> dict[str, Any]:
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(*added)}
    return base | {"normalizer": None, **parts, "model": model}


def opt(**model: Any) -> dict[str, Any]:
    """OPT's and GPT-2's, as transformers 4 and 5 write it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    words = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab", "Ġa"]
    vocabulary = {word: i for i, word in enumerate(words)}
    fixed = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    fixed |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    merges = {"vocab": vocabulary, "merges": [["a", "b"], ["Ġ", "a"]]}
    return _tokenizer(
        {"type": "BPE", **fixed, **merges} | model,
        ["<pad>", "</s>"],
        pre_tokenizer=byte_level,
        post_processor=_template("</s>", ""),
        decoder=byte_level,
    )


def t5(**model: Any) -> dict[str, Any]:
    """T5's, as transformers 4 writes it."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    pieces: list[list[Any]] = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    pieces += [[letter, -float(i)] for i, letter in enumerate("▁abcdefgh▁a"[:9], 2)] + [["▁a", -1.5]]
    table = base64.b64encode(charsmap({"A": "a", "B": "é", "C": "ab"})).decode()
    return _tokenizer(
        {"type": "Unigram", "unk_id": 2, "byte_fallback": False, "vocab": pieces} | model,
        ["<pad>", "</s>", "<unk>"],
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": table},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        post_processor=_template("", "</s>"),
        decoder=space,
    )


def bert(**model: Any) -> dict[str, Any]:
    """BERT's."""
    words = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    fixed = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    return _tokenizer(
        {"type": "WordPiece", **fixed, "vocab": {word: i for i, word in enumerate(words)}} | model,
        words[:4],
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 2]},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def honest() -> Iterator[tuple[str, Files]]:
    """What must load: the published forms, in the spellings of several versions."""
    simple = t5()
    simple["normalizer"] = simple["normalizer"]["normalizers"][0]
    old = t5()
    space = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
    old |= {
        "decoder": space,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
    }
    bare = t5()
    bare["normalizer"] = None
    texts = opt(merges=["a b", "Ġ a"])
    untyped = bert()
    del untyped["model"]["type"]
    forms = {"opt": opt(), "opt, merges as texts": texts, "t5": t5(), "t5, published": simple, "t5, old": old}
    forms |= {"t5, transformers 5": bare, "bert": bert(), "bert, old": untyped}
    for name, form in forms.items():
        yield name, {"tokenizer.json": _dump(form)}
    for form in (
        opt,
        t5,
        bert,
    ):  # hundreds of users' own, and RoBERTa's mask, which takes the space before it
        raw = form()
        count = len(raw["model"]["vocab"])
        named = [token["content"] for token in raw["added_tokens"]]
        more = _added(*named, *(f"<{i}>" for i in range(count, count + 600)))[len(named) :]
        more = [token | {"id": count + i, "normalized": True} for i, token in enumerate(more)]
        more[0] |= {"lstrip": True, "rstrip": True}
        yield (
            f"{form.__name__} with 600 added tokens",
            {"tokenizer.json": _dump(raw | {"added_tokens": raw["added_tokens"] + more})},
        )
    words = json.dumps(opt()["model"]["vocab"]).encode()
    yield "opt, slow", {"vocab.json": words, "merges.txt": "#version: 0.2\na b\nĠ a\n".encode()}
    yield "bert, slow", {"vocab.txt": "\n".join(bert()["model"]["vocab"]).encode()}


def hostile() -> Iterator[tuple[str, Files]]:
    """What must be refused, or be harmless."""
    for name, raw in _tokenizers():
        yield name, {"tokenizer.json": raw if isinstance(raw, bytes) else _dump(raw)}
    yield from _other_files()


def _dump(raw: Any) -> bytes:
    return json.dumps(raw, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _tokenizers() -> Iterator[tuple[str, Any]]:
    yield from _charsmaps()
    yield from _steps()
    yield from _models()
    yield from _extremes()
    yield from _multiplied()
    yield from _lies()
    yield from _bombs()


def _with_table(table: bytes | str) -> dict[str, Any]:
    raw, text = t5(), table if isinstance(table, str) else base64.b64encode(table).decode()
    raw["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": text}
    return raw


def _charsmaps() -> Iterator[tuple[str, Any]]:
    good = charsmap({"A": "a", "B": "é", "C": "ab", " ": "é" * 9})
    for length in (0, 1, 3, 4, 7, 8, 1023, 1028, 3071, 3075, 3076, len(good) - 1):
        yield f"table cut to {length}", _with_table(good[:length])
    for size in (0, 1, 3, 4, 1024, 3071, 3073, 4096, 2**31, 2**32 - 4, 2**32 - 1):
        yield f"trie of {size} bytes", _with_table(struct.pack("<I", size) + good[4:])
    for unit in (0, 256 ^ ord("A"), 256 ^ ord("B"), 256 ^ ord(" "), 512, 513, 514, 515):
        for value in (
            0,
            0xFFFFFFFF,
            0x7FFFFFFF,
            1 << 31,
            1 << 31 | 3,
            0x3FFFFF << 10,
            1 << 9 | 1 << 30,
            256 << 10,
        ):
            start = 4 + 4 * unit
            yield (
                f"unit {unit} is {value:x}",
                _with_table(good[:start] + struct.pack("<I", value) + good[start + 4 :]),
            )
    for name, text in {"long": "é" * 33, "huge": "a" * 1_000_000, "marks": "\u0301" * 500}.items():
        yield f"a {name} text", _with_table(charsmap({"a": text, " ": text}))
    yield "no UTF-8", _with_table(good + b"\xff\xfe\x80")
    chance = random.Random(0)
    for number in range(40):
        damaged = bytearray(good)
        for _ in range(1 + number % 4):
            damaged[chance.randrange(len(good))] = chance.randrange(256)
        yield f"damaged table {number}", _with_table(bytes(damaged))
    for encoded in ("", "=", "AAAA=", "é", "A" * 2_000_000, "\n" * 50):
        yield f"no base64 {encoded[:5]!r}", _with_table(encoded)


PATTERNS = (
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "(.*a){20}", "^(([a-z])+.)+[A-Z]([a-z])+$", "(?=(a+))a*b\\1",
    "a{1,9999}{1,9999}", "((a{1,99}){1,99}){1,99}", "(", "[", "\\", "", "a**", "(?<n>a)(?&n)",
    "(?:" * 5000 + ")" * 5000, "a|" * 50_000, "\\p{L}+",
)  # fmt: skip


def _steps() -> Iterator[tuple[str, Any]]:
    def part(name: str, step: Any) -> dict[str, Any]:
        return opt() | {name: step}

    for pattern in PATTERNS:
        sought = {"Regex": pattern}
        yield (
            f"Replace {pattern[:30]}",
            part("normalizer", {"type": "Replace", "pattern": sought, "content": "x"}),
        )
        split = {"type": "Split", "pattern": sought, "behavior": "Isolated", "invert": False}
        yield f"Split {pattern[:30]}", part("pre_tokenizer", split)
    for text, content in (
        ("a", "aa"),
        ("a", "a" * 100_000),
        ("", "a"),
        ("ab", "abc"),
        ("a" * 5000, "b" * 5001),
    ):
        step = {"type": "Replace", "pattern": {"String": text}, "content": content}
        for name, listed in (("normalizer", "normalizers"), ("decoder", "decoders")):
            yield f"{name} {text[:9]!r} to {len(content)}", part(name, step)
            yield f"{name} {text[:9]!r} 40 times", part(name, {"type": "Sequence", listed: [step] * 40})
    kinds = ("NFKD", "NFD", "Prepend", "ByteLevel", "Nmt", "Unknown", 7, None)
    for kind in kinds:
        yield (
            f"normalizers {kind}",
            part("normalizer", {"type": "Sequence", "normalizers": [{"type": kind}] * 50}),
        )
    nested: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(200):
        nested = {"type": "Sequence", "normalizers": [nested]}
    yield "nested normalizers", part("normalizer", nested)
    for count in (17, 100_000):
        template = _template("</s>", "")
        template["single"] *= count
        yield f"template of {count}", part("post_processor", template)
        template = _template("</s>", "")
        template["special_tokens"]["</s>"] |= {"ids": [1] * count, "tokens": ["</s>"] * count}
        yield f"special token of {count} ids", part("post_processor", template)
    for index in (2**24 + 1, 2**32 - 1, 2**32, -1, 0.5, None, "1", True):
        template = _template("</s>", "")
        template["special_tokens"]["</s>"]["ids"] = [index]
        yield f"id {index}", part("post_processor", template)
        yield (
            f"sep {index}",
            part("post_processor", {"type": "BertProcessing", "sep": ["x", index], "cls": ["x", 1]}),
        )


def _models() -> Iterator[tuple[str, Any]]:
    scores = (1e7, -1e300, 10**30, None, "x", [], True)
    for score in scores:
        yield f"score {score}", t5(vocab=[["<unk>", 0.0], ["a", 0.0], ["b", score]], unk_id=0)
    for entry in (["", 0.0], ["a" * 1025, 0.0], ["a"], ["a", 0.0, 1], "a", None, {"a": 1}):
        yield (
            f"piece {str(entry)[:20]}",
            t5(vocab=[["<unk>", 0.0], ["a", 0.0], ["</s>", 0.0], entry], unk_id=0),
        )
    for index in (99, 2**32, -1, 0.5, "a", True, [0]):
        yield f"unk_id {index}", t5(unk_id=index)
        yield f"id of a piece {index}", opt(vocab={**opt()["model"]["vocab"], "zz": index})
    for longest in (201, 10**9, 2**63, -1, None, "x", 1e9):
        yield f"longest word {longest}", bert(max_input_chars_per_word=longest)
    for chance in (0.5, 1, 2.0, -1.0, "x", [1]):
        yield f"dropout {chance}", opt(dropout=chance)
    for kind in ("bpe", "", None, 7, "Unigram", "WordLevel", "WordPiece"):
        yield f"a BPE as {kind}", opt(type=kind)
    for merge in (
        "ab",
        "a b c",
        "",
        ["a"],
        ["a", "b", "c"],
        ["a", 7],
        7,
        None,
        "zz q",
        ["zz", "q"],
        {"a": "b"},
    ):
        yield f"merge {merge}", opt(merges=[merge])
    yield "no pieces", opt(vocab={})
    yield "no pieces of T5", t5(vocab=[])
    yield "no model", opt() | {"model": None}
    many = {f"w{i}": i for i in range(300_000)}
    yield "many pieces", opt(vocab=many)
    yield "many merges", opt(merges=["a b"] * 300_000)
    yield "most pieces", opt(vocab={f"{i:x}": i for i in range(1 << 18)} | {"</s>": 1})
    yield "many pieces of T5", t5(vocab=[[f"w{i}", 0.0] for i in range(300_000)])
    yield "long pieces of T5", t5(vocab=[[chr(97 + i % 26) * 900 + str(i), 0.0] for i in range(3000)])
    yield (
        "most of T5",
        t5(vocab=[["<unk>", 0.0], ["</s>", 0.0], *([f"{i:>09x}", -1.0] for i in range(100_000))], unk_id=0),
    )
    yield "a long piece", opt(vocab={"a": 0, "</s>": 1, "b" * 2_000_000: 2})


def _extremes() -> Iterator[tuple[str, Any]]:
    """The most that is let pass."""
    names = ("<pad>", "</s>", "<unk>")
    lists = {
        "many": [f"<extra_{i}>" for i in range(4000)],
        "short": [chr(0x4E00 + i) for i in range(4000)],
        "long": ["a" * 1000 + str(i) for i in range(60)],
    }
    for name, more in lists.items():
        yield f"{name} special tokens", t5() | {"added_tokens": _added(*names, *more)}
    free = [
        token | {"normalized": True, "special": False, "lstrip": True, "rstrip": True}
        for token in _added(*lists["short"])
    ]
    yield "added tokens of every kind", opt() | {"added_tokens": free}
    chain = {"</s>": 1, "<pad>": 0} | {"a" * i: i + 1 for i in range(1, 1000)}
    merges = [["a" * i, "a"] for i in range(1, 998)]
    yield "a chain of merges", opt(vocab=chain, merges=merges) | {"pre_tokenizer": None}
    fixed = [[name, 0.0] for name in names]
    nested = [["a" * i, -1.0] for i in range(1, 129)]
    yield "a chain of pieces", t5(vocab=[*fixed, *nested]) | {"pre_tokenizer": None}
    yield "apart", t5(vocab=[*fixed, *([chr(0x3000 + i) * 128, -1.0] for i in range(2000))])
    words = {"[PAD]": 0, "[SEP]": 1, "[CLS]": 2, "[UNK]": 3} | {"a" * i: 3 + i for i in range(1, 900)}
    yield (
        "long words",
        bert(vocab=words | {f"##{'a' * i}": 2000 + i for i in range(1, 900)}, max_input_chars_per_word=200),
    )
    raw = t5()
    table = charsmap({chr(code): "é" * 32 for code in range(97, 123)})
    raw["normalizer"]["normalizers"][0]["precompiled_charsmap"] = base64.b64encode(table).decode()
    yield "32 characters for one", raw
    yield "a suffix", opt(end_of_word_suffix="</w>", continuing_subword_prefix="##")


def _multiplied() -> Iterator[tuple[str, Any]]:
    """What makes much of a text: copies of it, tokens that each take all the white space that follows."""
    for form in (opt, t5, bert):
        name = form()["model"]["type"]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        for count in (2, 8, 16):
            step = _template("", "") | {"single": [text] * count}
            yield f"{name}: the text {count} times", form() | {"post_processor": step}
        for blank in (" ", "  ", "\u3000", "\t", "x", "\u0301 "):
            for flag in ("lstrip", "rstrip"):
                more = [token | {flag: True, "special": False} for token in _added(blank)]
                yield f"{name}: {flag} of {blank!a}", form() | {"added_tokens": more}
                spaces = {"type": "Replace", "pattern": {"String": "x"}, "content": " "}
                more = [token | {"normalized": True} for token in more]
                raw = form() | {"added_tokens": more, "normalizer": spaces}
                yield f"{name}: {flag} of {blank!a} made a space", raw


def _lies() -> Iterator[tuple[str, Any]]:
    """Every value of three honest tokenizers, made something else."""
    number = 0
    for form in (opt(), t5(), bert()):
        for path in _places(form):
            for lie in LIES[number % 4 :: 4]:
                number += 1
                raw = copy.deepcopy(form)
                *sections, last = path
                section: Any = raw
                for name in sections:
                    section = section[name]
                section[last] = lie
                yield f"{form['model']['type']} {path} = {str(lie)[:20]}", raw


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for name, inner in [*entries][:12]:
        yield (name,)
        yield from ((name, *rest) for rest in _places(inner))


def _bombs() -> Iterator[tuple[str, bytes]]:
    size = 6_200_000
    head, tail = b'{"model": ', b"}"
    for name, piece in {
        "lists": b"[],",
        "objects": b"{},",
        "floats": b".5,",
        "texts": b'"ab",',
        "numbers": b"1,",
    }.items():
        piece = b"1.5," if name == "floats" else piece
        yield f"a bomb of {name}", head + b"[" + piece * (size // len(piece)) + b"1]" + tail
    pairs = b",".join(b'"%x":1' % i for i in range(550_000))
    yield "a bomb of pairs", head + b"{" + pairs + b"}" + tail
    yield "too large", head + b'"' + b"x" * (9 << 20) + b'"' + tail
    for text in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "9" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":1,"a":1}',
    ):
        yield f"JSON {text[:12]}", head + text.encode() + tail
    yield "no JSON", b"\x00\xff" * 500
    yield "nothing", b""
    yield "a list", b"[]"
    honest_twice = _dump(opt())[:-1] + b"," + _dump(opt())[1:]
    yield "every entry twice", honest_twice
    yield "another entry", _dump(opt() | {"auto_map": {}})
    for count, length in ((5000, 5), (2000, 900), (1, 100_000), (1, 0)):
        added = _added(*("<pad>", "</s>"), *(f"{i}".rjust(length, "x")[:length] for i in range(count)))
        yield f"{count} added tokens of {length}", _dump(opt() | {"added_tokens": added})


def _other_files() -> Iterator[tuple[str, Files]]:
    base = {"tokenizer.json": _dump(opt())}
    slow = dict([*honest()][-2][1])
    words = dict([*honest()][-1][1])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for lie in LIES:
            yield f"{name} {str(lie)[:20]}", base | {name: _dump(lie)}
            for key in ("bos_token", "add_bos_token", "added_tokens_decoder", "unk_token"):
                yield f"{name} {key} {str(lie)[:20]}", slow | {name: _dump({key: lie})}
        yield f"{name} too large", base | {name: b" " * (2 << 20) + b"{}"}
        yield f"{name} nested", base | {name: b'{"a":' * 50_000 + b"1" + b"}" * 50_000}
    for lie in LIES:
        yield f"added_tokens.json {str(lie)[:20]}", words | {"added_tokens.json": _dump({"[DEC]": lie})}
        yield f"the whole of it {str(lie)[:20]}", words | {"added_tokens.json": _dump(lie)}
        yield f"vocab.json {str(lie)[:20]}", slow | {"vocab.json": _dump(lie)}
        yield f"vocab.json's id {str(lie)[:20]}", slow | {"vocab.json": _dump({"a": lie})}
        named = {"added_tokens_decoder": {"18": lie}}
        yield f"added token {str(lie)[:20]}", words | {"tokenizer_config.json": _dump(named)}
        flags = dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars"), lie)
        yield f"BERT's flags {str(lie)[:20]}", words | {"tokenizer_config.json": _dump(flags)}
    for index in ("-1", "x", "9" * 5000, "1.5", ""):
        named = {"added_tokens_decoder": {index: {"content": "x"}}}
        yield f"added id {index[:9]}", words | {"tokenizer_config.json": _dump(named)}
    many = {"added_tokens_decoder": {str(18 + i): {"content": f"t{i}"} for i in range(6000)}}
    size = len(opt()["model"]["vocab"])
    most = {str(size + i): {"content": f"t{i}", "special": i % 2 == 0} for i in range(4096)}
    yield "most added tokens", slow | {"tokenizer_config.json": _dump({"added_tokens_decoder": most})}
    yield "many added tokens", words | {"tokenizer_config.json": _dump(many)}
    for content in (
        b"a\n",
        b"a b c\n",
        b"a b\n" * 300_000,
        b"a " * 3_000_000,
        b"\xff\xfe\xfd",
        b"a b\r\n",
        b"x" * (9 << 20),
    ):
        yield f"merges.txt {content[:9]!r} {len(content)}", slow | {"merges.txt": content}
    for content in (
        b"",
        b"\n" * 300_000,
        b"a\n" * 3_000_000,
        b"a" * 8_000_000,
        b"\x00" * 1000,
        b"\xff",
        b"x" * (9 << 20),
    ):
        yield f"vocab.txt {content[:9]!r} {len(content)}", {"vocab.txt": content}
