"""Samples from every kind of file; errors name what is wrong with a file."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from blip2.data.sources import DataError, Sample, read_sample_set, read_samples
from blip2.imagefiles.listing import ImageItem


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_coco(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "a dog"},
            {"id": 2, "image_id": 9, "caption": "a cat"},
            {"id": 3, "image_id": 4, "caption": "a brown dog"},
        ],
    }
    assert read_samples(write(tmp_path / "captions.json", content), tmp_path / "images") == [
        Sample("4", tmp_path / "images" / "b.jpg", ("a dog", "a brown dog")),
        Sample("9", tmp_path / "images" / "a.jpg", ("a cat",)),
    ]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_rows_of_captions(tmp_path: Path, kind: str) -> None:
    rows = [
        {"image": "x/1.png", "caption": "one", "id": "p"},
        {"image": "2.png", "caption": "two, with a comma", "id": "q"},
        {"image": "x/1.png", "caption": "again", "id": "p"},
    ]
    content = {
        "json": json.dumps(rows),
        "jsonl": "\n".join(json.dumps(row) for row in rows) + "\n\n",
        "csv": 'image,caption,id\nx/1.png,one,p\n2.png,"two, with a comma",q\nx/1.png,again,p\n',
    }[kind]
    assert read_samples(write(tmp_path / f"data.{kind}", content)) == [
        Sample("p", tmp_path / "x/1.png", ("one", "again")),
        Sample("q", tmp_path / "2.png", ("two, with a comma",)),
    ]


def test_questions_stay_apart(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "question": "what?", "answer": ["dog", "a dog"], "question_id": 1},
        {"image": "a.jpg", "question": "how many?", "answers": [{"answer": "2"}], "question_id": 2},
    ]
    assert read_samples(write(tmp_path / "vqa.json", rows)) == [
        Sample("1", tmp_path / "a.jpg", (), "what?", ("dog", "a dog")),
        Sample("2", tmp_path / "a.jpg", (), "how many?", ("2",)),
    ]


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.JPG", "a.png", "deep/c.webp", "alone.jpg"):
        (tmp_path / name).write_bytes(b"")
    write(tmp_path / "a.txt", "first\n\nsecond\n")
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "deep/c.txt", "fourth")
    assert [(s.id, s.captions) for s in read_samples(tmp_path)] == [
        ("a.png", ("first", "second")),
        ("b.JPG", ("third",)),
        ("deep/c.webp", ("fourth",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", "no valid JSON"),
        ("a.json", {"rows": []}, "expected a list of rows"),
        ("a.json", [], "holds no samples"),
        ("a.json", ["a.jpg"], "row 1 is a str"),
        ("a.json", [{"caption": "a dog"}], "row 1 names no image"),
        ("a.json", [{"image": "a.jpg"}], "neither a caption nor a question"),
        ("a.json", [{"image": "a.jpg", "caption": 3}], "expected a text, got 3"),
        ("a.json", {"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}, "belongs to image 5"),
        ("a.jsonl", '{"image": "a.jpg", "caption": "x"}\n{', "line 2"),
        ("a.xml", "", "expected .json, .jsonl, .csv, .tsv, .parquet, or a folder"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_samples(write(tmp_path / name, content))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_samples(tmp_path / "none.json")


def test_what_cannot_be_used_is_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        {"caption": "a dog"}, {"image": 5, "caption": "x"}, {"image": "b.jpg"}, {"image": "b.jpg", "caption": " "},
        {"image": "b.jpg", "caption": {"en": "x"}}, {"image": "b.jpg", "question": 3}, "b.jpg", None, 4,
        {"image": "b.jpg", "caption": "\ud83d"}, {"image": "b.jpg", "captions": ["x", None]},
    ]  # fmt: skip
    failed = [
        {"image": "c.jpg", "error": "c.jpg: truncated"},
        {"image": "d.jpg", "caption": None, "error": "gone"},
    ]
    good = [{"image": "a.jpg", "caption": "a rose"}, {"path": "e.jpg", "text": "a vase", "error": None}]
    path = write(tmp_path / "rows.json", [*bad, *good, *failed])
    content = read_sample_set(path)
    assert [(sample.image.name, sample.captions) for sample in content.samples] == [
        ("a.jpg", ("a rose",)),
        ("e.jpg", ("a vase",)),
    ]
    assert [text.partition("row ")[2].split(maxsplit=1)[0].strip(":") for text in content.problems] == [
        str(i) for i in range(1, len(bad) + 1)
    ]
    assert content.left_out == {"rows that hold an error": 2}
    assert "rows and images that cannot be used: 11 (" in caplog.text and "; and 8 more)" in caplog.text
    assert "left out: 2 rows that hold an error" in caplog.text
    with pytest.raises(DataError, match=r"holds no samples: .*11 \(.*row 1 names no image"):
        read_samples(write(tmp_path / "bad.jsonl", "\n".join(map(json.dumps, bad))))
    with pytest.raises(DataError, match="holds no samples: left out: 2 rows that hold an error"):
        read_samples(write(tmp_path / "failed.json", failed))


def test_coco_with_odd_annotations(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, {"file_name": "c.jpg"}, 7]
    annotations = [
        {"image_id": 1, "caption": "a rose"}, {"image_id": 2, "caption": "x"}, {"image_id": 9, "caption": "x"},
        {"image_id": 1}, {"caption": "x"}, [],
    ]  # fmt: skip
    content = read_sample_set(write(tmp_path / "c.json", {"images": images, "annotations": annotations}))
    assert [sample.captions for sample in content.samples] == [("a rose",)] and len(content.problems) == 5


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_folder_with_links_and_a_shard(tmp_path: Path, kind: str) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    for path in (
        top / "a.jpg",
        top / "b/c.PNG",
        top / "d.jpg",
        top / "e.gif",
        top / "f.webp",
        top / "._a.jpg",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of " + path.name.encode())
        path.with_suffix(".txt").write_text(f"of {path.name}\n\nagain\n")
    outside.mkdir()
    (outside / "g.jpg").write_bytes(b"of g.jpg")
    (outside / "g.txt").write_bytes("\ufeffof g.jpg\r\n".encode("utf-16-le"))
    (top / "d.txt").write_bytes(b"caf\xe9")
    (top / "e.txt").unlink()
    (top / "f.txt").write_text("\n  \n")
    for name in ("x.jp2", "b/y.jp2", "z.svg", "@eaDir/a.jpg"):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).touch()
    (top / "link").symlink_to(outside)
    (outside / "back").symlink_to(top)
    data = top
    if kind == "tar":
        data = tmp_path / "shard.tar"
        with tarfile.open(data, "w") as archive:
            for place, inner in ((top, ""), (outside, "link")):
                for path in sorted(p for p in place.rglob("*") if p.is_file() and "back" not in p.parts):
                    if "link" not in path.parts:
                        archive.add(path, f"{inner}/{path.relative_to(place)}".lstrip("/"))
    content = read_sample_set(data)
    assert sorted(s.id.removeprefix(f"{data}/") for s in content.samples) == [
        "a.jpg",
        "b/c.PNG",
        "link/g.jpg",
    ]
    for sample in content.samples:
        name = os.path.basename(sample.id)
        assert sample.captions[0] == f"of {name}"
        read = sample.image.read if isinstance(sample.image, ImageItem) else sample.image.read_bytes
        assert read() == f"of {name}".encode()
    assert content.left_out == {".jp2": 2, ".svg": 1}
    reasons = ("d.txt, line 1: byte 0xe9", "there is no e.txt", "neither a caption nor a question")
    assert len(content.problems) == 3 and all(
        any(why in text for text in content.problems) for why in reasons
    )


def test_a_table_of_any_kind(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    odd = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / odd).touch()
    write(tmp_path / "t.TSV", 'image\tcaption\terror\na.jpg\ta "rose" here\t\nb.jpg\t\tb.jpg: damaged\n')
    write(tmp_path / "c.CSV", 'image,caption\na.jpg,"a ""rose"" here"\ncaf\\udce9.jpg,x\n')
    table = pa.table(
        {
            "image": ["a.jpg", "caf\\udce9.jpg", None, "d.jpg"],
            "caption": ['a "rose" here', "x", "y", None],
            "error": [None, None, None, "d.jpg: damaged"],
            "pixels": [[1], [2], [3], [4]],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    for name, images, problems in (("t.TSV", 1, 0), ("c.CSV", 2, 0), ("p.parquet", 2, 1)):
        content = read_sample_set(tmp_path / name)
        assert content.samples[0].captions == ('a "rose" here',) and len(content.problems) == problems
        assert [sample.image for sample in content.samples] == [tmp_path / "a.jpg", tmp_path / odd][:images]
        assert sum(content.left_out.values()) == (name != "c.CSV")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and more")
    for path in (tmp_path / "p.parquet", write(tmp_path / "x.tar", "no tar")):
        with pytest.raises(DataError, match=str(path)):
            read_samples(path)
