"""Users' text files through every door that takes one: encodings, marks, line ends; strict tables; what is no text."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import blip2
from blip2.bulk import BulkError, Inputs, RunSettings, caption_all
from blip2.cli import main
from blip2.commands import chat, terminal
from blip2.data.sources import DataError, read_samples
from blip2.evaluate.tasks import read_task
from blip2.images import ImageProcessor
from blip2.serve.keys import Keys
from blip2.storage import TextFileError, read_text, read_text_lines, stream_lines
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.strict_json import read_json
from blip2.text import TextError, Tokenizer

ODD = "é\u2028ü\x85漢\x0c\u0a0d\U0001f339"  # no line ends, and in UTF-16 bytes that look like them
KEY = "k" * 16
FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "windows": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "little": lambda text: codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"),
    "big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "list": lambda path: [os.path.relpath(item.name, path.parent) for item in Inputs(sources=[str(path)])],
    "data": lambda path: [caption for sample in read_samples(path) for caption in sample.captions],
    "folder": lambda path: READERS["data"](path.parent),
    "task": lambda path: read_task("captions", path).items[0].captions[0],
    "keys": lambda path: Keys.load(path).holder([f"Bearer {KEY}"]),
    "questions": lambda path: terminal.read_lines("--questions", str(path)),
    "ids": lambda path: Tokenizer.load(path.parent).encode("ab"),
    "preprocessor": lambda path: ImageProcessor.load(path.parent, 224).size,
    "config": read_json,
}
# Name of the file, its text, who reads it, what comes out, and the error where it is no text.
DOORS: list[tuple[str, str, str, Any, type[Exception]]] = [
    ("a.txt", f"a{ODD}.jpg\n\nb c.png\n", "list", [f"a{ODD}.jpg", "b c.png"], BulkError),
    ("a.csv", f'image,x\n"a, {ODD}.jpg",1\n\nb.jpg,2', "list", [f"a, {ODD}.jpg", "b.jpg"], BulkError),
    ("a.tsv", f'image\tx\na"{ODD}.jpg\t"1\nb.jpg\t2\n', "list", [f'a"{ODD}.jpg', "b.jpg"], BulkError),
    ("b.tsv", f'"image"\tx\n"{ODD}\t.jpg"\t1\n', "list", [f"{ODD}\t.jpg"], BulkError),
    ("a.json", f'[\n"{ODD[:1]}.jpg", "b.jpg"]', "list", [f"{ODD[:1]}.jpg", "b.jpg"], BulkError),
    ("a.jsonl", f'{{"image": "a{ODD[:3]}"}}\n\n"b.jpg"', "list", [f"a{ODD[:3]}", "b.jpg"], BulkError),
    ("c.csv", f"image,caption\na.jpg,a {ODD}\n", "data", [f"a {ODD}"], DataError),
    ("c.jsonl", f'{{"image": "a", "caption": "{ODD[:3]}"}}\n', "data", [ODD[:3]], DataError),
    ("c.json", f'[{{"image": "a",\n"caption": "{ODD[:3]}"}}]', "data", [ODD[:3]], DataError),
    ("c.txt", f"a{ODD}\n\n b \n", "folder", [f"a{ODD}", "b"], DataError),
    ("t.json", '[{"image": "a",\n"caption": "é"}]', "task", "é", DataError),
    ("keys", f"# ours\n{KEY}\n", "keys", "key 1", ValueError),
    ("q.txt", f"what{ODD}?\n \n why?\n", "questions", [f"what{ODD}?", "why?"], ValueError),
    ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\né\nab\n", "ids", [2, 6, 3], TextError),
    ("merges.txt", "#version: 0.2\na b\n", "ids", [1, 4], TextError),
    ("preprocessor_config.json", '{\n"do_resize": true}', "preprocessor", 224, blip2.ImageError),
    ("config.json", '{\n"é": "ü"}', "config", {"é": "ü"}, CheckpointError),
]  # fmt: skip
BAD = [b"caf\xe9 au lait", b"\xed\xa0\x80", b"\x93quoted\x94", b"\xc3", b"a.jpg\0b.jpg\0"]
UNMARKED = ["a rose\n".encode("utf-16-le"), "a rose\r\n".encode("utf-16-be"), "a".encode("utf-32-le")]


@pytest.mark.parametrize("door", DOORS)
def test_every_door(door: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, text, reader, expected, error = door
    (tmp_path / "c.jpg").touch()
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}')
    path = tmp_path / name
    for encode in FORMS.values():
        path.write_bytes(encode(text))
        assert READERS[reader](path) == expected
    for bad in BAD:
        path.write_bytes(text.encode() + b"\n" + bad + b"\n")
        with pytest.raises(error) as caught:
            READERS[reader](path)
        message = (
            f"{name}, line {text.count(chr(10)) + 2}: {'a zero byte' if bad[-1:] == bytes(1) else 'byte 0x'}"
        )
        # A caption file is one image's: that image is left out, and here no other one is left.
        assert message in (caplog.text if name == "c.txt" else str(caught.value))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [f"a\n{ODD}\n\nb", "x" * 70_000 + "\n", "\u0a0a\u0a0d\u0d0a\n" * 999])
def test_lines_are_those_of_the_text(form: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(FORMS[form](text))
    lines = text.removesuffix("\n").split("\n")
    assert list(read_text_lines(path)) == list(enumerate(lines, 1)) and read_text(path) == text
    if path.read_bytes()[:1] > b"\xf0":  # UTF-16 cut within a character
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(TextFileError, match=r"a.txt, line \d+: byte 0x"):
            list(read_text_lines(path))


def test_lines_of_a_pipe_come_at_once() -> None:
    for encode in FORMS.values():
        read, write = os.pipe()
        os.write(write, encode("a?\n"))
        os.set_blocking(read, False)  # what waits for more fails
        with os.fdopen(read, "rb") as file:
            assert next(stream_lines(file, "pipe")) == (1, "a?")
        os.close(write)


TABLES = {
    "row 2 (to line 3): 3 fields": "image,caption\na.jpg,b\na.jpg,a rose, in a vase\n",
    "row 1 (to line 2): 1 fields": "image,caption\na.jpg\nb.jpg,b",
    "row 2 (to line 5): unexpected end": 'image,caption\na.jpg,b\nb.jpg,"a rose\nc.jpg,c\nd.jpg,d\n',
    "expected after '\"'": 'image,caption\na.jpg,"x"y\n',
    "row 1 (to line 2): field larger": f"image,caption\na.jpg,{'x' * 200_000}\n",
    "names each column once": "image,image\n1,2\n",
    "a carriage return alone; end lines with LF or CRLF": "image,caption\ra.jpg,b\r",
    "once, not []": "",
}


@pytest.mark.parametrize("message", TABLES)
def test_tables_are_strict(message: str, tmp_path: Path) -> None:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = TABLES[message].replace(",", delimiter).replace("image", '"image"', suffix == ".tsv")
        (path := tmp_path / f"a{suffix}").write_text(text)
        with pytest.raises(BulkError) as caught:  # before the first result
            next(iter(Inputs(sources=[str(path)])))
        assert message in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(DataError, match=re.escape(message)):
        read_samples(tmp_path / "a.csv")


@pytest.mark.parametrize("before", [*BAD, *UNMARKED, b"a\nb\r\nc", *FORMS])
@pytest.mark.parametrize("old", ["a rose\n", "a rose\nred\n\n", f"{ODD}\n", " \n"])
@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_text_files_that_are_added_to(before: bytes | str, old: str, existing: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content := before if isinstance(before, bytes) else FORMS[before](old))
    inputs, settings = (
        Inputs(sources=[str(tmp_path)]),
        RunSettings(kind="txt", out=tmp_path, existing=existing),
    )
    done = caption_all(inputs, settings, lambda images: [[{"caption": "new"}]] * len(images))
    assert done.failed == isinstance(before, bytes)
    if isinstance(before, str):
        new = " ".join(filter(None, [old.strip(), "new"] if existing == "append" else ["new", old.strip()]))
        content = FORMS[before](new + "\n")
    else:
        assert "a.txt" in json.loads((tmp_path / ".blip2" / "errors.jsonl").read_text())["error"]
    assert (tmp_path / "a.txt").read_bytes() == content


@pytest.mark.parametrize("content", UNMARKED)
def test_utf16_without_a_mark_is_no_text(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(content)
    for read in (read_text, lambda path: list(read_text_lines(path)), READERS["list"], READERS["questions"]):
        with pytest.raises(ValueError, match=r"a\.txt, line 1: a zero byte, as in UTF-16"):
            read(path)


@pytest.mark.parametrize("form", FORMS)
def test_chat_reads_any_text_from_a_pipe(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = FORMS[form](f"what{ODD}?\n\n why?")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert list(chat._piped()) == [f"what{ODD}?", "why?"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"why?\n\xe9")))
    with pytest.raises(ValueError, match="standard input, line 2"):
        list(chat._piped())


@pytest.mark.parametrize("text", ["caf\udce9?", "\ud800", "a\udfff b"])
def test_lone_surrogates_are_refused_in_words(
    text: str, generator_folder: Path, matcher_folder: Path, pictures: list[Path], capsys: Any
) -> None:
    model, picture, matcher = blip2.load(generator_folder), pictures[0], blip2.load(matcher_folder)
    for call in (model.ask, lambda picture, text: model.chat(picture).send(text), matcher.match):
        with pytest.raises(TextError, match="no Unicode"):
            call(picture, text if call != matcher.match else [text])
    assert main(["ask", str(picture), text, "--model", str(generator_folder)]) != 0
    assert "no Unicode" in capsys.readouterr().err
