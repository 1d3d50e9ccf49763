"""Rows of a set in a published form that are damaged, or hold what no model can be asked: counted, not the end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import blip2
from blip2.evaluate.report import write
from blip2.evaluate.run import EvalSettings, evaluate
from blip2.evaluate.tasks import EvalItem, read_task

Rows = dict[str, Any]
ODD = (None, 7, True, 0.5, "x", [1], {"a": 1}, float("nan"))


def _sets() -> dict[str, tuple[str, Rows, Rows]]:
    """A task's kind, three rows of its set in each list, and its answers."""
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    captions = [{"image_id": i, "caption": f"a cat {i}"} for i in range(3)]
    split = [
        {"split": "test", "filename": f"{i}.png", "cocoid": i, "sentences": [{"raw": "a cat"}]}
        for i in range(3)
    ]
    asked = [{"question_id": i, "image": f"{i}.png", "question": "what?"} for i in range(3)]
    answered = [{"question_id": i, "answer_type": "y", "answers": [{"answer": "cat"}]} for i in range(3)]
    return {
        "coco": ("captions", {"images": images, "annotations": captions}, {}),
        "karpathy": ("captions", {"images": split}, {}),
        "vqa": ("questions", {"questions": asked}, {"annotations": answered}),
    }


def _read(folder: Path, kind: str, content: Rows, answers: Rows) -> tuple[list[EvalItem], tuple[str, ...]]:
    for name, rows in (("set", content), ("answers", answers)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    annotations = folder / "answers.json" if answers else None
    task = read_task(kind, folder / "set.json", annotations=annotations)
    return task.items, task.left_out


@pytest.mark.parametrize("form", _sets())
def test_every_value_of_a_row_made_something_else(form: str, tmp_path: Path) -> None:
    kind, content, answers = _sets()[form]
    assert len(_read(tmp_path, kind, content, answers)[0]) == 3
    tried = 0
    for name, rows in (content | answers).items():
        for field in (None, *rows[1]):
            for odd in ODD:
                changed, changed_answers = copy.deepcopy((content, answers))
                place = changed.get(name) or changed_answers[name]
                if field is None:
                    place[1] = odd
                else:
                    place[1][field] = odd
                items, left_out = _read(tmp_path, kind, changed, changed_answers)
                assert len(items) >= 2 and (len(items) == 3 or left_out or field in ("split", "id")), (
                    field,
                    odd,
                )
                texts = [text for item in items for text in (item.question, *item.captions, *item.answers)]
                assert all(type(item.id) in (int, str) and type(item.kind) is str for item in items)
                assert all(type(text) is str for text in texts)
                tried += 1
    assert tried >= 30


def test_questions_that_cannot_be_asked(generator_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    kind, content, answers = _sets()["vqa"]
    model = blip2.load(generator_folder, device="cpu")
    bad = ("  ", "\x00", "\u200b", "z " * 200, "z" * 40_000, "\ud83d?")
    for i, question in enumerate(("what?", *bad, "who?")):
        (tmp_path / f"{i}.png").write_bytes(pictures[0].read_bytes())
        row = {"question_id": i, "image": f"{i}.png", "question": question}
        content["questions"][i:] = [row]
        answers["annotations"][i:] = [{"question_id": i, "answers": [{"answer": "cat"}]}]
    _read(tmp_path, kind, content, answers)
    for ranked in ((), ("cat", "dog")):
        settings = EvalSettings(annotations=tmp_path / "answers.json", answers=ranked)
        (report,) = evaluate(lambda: model, kind, tmp_path / "set.json", settings, model_name="x")
        assert [outcome.item.id for outcome in report.outcomes] == [0, len(bad) + 1]
        assert [text[:3] for text in report.left_out] == ["6 h", *(f"{i}: " for i in range(1, len(bad)))]
        assert "left out of the scores: 6 (6 holds" in report.notes[-1]
        for path in write(report, tmp_path / "out")[:2]:
            json.loads(path.read_text(), parse_constant=pytest.fail)
