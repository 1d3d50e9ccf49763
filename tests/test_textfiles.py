"""Users' text files through every door that takes one: encodings, marks, line ends; strict tables; what is no text."""

from __future__ import annotations

import codecs
import io
import json
import os
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
from blip2.storage import TextFileError, read_rows, read_text, read_text_lines, stream_lines
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


def listed(path: Path) -> list[str]:
    return [os.path.relpath(item.name, path.parent) for item in Inputs(sources=[str(path)])]


def captions(path: Path) -> list[str]:
    return [caption for sample in read_samples(path) for caption in sample.captions]


def folder(path: Path) -> list[str]:
    path.with_suffix(".jpg").touch()
    return captions(path.parent)


def bert(path: Path) -> list[int]:
    return Tokenizer.load(path.parent).encode("a")


def task(path: Path) -> str:
    return read_task("captions", path).items[0].captions[0]


def keys(path: Path) -> str | None:
    return Keys.load(path).holder([f"Bearer {KEY}"])


def questions(path: Path) -> list[str]:
    return terminal.read_lines("--questions", str(path))


def preprocessor(path: Path) -> int:
    return ImageProcessor.load(path.parent, 224).size


def opt(path: Path) -> list[int]:
    (path.parent / "vocab.json").write_text('{"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}')
    return Tokenizer.load(path.parent).encode("ab")


# Name of the file, its text, who reads it, what comes out, and the error where it is no text.
DOORS: list[tuple[str, str, Callable[[Path], Any], Any, type[Exception]]] = [
    ("a.txt", f"a{ODD}.jpg\n\nb c.png\n", listed, [f"a{ODD}.jpg", "b c.png"], BulkError),
    ("a.csv", f'image,x\n"a, {ODD}.jpg",1\n\nb.jpg,2', listed, [f"a, {ODD}.jpg", "b.jpg"], BulkError),
    ("a.tsv", f'image\tx\na"{ODD}.jpg\t"1\nb.jpg\t2\n', listed, [f'a"{ODD}.jpg', "b.jpg"], BulkError),
    ("b.tsv", f'"image"\tx\n"{ODD}\t.jpg"\t1\n', listed, [f"{ODD}\t.jpg"], BulkError),
    ("a.json", f'[\n"{ODD[:1]}.jpg", "b.jpg"]', listed, [f"{ODD[:1]}.jpg", "b.jpg"], BulkError),
    ("a.jsonl", f'{{"image": "a{ODD[:3]}"}}\n\n"b.jpg"', listed, [f"a{ODD[:3]}", "b.jpg"], BulkError),
    ("c.csv", f"image,caption\na.jpg,a {ODD}\n", captions, [f"a {ODD}"], DataError),
    ("c.jsonl", f'{{"image": "a", "caption": "{ODD[:3]}"}}\n', captions, [ODD[:3]], DataError),
    ("c.json", f'[{{"image": "a",\n"caption": "{ODD[:3]}"}}]', captions, [ODD[:3]], DataError),
    ("c.txt", f"a{ODD}\n\n b \n", folder, [f"a{ODD}", "b"], DataError),
    ("t.json", '[{"image": "a",\n"caption": "é"}]', task, "é", DataError),
    ("keys", f"# ours\n{KEY}\n", keys, "key 1", ValueError),
    ("q.txt", f"what{ODD}?\n \n why?\n", questions, [f"what{ODD}?", "why?"], ValueError),
    ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\né\na\n", bert, [2, 6, 3], TextError),
    ("merges.txt", "#version: 0.2\na b\n", opt, [1, 4], TextError),
    ("preprocessor_config.json", '{\n"do_resize": true}', preprocessor, 224, blip2.ImageError),
    ("config.json", '{\n"é": "ü"}', read_json, {"é": "ü"}, CheckpointError),
]  # fmt: skip
doors = pytest.mark.parametrize("door", DOORS, ids=[f"{i}-{door[0]}" for i, door in enumerate(DOORS)])


@doors
@pytest.mark.parametrize("form", FORMS)
def test_every_door_reads_what_editors_and_shells_write(door: Any, form: str, tmp_path: Path) -> None:
    name, text, read, expected, _ = door
    (tmp_path / name).write_bytes(FORMS[form](text))
    assert read(tmp_path / name) == expected


BAD = [b"caf\xe9 au lait", b"\xed\xa0\x80", b"\x93quoted\x94", b"\xc3"]


