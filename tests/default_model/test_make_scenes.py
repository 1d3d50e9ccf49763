"""The evaluated scenes as files: read back they are those that were composed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from blip2.evaluate.scenes import SETS, read_scenes
from default_model.language import Language
from default_model.make_scenes import compose, write
from default_model.scenes import Composer


def test_files_hold_what_is_composed(composer: Composer, language: Language, tmp_path: Path) -> None:
    write(composer, language, tmp_path, limit=3)
    read, direct = read_scenes(tmp_path), compose(composer, language, limit=3)
    assert read.nouns == direct.nouns
    for name in SETS:
        files, composed = getattr(read, name), getattr(direct, name)
        assert len(files) == len(composed) == 3
        for one, other in zip(files, composed, strict=True):
            assert np.array_equal(np.asarray(Image.open(one.image)), np.asarray(other.image))
            for field in ("id", "captions", "question", "answers", "kind", "things"):
                assert getattr(one, field) == getattr(other, field)
    assert all(item.things for item in read.singles + read.multi)
    assert all(item.question and item.answers and item.kind for item in read.questions)
    assert all(item.question and item.kind and (item.answers or item.things) for item in read.natural)
    assert len({item.captions for item in read.retrieval}) == 3


def test_files_without_todays_sets_are_written_again(
    composer: Composer, language: Language, tmp_path: Path
) -> None:
    path = tmp_path / "scenes/scenes.json"
    write(composer, language, tmp_path, limit=2)
    content = json.loads(path.read_text())
    older = {name: rows for name, rows in content.items() if name != "natural"}
    path.write_text(json.dumps(older))
    read = read_scenes(tmp_path)
    assert read.natural == [] and len(read.items) == 8
    write(composer, language, tmp_path, limit=2)
    assert json.loads(path.read_text()) == content


def test_natural_questions_are_of_every_kind_and_case(composer: Composer, language: Language) -> None:
    items = compose(composer, language, limit=32).natural
    assert len({item.kind for item in items}) == 8  # no breeds without ImageNet's table
    assert {item.kind for item in items if not item.answers} == {"description"}
    shown = [item.question for item in items[8:16]], [item.question for item in items[24:32]]
    assert all(question[:1] == question[:1].upper() for question in shown[0])
    assert all(question == question.upper() for question in shown[1])
