"""What is listed for a bulk run: every row and file is an image, an error that says what to do, or counted."""

from __future__ import annotations

import csv
import json
import os
import tarfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2.bulk import BulkError, Inputs, RunSettings, caption_all
from blip2.bulk.sources import ImageItem
from blip2.cli import main
from blip2.data.sources import read_sample_set
from blip2.imagefiles.advice import UNREADABLE, left_out_text
from blip2.imagefiles.names import HAS_HEIF
from blip2.images import SUFFIXES, ImageError, load_image


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), colour).save(path, "PNG")
    return path


def describe(images: Sequence[Image.Image]) -> list[list[dict[str, Any]]]:
    return [[{"caption": "a rose\u2028or two"}] for _ in images]


def listed(*sources: Path, **options: Any) -> tuple[list[ImageItem], Inputs]:
    inputs = Inputs(sources=[str(source) for source in sources], **options)
    return list(inputs), inputs


def problem(item: ImageItem) -> str:
    """What is wrong with an item; empty where it is an image."""
    try:
        load_image(item.read())
    except ImageError as error:
        return str(error)
    return ""


def test_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    assert not SUFFIXES & {suffix for suffix in UNREADABLE if not suffix.startswith((".hei", ".hif"))}
    for name in ("a.jpg", "b.png"):
        picture(tmp_path / "top" / name)
    others = [
        "c.JP2",
        "deep/d.j2k",
        "deep/e.jp2",
        "f.svg",
        "g.CR2",
        "h.jxl",
        "notes.docx",
        "film.mp4",
        "i.txt",
    ]
    hidden = ["._j.heic", "@eaDir/k.svg", ".cache/l.nef", "old/m.psd"]
    for name in (*others, *hidden):
        (tmp_path / "top" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "top" / name).touch()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "top" / "deep")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "top", "top")
    expected = {".jp2": 2, ".j2k": 1, ".svg": 1, ".cr2": 1, ".jxl": 1}
    for source in (tmp_path / "top", tmp_path / "all.tar"):
        items, inputs = listed(source, exclude=["old/*"])
        counts = dict(inputs.left_out)
        assert len(items) == 2 and counts.pop(".psd", 0) == (source.suffix == ".tar") and counts == expected
        inputs.check(), list(inputs)  # listed again and in part, nothing is counted twice
        assert {**inputs.left_out, ".psd": 0} == {**expected, ".psd": 0}
    text = left_out_text(listed(tmp_path / "top", exclude=["old/*"])[1].left_out)
    assert text.startswith("left out: 2 .jp2, 1 .j2k, 1 .jxl (convert them to JPEG or PNG); ")
    assert "1 .svg (export them as PNG)" in text and "1 .cr2 (export them as JPEG" in text
    assert HAS_HEIF or UNREADABLE[".heic"].startswith("pip install 'blip2[heif]'")
    assert listed(tmp_path / "top", include=["*.jpg"])[1].left_out == {} and left_out_text({}) == ""
    with pytest.raises(BulkError, match=r"no images found; left out: 1 \.j2k, 1 \.jp2 \(convert"):
        listed(tmp_path / "top" / "deep", limit=5)[1].check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "damaged" if HAS_HEIF else "this is HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "this is JPEG XL"),
        (b"\xff\x0a\xfa\x1f", "this is JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "this is JPEG 2000"),
        (b"<?xml version='1.0'?><svg xmlns=", "a drawing .*export it as PNG"),
        (b"  <SVG width='3'>", "a drawing"),
        (b"<!DOCTYPE html><html>", "a web page: download the image itself"),
        (b"%PDF-1.7\n", "this is PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"hello there", "no image this package can read; supported are JPEG"),
    ],
)
def test_a_named_file_of_another_kind_says_which(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("photo.heic", "photo.jpg", "photo"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.NEF", "b.psd", "c.heic", "d.jxl", "e.svgz", "f.ico", "g.exr"])
def test_a_named_file_of_a_kind_that_is_not_read_says_what_helps(
    tmp_path: Path, name: str, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = name[1:].lower()
    path = tmp_path / name
    for content in (b"", b"II*\0\x08\0\0\0junk", b"anything"):
        path.write_bytes(content)
        assert main(["caption", str(path), "--model", str(generator_folder), "--quiet"]) == 1
        with pytest.raises(ImageError) as caught:
            load_image(path)
        for message in (capsys.readouterr().err, str(caught.value)):
            if suffix in SUFFIXES:
                assert "not read here" not in message
            else:
                assert f"{suffix} files are not read here: {UNREADABLE[suffix]}" in message
    assert problem(ImageItem(str(picture(path)), str(path))) == ""  # what it is, its content tells


def test_a_list_says_what_to_do_about_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = tmp_path / "sets"
    for name in ("a.jpg", "sub/b b.png", "no suffix", "c.data", unicodedata.normalize("NFD", "é.png")):
        picture(sets / name)
    picture(tmp_path / "here.png")
    monkeypatch.chdir(tmp_path)
    cases = {
        "a.jpg": "", "sub/b b.png": "", "no suffix": "", "c.data": "",
        "a.jpg ": "a.jpg', write its name so", " a.jpg": "a.jpg', write", "a.jpg\t": "a.jpg', write",
        '"a.jpg"': "a.jpg', write its name so", "'sub/b b.png'": "b b.png', write",
        "sub\\b b.png": "sub/b b.png', write",
        '"sub\\b b.png" ': "sub/b b.png', write", ".\\a.jpg": "a.jpg', write",
        unicodedata.normalize("NFC", "é.png"): "write its name so",
        "C:\\Users\\me\\a.jpg": "Windows' drives", "d:/photos/a.jpg": "Windows' drives",
        '"E:\\a.jpg"': "Windows' drives",
        "file:///home/me/a.jpg": "without file://", "file://nas/a.jpg": "without file://",
        "FTP://host/a.jpg": "URLs are not fetched here",
        "https://example.org/a.jpg?x=1": "URLs are not fetched here", "s3://bucket/a.jpg": "URLs are not fetched here",
        "~/a.jpg": f"write {os.path.expanduser('~')}/a.jpg", "here.png": "here.png is in the current folder",
        "sub": "(a folder?)", "gone.png": "no such file",
    }  # fmt: skip
    path = sets / "list.txt"
    path.write_text("\n\n  \n".join(cases) + "\n \t\n", encoding="utf-8")
    items, _ = listed(path)
    assert len(items) == len(cases)
    for item, (line, message) in zip(items, cases.items()):
        assert message in problem(item) and bool(message) == bool(problem(item)), (line, problem(item))
    rows = [{"image": line} for line in cases]
    (sets / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [problem(item) for item in listed(sets / "rows.jsonl")[0]] == [problem(item) for item in items]
    with pytest.raises(BulkError, match=r"b b.png: no such file or folder; there is '.*/sub/b b.png'"):
        listed(Path(f"{sets}/sub\\b b.png"), strict=True)


def test_rows_without_an_image_are_errors_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    good, bad = (
        {"image": "a.png"},
        [{"caption": "x"}, {"image": ""}, {"image": None}, {"image": ["a.png"]}, 5, None, []],
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in (*bad, good)))
    (tmp_path / "rows.json").write_text(json.dumps([*bad, good, "a.png"]))
    (tmp_path / "rows.csv").write_text("image,x\n,1\na.png,2\n")
    (tmp_path / "rows.tsv").write_text("x\timage\n1\t\n2\ta.png\n")
    for name, failed, images in (("jsonl", 7, 1), ("json", 7, 2), ("csv", 1, 1), ("tsv", 1, 1)):
        source = tmp_path / f"rows.{name}"
        found = [problem(item) for item in listed(source)[0]]
        assert [bool(text) for text in found] == [True] * failed + [False] * images
        for i, text in enumerate(found[:failed], 1):
            assert text.startswith(f"{source}#{i}: expected a path as one of image, ")
    for name, content in (
        ("no.csv", "file,caption\na.png,x\n"),
        ("no.jsonl", '{"picture": "a.png"}\n3\n'),
        ("no.json", '[{"x": "a.png"}]'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(
            BulkError, match=r"row 1 names no image; expected one of image, path.*; neither does any"
        ):
            listed(tmp_path / name)
        (item,) = listed(tmp_path / name, strict=False)[0]
        assert "row 1 names no image" in problem(item)


def parquet(path: Path, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_every_value_of_a_parquet_column_is_an_image_or_an_error_of_its_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    content = picture(tmp_path / "a.png").read_bytes()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\5\0\0\0\7\0\0\0"), pa.py_buffer(b"a.png\xe9\xe8")]
    )
    cases: list[tuple[Any, list[str]]] = [
        (["a.png", None, "", "gone.png"], ["", "got nothing", "got an empty text", "no such file"]),
        (
            pa.array([content, None, b"", b"x"], pa.large_binary()),
            ["", "got nothing", "got no bytes", "no image"],
        ),
        (
            pa.array([{"bytes": content}, {"path": "a.png"}, {}, None], struct),
            ["", "", "got an object", "got nothing"],
        ),
        (pa.array([["a.png"], [], None]), ["got a list", "got a list", "got nothing"]),
        (pa.array([1, 0, None]), ["got a number", "got a number", "got nothing"]),
        (pa.array([1.5, float("nan")]), ["got a number"] * 2),
        (pa.array([True, False]), ["got a truth value"] * 2),
        (pa.nulls(3), ["got nothing"] * 3),
        (pa.array([{"url": "a.png"}, {"url": None}]), ["got an object"] * 2),
        (pa.array(["a.png", "a.png"]).dictionary_encode(), ["", ""]),
        (broken, ["", "got a UnicodeDecodeError"]),
    ]
    for i, (column, expected) in enumerate(cases):
        path = parquet(tmp_path / f"{i}.parquet", image=column)
        items, _ = listed(path, tmp_path / "a.png")
        found = [problem(item) for item in items]
        assert len(found) == len(expected) + 1 and found[-1] == ""
        for row, (text, message) in enumerate(zip(found, expected), 1):
            assert message in text and bool(message) == bool(text), (i, row, text)
            assert not text.startswith(str(path)) or text.startswith(f"{path}#{row}: ")
    with pytest.raises(BulkError, match="has the columns picture; expected one of image"):
        listed(parquet(tmp_path / "none.parquet", picture=["a.png"]))


def test_a_damaged_table_keeps_what_came_before(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    picture(tmp_path / "a.png")
    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("image", pa.string())]), compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(pa.table({"image": ["a.png"] * 100 + [f"{i}.png" for i in range(3000)]}))
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 400)
    items: list[ImageItem] = []
    with pytest.raises(BulkError, match=r"rows.parquet: .*(cannot be read to its end|no parquet file)"):
        for item in Inputs(sources=[str(path)]):
            items.append(item)
    assert len(items) == 3100 and problem(items[0]) == ""
    assert problem(list(Inputs(sources=[str(path)], strict=False))[-1]).startswith(f"{path}: ")


def test_our_own_outputs_are_read_back(tmp_path: Path) -> None:
    """Rows that hold an error are counted; names with U+2028 or bytes that are no UTF-8 lead to the same files."""
    top = tmp_path / "top"
    names = [
        b"a b.png",
        b"x\xe2\x80\xa8y.png",
        b"caf\xe9.png",
        b"\xff\xfe\x80.png",
        b"q,\"'.png",
        b"back\\slash.png",
    ]
    top.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (5 + i, 5)).save(os.path.join(os.fsencode(top), name), "PNG")
    for damaged in ("zz.png", "zé.png"):
        (top / damaged).write_bytes(b"\x89PNG")
    images = [os.fsdecode(name) for name in sorted(names, key=os.fsdecode)]
    for kind in ("jsonl", "csv", "parquet"):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        settings = RunSettings(out=tmp_path / f"out.{kind}", kind=kind)
        done = caption_all(Inputs(sources=[str(top)]), settings, describe)
        items, inputs = listed(settings.out)
        assert [os.path.relpath(item.name, top) for item in items] == images
        assert done.failed == 2 and inputs.left_out == {"rows that hold an error": 2}
        assert [load_image(item.read()).width for item in items] == [
            5 + names.index(os.fsencode(image)) for image in images
        ]
        assert left_out_text(inputs.left_out) == "left out: 2 rows that hold an error"
        samples = read_sample_set(settings.out)
        assert [os.path.relpath(sample.image_name, top) for sample in samples.samples] == images
        assert {sample.captions for sample in samples.samples} == {("a rose\u2028or two",)}
        assert samples.problems == [] and samples.left_out == inputs.left_out
    # A user's own column of that name is none of ours where there is a text.
    with (tmp_path / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "error"], ["a.png", "a rose", "0.3"]])
    assert len(listed(tmp_path / "own.csv")[0]) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_long_lists_are_checked_in_blocks(tmp_path: Path, encoding: str) -> None:
    path, lines = tmp_path / "list.txt", [f"{i}/é漢🌹{'x' * (i % 50)}.jpg" for i in range(60_000)]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    assert [os.path.relpath(item.name, tmp_path) for item in listed(path)[0]] == lines
    for bad, line in (
        (b"\xe9", 60_001),
        (b"\xf0\x9f\x8c", 60_001),
    ):  # a character that is cut is found at the end too
        path.write_bytes("\n".join(lines).encode() + b"\nz" + bad)
        with pytest.raises(BulkError, match=f"list.txt, line {line}: byte 0x"):
            next(iter(Inputs(sources=[str(path)])))
    path.write_bytes(b"x" * (3 << 20) + b"\n\xe9")
    with pytest.raises(BulkError, match=r"list\.txt, line 2: byte 0xe9"):
        next(iter(Inputs(sources=[str(path)])))


