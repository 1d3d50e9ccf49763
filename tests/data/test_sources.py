"""Samples from every kind of file; errors name what is wrong with a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from blip2.data.sources import DataError, Sample, read_samples


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
