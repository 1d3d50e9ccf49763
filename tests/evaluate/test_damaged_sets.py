"""Sets of which a part cannot be used: the rest is scored, and the report says what was left out."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blip2
from blip2.cli import main
from blip2.data.sources import DataError
from blip2.evaluate.report import lines, report_summary, write
from blip2.evaluate.run import EvalSettings, Report, evaluate

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Path]) -> Path:
    (tmp_path / "set").mkdir()
    for i, picture in enumerate(pictures[:4]):
        (tmp_path / "set" / f"{i}.png").write_bytes(picture.read_bytes())
    return tmp_path / "set"


def run(kind: str, data: Path, model: Path, **settings: Any) -> Report:
    (report,) = evaluate(
        lambda: blip2.load(model), kind, data, EvalSettings(java=False, **settings), model_name="x"
    )
    return report


def rows(folder: Path, form: str, more: list[Any]) -> Path:
    """Captions or questions about the four pictures, and other rows."""
    texts = {
        "captions": {"captions": ["a red cat", "two dogs"]},
        "questions": {"question": "what?", "answer": "cat"},
    }
    content = [{"image": f"{i}.png", **texts[form]} for i in range(4)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*more[:1], *content, *more[1:])))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", ["captions", "questions"])
def test_a_damaged_image_is_left_out_and_counted(
    folder: Path, generator_folder: Path, tmp_path: Path, form: str, damage: str
) -> None:
    data = rows(folder, form, [])
    whole = run(form, data, generator_folder)
    assert (whole.damaged, whole.left_out, len(whole.outcomes)) == ([], (), 4)
    assert report_summary(whole)["damaged"] == 0
    DAMAGE[damage](folder / "2.png")
    report = run(form, data, generator_folder)
    assert [outcome.text for outcome in report.outcomes] == [
        outcome.text for outcome in whole.outcomes if "2.png" not in str(outcome.item.image)
    ]
    summary = report_summary(report)
    assert (summary["items"], summary["damaged"]) == (3, 1) and "2.png" in summary["first_damaged"][0]
    assert any("images that cannot be read, left out of the scores: 1 (" in line for line in lines(report))
    results, _, page = write(report, tmp_path / "out")
    assert json.loads(results.read_text())["damaged"] == 1 and "left out of the scores" in page.read_text()


def test_rows_that_cannot_be_used_are_counted(
    folder: Path, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"question": "where?", "answer": "here"},
        {"image": "1.png", "question": "why?"},
        7,
        ["0.png"],
        {"image": "0.png", "question": "what?", "answer": [3]},
        {"image": "0.png", "question": "\ud83d?", "answer": "x"},
    ]
    data = rows(folder, "questions", [*bad, {"image": "3.png", "error": "3.png: truncated"}])
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ["eval", "questions", "--data", str(data), "--model", str(generator_folder), "--quiet"]
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["items"], report["damaged"], report["left_out"]) == (3, 1, len(bad))
    assert "rows.jsonl, row 1 names no image" in report["first_left_out"][0]
    assert "left out: 1 rows that hold an error" in report["notes"]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert f"note: rows that cannot be used, left out of the scores: {len(bad)} (" in output.out


def test_nothing_left_is_an_error_before_the_model_is_loaded(folder: Path) -> None:
    data = rows(folder, "captions", [])
    for path in folder.glob("*.png"):
        path.write_bytes(b"none")
    odd = rows(folder, "questions", [])
    with pytest.raises(DataError, match=r"holds no captions$"):
        evaluate(lambda: pytest.fail("loaded"), "captions", odd, EvalSettings(), model_name="x")
    questions = {"questions": [{"question_id": i, "image": "0.png", "question": "what?"} for i in range(3)]}
    annotations = {"annotations": [{"question_id": 1, "answers": [{"answer": "cat"}] * 3}]}
    for name, content in (
        ("OpenEnded_mscoco_val2014_questions.json", questions),
        ("mscoco_val2014_annotations.json", annotations),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "val2014").mkdir()
    with pytest.raises(
        DataError, match=r"nothing to score; left out: 3 \(.* no answers to question 0; 1 has 3 answers"
    ):
        evaluate(lambda: pytest.fail("loaded"), "okvqa", folder, EvalSettings(), model_name="x")
    data = rows(folder, "captions", [])
    with pytest.raises(DataError, match=r"images that cannot be read, and no others: 4 .*0\.png"):
        evaluate(lambda: pytest.fail("loaded"), "captions", data, EvalSettings(), model_name="x")


def test_retrieval_leaves_out_an_image_with_its_texts(
    folder: Path, generator_folder: Path, matcher_folder: Path, tmp_path: Path
) -> None:
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (tmp_path / "flickr30k-images").symlink_to(folder)
    sentences = [{"raw": "a cat"}, {"raw": "two dogs"}]
    content = [{"filename": f"{i}.png", "split": "test", "sentences": sentences[: i % 3]} for i in range(4)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": content}))
    load = lambda: blip2.load(generator_folder, matcher=matcher_folder)  # noqa: E731
    (report,) = evaluate(load, "retrieval-flickr30k", tmp_path, EvalSettings(), model_name="x")
    assert [outcome.item.id for outcome in report.outcomes] == ["2"]
    assert len(report.damaged) == 1 and [text[:2] for text in report.left_out] == ["0 ", "3 "]
    assert report.metrics["text R@1"] is not None and report.metrics["image R@1"] is None
    assert "not defined" in "\n".join(lines(report))


def test_a_folder_and_a_shard_are_evaluated_alike(
    folder: Path, generator_folder: Path, tmp_path: Path
) -> None:
    for i, text in enumerate(("a rose\na red rose\n", "a cat", "  \n", "a vase")):
        (folder / f"{i}.txt").write_text(text)
    (folder / "3.txt").write_bytes(b"caf\xe9")
    (folder / "d.JXL").touch()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(folder, ".")
    reports = [run("captions", data, generator_folder) for data in (folder, tmp_path / "shard.tar")]
    for report in reports:
        assert [outcome.item.captions for outcome in report.outcomes] == [
            ("a rose", "a red rose"),
            ("a cat",),
        ]
        assert len(report.left_out) == 2 and "3.txt" in report.left_out[1]
        assert "left out: 1 .jxl (convert them to JPEG or PNG)" in report.notes
    assert [o.text for o in reports[0].outcomes] == [o.text for o in reports[1].outcomes]
    results, _, page = write(reports[1], tmp_path / "out")
    assert "shard.tar/./0.png" in results.read_text() and page.read_text().count("data:image/jpeg") == 2


def test_names_of_any_bytes_are_reported(folder: Path, generator_folder: Path, tmp_path: Path) -> None:
    for i, name in enumerate((b"caf\xe9.png", b"\xff\x1b[2J.png", b'q"&\n.png')):
        (folder / f"{i}.png").rename(folder / os.fsdecode(name))
        (folder / os.fsdecode(name)).with_suffix(".txt").write_text("a rose")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"none")
    report = run("captions", folder, generator_folder)
    results, _, page = write(report, tmp_path / "out")
    content = json.loads(results.read_text(encoding="utf-8"))
    assert content["damaged"] == 1 and os.fsdecode(b"caf\xe9.png") in content["first_damaged"][0]
    assert "caf\\udce9.png" in page.read_text(encoding="utf-8") and content["left_out"] == 1


def test_one_image_has_no_cider(
    folder: Path, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap")
    arguments = [
        "eval",
        "captions",
        "--data",
        str(rows(folder, "captions", [])),
        "--model",
        str(generator_folder),
    ]
    assert main([*arguments, "--limit", "1", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["metrics"]["CIDEr"] is None and report["metrics"]["ROUGE-L"] >= 0
    assert any("CIDEr is not defined here: " in note and "one image" in note for note in report["notes"])
    assert main([*arguments, "--limit", "1", "--quiet"]) == 0
    table = capsys.readouterr().out
    assert any(line.split()[0] == "CIDEr" and "not defined" in line for line in table.splitlines())


def test_answers_of_own_sets_are_normalised(folder: Path, generator_folder: Path) -> None:
    data = rows(folder, "questions", [])
    model = blip2.load(generator_folder)
    said = [o.text for o in run("questions", data, generator_folder).outcomes]
    content = [
        {"image": f"{i}.png", "question": "what?", "answer": f"  The {text.upper()}. "}
        for i, text in enumerate(said)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in content))
    (report,) = evaluate(lambda: model, "questions", data, EvalSettings(), model_name="x")
    assert report.metrics["accuracy"] == 1