@doors
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_text_is_an_error_with_file_and_line(
    door: Any, bad: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, text, read, _, error = door
    (tmp_path / name).write_bytes(text.encode() + b"\n" + bad + b"\n")
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    assert type(caught.value) is not TextFileError
    message = f"{name}, line {text.count(chr(10)) + 2}: byte 0x"
    # A caption file is one image's: that image is left out, and here no other one is left.
    assert message in (caplog.text if name == "c.txt" else str(caught.value))


@pytest.mark.parametrize("form", ["little", "big"])
def test_cut_utf16_is_an_error(form: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(FORMS[form]("a.jpg\nb.jpg")[:-1])
    for read in (read_text, lambda path: list(read_text_lines(path))):
        with pytest.raises(TextFileError, match="line 2"):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text", [f"a\n{ODD}\n\nb", "x" * 70_000 + "\n\u0a0a\u0a0d\u0d0a\n" * 3000, "\n", "\n\n\u0a00"]
)
def test_lines_are_those_of_the_text(form: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(FORMS[form](text))
    lines = text.removesuffix("\n").split("\n")
    assert list(read_text_lines(path)) == list(enumerate(lines, 1)) and read_text(path) == text


def test_lines_of_a_pipe_come_at_once() -> None:
    for encode in FORMS.values():
        read, write = os.pipe()
        os.write(write, encode("a?\n"))
        with os.fdopen(read, "rb") as file:
            lines = stream_lines(file, "pipe")
            os.set_blocking(read, False)  # what waits for more fails
            assert next(lines) == (1, "a?")
            os.close(write)
            assert list(lines) == []


TABLES = {
    "row 2 (to line 3): 3 fields": "image,caption\na.jpg,b\na.jpg,a rose, in a vase\n",
    "row 1 (to line 2): 1 fields": "image,caption\na.jpg\nb.jpg,b",
    "row 2 (to line 5): unexpected end": 'image,caption\na.jpg,b\nb.jpg,"a rose\nc.jpg,c\nd.jpg,d\n',
    "row 1 (to line 2): ',' expected": 'image,caption\na.jpg,"x"y\n',
    "row 1 (to line 2): field larger": f"image,caption\na.jpg,{'x' * 200_000}\n",
    "names each column once": "image,image\n1,2\n",
    "once, not []": "",
}


@pytest.mark.parametrize("message", TABLES)
def test_tables_are_strict(message: str, tmp_path: Path) -> None:
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = TABLES[message].replace(",", delimiter).replace("image", '"image"', suffix == ".tsv")
        (path := tmp_path / f"a{suffix}").write_text(text)
        wanted = message.replace("','", repr(delimiter).replace("\\t", "\t"))
        for read, error in (
            (lambda path: list(read_rows(path)), TextFileError),
            (listed, BulkError),
            (captions, DataError),
        ):
            if (suffix, read) != (".tsv", captions):
                with pytest.raises(error) as caught:
                    read(path)
                assert wanted in str(caught.value) and path.name in str(caught.value)


def test_a_fault_at_the_end_is_reported_before_the_first_result(tmp_path: Path) -> None:
    files = {
        "a.txt": b"a.jpg\n" * 9 + b"\xe9",
        "a.csv": b"image,x\n" + b"a,1\n" * 9 + b"a\n",
        "a.jsonl": b'"a"\n' * 9 + b"{",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BulkError, match=r"(line|row) 10"):
            next(iter(Inputs(sources=[str(tmp_path / name)])))


SIDECARS = {
    b"a rose\n": (b"a rose new\n", b"new a rose\n"),
    b"\xef\xbb\xbfa rose\r\nred\r\n": (
        b"\xef\xbb\xbfa rose\r\nred new\r\n",
        b"\xef\xbb\xbfnew a rose\r\nred\r\n",
    ),
    FORMS["little"]("é\n"): (FORMS["little"]("é new\n"), FORMS["little"]("new é\n")),
    FORMS["big"](ODD): (FORMS["big"](f"{ODD} new\n"), FORMS["big"](f"new {ODD}\n")),
    b"": (b"new\n", b"new\n"),
    b"\xef\xbb\xbf \r\n": (b"\xef\xbb\xbfnew\r\n", b"\xef\xbb\xbfnew\r\n"),
    b"a\nb\r\nc": (b"", b""),  # refused
    **dict.fromkeys(BAD, (b"", b"")),
}


@pytest.mark.parametrize("before", SIDECARS)
def test_text_files_that_are_added_to_stay_as_they_are_written(before: bytes, tmp_path: Path) -> None:
    for existing, expected in zip(("append", "prepend"), SIDECARS[before], strict=True):
        folder = tmp_path / existing
        folder.mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (4, 4), name and "red").save(folder / f"{name}.png")
        (folder / "a.txt").write_bytes(before)
        settings = RunSettings(kind="txt", out=folder, existing=existing)  # type: ignore[arg-type]
        done = caption_all(
            Inputs(sources=[str(folder)]), settings, lambda images: [[{"caption": "new"}] for _ in images]
        )
        assert done.failed == (not expected)
        assert (folder / "a.txt").read_bytes() == (expected or before)
        assert (folder / "b.txt").read_bytes() == b"new\n"
        if not expected:
            assert "a.txt" in json.loads((folder / ".blip2" / "errors.jsonl").read_text())["error"]


@pytest.mark.parametrize("form", FORMS)
def test_chat_reads_any_text_from_a_pipe(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = FORMS[form](f"what{ODD}?\n\n why?")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert list(chat._questions()) == [f"what{ODD}?", "why?"]
    for bad in BAD:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"why?\n" + bad)))
        with pytest.raises(ValueError, match="standard input, line 2"):
            list(chat._questions())


@pytest.mark.parametrize("text", ["caf\udce9?", "\ud800", "a\udfff b"])
def test_lone_surrogates_are_refused_in_words(
    text: str, generator_folder: Path, matcher_folder: Path, pictures: list[Path], capsys: Any
) -> None:
    model, matcher = blip2.load(generator_folder), blip2.load(matcher_folder)
    for call in (model.ask, model.chat(pictures[0]).send, lambda *a: matcher.match(pictures[0], [a[-1]])):
        with pytest.raises(TextError, match="no Unicode"):
            call(text) if "send" in str(call) else call(pictures[0], text)  # type: ignore[operator]
    assert main(["ask", str(pictures[0]), text, "--model", str(generator_folder)]) != 0
    assert "no Unicode" in capsys.readouterr().err
