"""The evaluated scenes as files: read back they are those that were composed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from blip2.evaluate.scenes import read_scenes
from default_model.language import Language
from default_model.make_scenes import compose, write
from default_model.scenes import Composer


def test_files_hold_what_is_composed(composer: Composer, language: Language, tmp_path: Path) -> None:
    write(composer, language, tmp_path, limit=3)
    read, direct = read_scenes(tmp_path), compose(composer, language, limit=3)
    assert read.nouns == direct.nouns
    for name in ("singles", "multi", "questions", "retrieval"):
        files, composed = getattr(read, name), getattr(direct, name)
        assert len(files) == len(composed) == 3
        for one, other in zip(files, composed, strict=True):
            assert np.array_equal(np.asarray(Image.open(one.image)), np.asarray(other.image))
            for field in ("id", "captions", "question", "answers", "kind", "things"):
                assert getattr(one, field) == getattr(other, field)
    assert all(item.things for item in read.singles + read.multi)
    assert all(item.question and item.answers and item.kind for item in read.questions)
    assert len({item.captions for item in read.retrieval}) == 3
