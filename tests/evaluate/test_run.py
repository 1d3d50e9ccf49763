"""Tasks, protocols, reports and the command, on tiny models and files in the published forms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import blip2
from blip2.cli import main
from blip2.data.sources import DataError
from blip2.evaluate.names import TASK_FILES, TASK_NAMES
from blip2.evaluate.protocols import PROTOCOLS, PUBLISHED, published
from blip2.evaluate.report import predictions, report_summary, write
from blip2.evaluate.run import EvalSettings, evaluate
from blip2.evaluate.scenes import counts_right, named_things, names_all
from blip2.evaluate.tasks import read_task
from blip2.generation.options import GenerationOptions, make_options

TEN = [{"answer": text} for text in ["a cat"] * 6 + ["cat"] * 3 + ["dog"]]


@pytest.fixture
def data(tmp_path: Path, pictures: list[Path]) -> Path:
    """Small sets, as those of COCO, NoCaps, Flickr30k, VQA, GQA, easy-VQA, scenes, photographs, over five pictures."""
    bytes_ = [picture.read_bytes() for picture in pictures]

    def images(folder: str, names: list[str]) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in zip(names, bytes_, strict=False):
            (tmp_path / folder / name).write_bytes(content)

    def save(name: str, content: Any) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))

    coco = [f"COCO_val2014_{i:012d}.jpg" for i in range(5)]
    images("val2014", coco)
    sentences = [{"raw": "A red cat.\n"}, {"raw": "two dogs"}]
    rows = [
        {
            "filepath": "val2014",
            "filename": name,
            "cocoid": i,
            "split": "val" if i == 4 else "test",
            "sentences": sentences,
        }
        for i, name in enumerate(coco)
    ]
    save("dataset_coco.json", {"images": rows})
    images("flickr30k-images", [f"{i}.jpg" for i in range(3)])
    flickr = [{"filename": f"{i}.jpg", "split": "test", "sentences": sentences} for i in range(3)]
    save("dataset_flickr30k.json", {"images": flickr})
    images("images", ["a.jpg", "b.jpg", "n1.jpg"])
    domains = [
        {"id": 0, "file_name": "a.jpg", "domain": "in-domain"},
        {"id": 1, "file_name": "b.jpg", "domain": "out-domain"},
    ]
    annotations = [{"image_id": i, "caption": text} for i in (0, 1) for text in ("a cat", "the dog")]
    save("nocaps_val_4500_captions.json", {"images": domains, "annotations": annotations})
    questions = [{"question_id": i, "image_id": i, "question": "what is it?"} for i in range(3)]
    answers = [{"question_id": i, "answers": TEN, "answer_type": "other"} for i in range(3)]
    for task in ("vqav2", "okvqa"):
        save(TASK_FILES[task][0][0], {"data_subtype": "val2014", "questions": questions})
        save(TASK_FILES[task][1][0], {"annotations": answers})
    save(
        "testdev_balanced_questions.json",
        {"7": {"imageId": "n1", "question": "what is it?", "answer": "cat"}},
    )
    images("easy_vqa/data/test/images", ["0.png", "1.png"])
    save("easy_vqa/data/test/questions.json", [["what is it?", "cat", 1], ["is it?", "yes", 0]])
    images("scenes/images", ["0.png", "1.png"])
    row = {"image": "images/0.png", "things": {"cat": 1}, "captions": ["a cat"]}
    question = {"image": "images/1.png", "question": "what is it?", "answer": "cat", "kind": "object"}
    two = [row, row | {"image": "images/1.png", "captions": ["two dogs"]}]
    sets = {"singles": [row], "multi": two, "questions": [question], "retrieval": two}
    save("scenes/scenes.json", {"nouns": {"cat": "cats"}} | sets)
    save("photos.jsonl", {"image": "images/a.jpg", "names": ["cat"]})
    return tmp_path


@pytest.mark.parametrize("task", [name for name in TASK_NAMES if name not in ("captions", "questions")])
def test_every_task_runs(task: str, data: Path, generator_folder: Path, matcher_folder: Path) -> None:
    model = blip2.load(generator_folder, matcher=matcher_folder)
    settings = EvalSettings(java=False, protocol="paper" if task in PUBLISHED else "default")
    reports = evaluate(lambda: model, task, data, settings, model_name="opt-2.7b-coco")
    for report in reports:
        values = [value for value in report.metrics.values() if value is not None]
        assert report.outcomes and values and all(0 <= value <= 10 for value in values)
        assert len(values) == len(report.metrics) or any("not defined" in note for note in report.notes)
        assert report.published == (published(task, "opt-2.7b-coco") if settings.protocol == "paper" else {})
        rows = predictions(report)
        assert len(rows) == len(report.outcomes) and json.dumps(report_summary(report))
        assert report.weights == model.digest(matcher=task.startswith("retrieval"))
    if task == "coco":
        assert [row["image_id"] for row in rows] == [0, 1, 2, 3]
        assert {"BLEU-4", "ROUGE-L", "CIDEr"} <= set(reports[0].metrics)
        assert any("364 px; this model reads 32" in note for note in reports[0].notes)
    if task == "nocaps":
        assert {"CIDEr", "CIDEr in-domain", "CIDEr out-domain"} <= set(reports[0].metrics)
    if task == "gqa":
        assert rows[0].keys() == {"questionId", "prediction"} and rows[0]["questionId"] == "7"
    if task.startswith("retrieval"):
        assert reports[0].metrics["text R@5"] is not None and reports[0].metrics["text R@10"] is None


def test_the_settings_of_the_published_tables() -> None:
    captions, questions, retrieval = PROTOCOLS["paper"].values()
    assert (captions.prompt, captions.image_px, questions.image_px) == ("a photo of", 364, 224)
    shortest = 8 - 4  # the published minimum counts "</s>a photo of"
    expected = GenerationOptions(num_beams=5, max_new_tokens=30, min_new_tokens=shortest)
    assert make_options("caption", **captions.options) == expected
    assert (expected.length_penalty, expected.repetition_penalty) == (1, 1)
    expected = GenerationOptions(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
    assert make_options("answer", **questions.options) == expected
    assert (retrieval.candidates, retrieval.text_length, retrieval.logits) == (128, 35, True)
    assert published("coco", "opt-6.7b-coco")["CIDEr"] == 1.451
    assert published("vqav2", "Salesforce/blip2-flan-t5-xxl") == {"accuracy": 0.652}
    assert published("coco", "default") == published("easyvqa", "opt-2.7b") == {}


def test_ranked_answers_and_abstention(data: Path, generator_folder: Path) -> None:
    model = blip2.load(generator_folder)
    settings = EvalSettings(answers=("cat", "dog", "yes"))
    (report,) = evaluate(lambda: model, "vqav2", data, settings, model_name="x")
    assert {outcome.text for outcome in report.outcomes} <= {"cat", "dog", "yes"}
    assert all(
        sum(answer.probability for answer in o.ranked) == pytest.approx(1, abs=1e-5) for o in report.outcomes
    )
    (report,) = evaluate(
        lambda: model, "vqav2", data, EvalSettings(answers=("cat", "dog"), abstain=1.0), model_name="x"
    )
    assert report.metrics["answered"] < 1 and report.metrics["accuracy"] >= 0
    assert report.notes == ["each answer is chosen among 2", "no answer below a probability of 1.0"]


def test_the_page_needs_nothing_else(data: Path, generator_folder: Path, tmp_path: Path) -> None:
    task = data / "mine.jsonl"
    task.write_text(
        json.dumps({"image": "val2014/COCO_val2014_000000000000.jpg", "question": "<b>?", "answer": "a & b"}) + "\n"
        + json.dumps({"image": "val2014/COCO_val2014_000000000001.jpg", "question": "what?", "answer": "cat"}) + "\n"
    )  # fmt: skip
    (report,) = evaluate(
        lambda: blip2.load(generator_folder), "questions", task, EvalSettings(), model_name="x"
    )
    results, rows, page = write(report, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert text.count("<article>") == text.count('src="data:image/jpeg;base64,') == 2
    assert "&lt;b&gt;?" in text and "a &amp; b" in text and "<b>" not in text
    assert not re.search(r"(src|href)=(?!\"data:)", text)
    assert len(json.loads(results.read_text())["outcomes"]) == 2
    assert {row["question_id"] for row in json.loads(rows.read_text())} == {
        o.item.id for o in report.outcomes
    }


def test_common_forms(data: Path) -> None:
    assert [len(item.captions) for item in read_task("captions", data / "dataset_coco.json").items] == [2] * 4
    coco = read_task("captions", data / "nocaps_val_4500_captions.json", images=data / "images")
    assert [item.id for item in coco.items] == [0, 1]
    vqa = read_task(
        "questions",
        data / TASK_FILES["vqav2"][0][0],
        images=data / "val2014",
        annotations=data / TASK_FILES["vqav2"][1][0],
    )
    assert vqa.rule == "vqa" and vqa.items[0].answers[0] == "a cat"
    with pytest.raises(DataError, match="--annotations"):
        read_task("questions", data / TASK_FILES["vqav2"][0][0])


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val2014").mkdir()
    for name in TASK_NAMES:
        arguments = (
            ["eval", name] if name in ("captions", "questions") else ["eval", name, "--data", str(tmp_path)]
        )
        assert main(arguments) == 2
        error = capsys.readouterr().err
        for file, _ in TASK_FILES.get(name, ()):
            assert file.rstrip("/") in error
    assert main(["eval", "scenes", "--protocol", "paper"]) == 2
    assert "none for scenes" in capsys.readouterr().err
    assert main(["eval", "easyvqa", "--abstain", "0.5"]) == 2
    assert "--answers" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("cat\n")
    common = ["--data", str(data)]
    for arguments, message in (
        (["vqav2", *common, "--answers", str(tmp_path / "none.txt")], "none.txt: the file holds none"),
        (
            ["vqav2", *common, "--answers", str(tmp_path / "gone.txt")],
            "gone.txt: cannot be read (No such file",
        ),
        (
            ["coco", *common, "--answers", str(tmp_path / "some.txt")],
            "--answers is for tasks that are questions",
        ),
        (["scenes", *common, "--answers", str(tmp_path / "some.txt")], "--answers is for tasks that"),
        (["coco", *common, "--batch-size", "0"], "batch size must be 1 or more"),
        (["coco", *common, "--out", str(tmp_path / "some.txt")], "this is a file; name a folder"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err
    for task, file, message in (
        ("coco", "dataset_coco.json", "no 'images'"),
        (
            "gqa",
            "testdev_balanced_questions.json",
            "eval gqa: the data hold nothing to score; left out: 1 (question 1",
        ),
        ("scenes", "scenes/scenes.json", "no 'singles'"),
    ):
        (data / file).write_text('{"x": 1}')
        assert main(["eval", task, *common]) == 2
        assert message in capsys.readouterr().err
    (data / "scenes/scenes.json").write_text("{")
    assert main(["eval", "scenes", *common]) == 2
    assert "scenes.json: no valid JSON" in capsys.readouterr().err


def test_missing_images_are_reported_before_a_model_is_loaded(data: Path) -> None:
    (data / "easy_vqa/data/test/images/1.png").unlink()
    (data / "scenes/images/0.png").unlink()
    for task, message in (
        ("easyvqa", "1 of 2 images are missing, such as .*1.png"),
        ("scenes", "3 of 6 .*0.png"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(lambda: pytest.fail("loaded"), task, data, EvalSettings(), model_name="x")


def test_the_command(
    data: Path, generator_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["eval", "easyvqa", "--data", str(data), "--model", str(generator_folder), "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out and (tmp_path / "out/index.html").is_file()
    assert main([*arguments, "--json", "--limit", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["items"] == 1 and report["notes"] == ["the first 1 of the set alone"]


def test_things_named() -> None:
    nouns = {"bear": "bears", "teddy bear": "teddy bears", "mouse": "mice"}
    assert named_things("two mice and a red teddy bear", nouns) == {"mouse": 2, "teddy bear": 1}
    assert names_all("a teddy bear", {"bear": 1}, nouns) == 0
    assert (
        counts_right("three bears", {"bear": 3}, nouns) == 1
        and counts_right("bears", {"bear": 3}, nouns) == 0
    )