def test_problem_rows_take_no_text_file_of_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "rows.png")
    (tmp_path / "rows.jsonl").write_text('{"x": 1}\n{"image": 3}\n{"image": "rows.png"}\n')
    done = caption_all(
        Inputs(sources=[str(tmp_path / "rows.jsonl")]),
        RunSettings(out=tmp_path, kind="txt"),
        describe,
    )
    assert done.failed == 2 and (tmp_path / "rows.txt").read_text(encoding="utf-8") == "a rose\u2028or two\n"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "webdataset"])
def test_names_that_no_file_can_have_end_no_run(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a.png")
    names = [
        "\0",
        "a.png\0",
        "x\0y.png",
        "\ud800.png",
        "\udfff\udc00.png",
        "x" * 300 + ".png",
        "y/" * 3000,
        "a.png/b.png",
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out" / ("" if kind == "txt" else f"o.{kind}")
    source.write_text("".join(json.dumps({"image": name}) + "\n" for name in [*names, "a.png"]))
    (tmp_path / "out").mkdir()
    done = caption_all(Inputs(sources=[str(source)]), RunSettings(out=out, kind=kind), describe)
    assert done.failed == len(names) and done.done == len(names) + 1


def test_every_command_says_what_was_left_out(
    tmp_path: Path, generator_folder: Path, matcher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "top"
    picture(top / "a.png")
    for name in ("b.psd", "c.PSD", "d.svg"):
        (top / name).touch()
    out, model = ["--out", str(tmp_path / "o.jsonl")], ["--model", str(generator_folder), "--quiet"]
    for command in (
        ["caption", str(top), *model],
        ["caption", str(top), *model, *out, "--dry-run"],
        ["caption", str(top), *model, *out],
        ["ask", str(top), "what?", *model],
        ["embed", str(top), "--model", str(matcher_folder), "--quiet"],
    ):
        assert main(command) == 0
        assert (
            "left out: 2 .psd (convert them to JPEG or PNG); 1 .svg (export them as PNG)"
            in capsys.readouterr().err
        )
    (top / "a.png").unlink()
    assert main(["caption", str(top), *model]) == 1
    assert "left out: 2 .psd" in capsys.readouterr().err
    assert main(["caption", str(top), *model, *out, "--existing", "overwrite"]) == 2
    assert "no images found; left out: 2 .psd" in capsys.readouterr().err
