"""The scenes the default model is evaluated on, as files: `python -m default_model.make_scenes DIR`.

DIR holds the cut-outs that `default_model.materials` makes. DIR/scenes gets images and scenes.json, which
`blip2 eval scenes --data DIR` reads.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.evaluate.scenes import SETS, Scenes, scene_item
from default_model import evaluation
from default_model.language import Language, standard
from default_model.materials import Cutouts
from default_model.qa import QA
from default_model.scenes import Composer, Scene


def compose(composer: Composer, language: Language, limit: int | None = None) -> Scenes:
    """The sets with their images in memory; with `limit` the first items of each alone."""
    sets = {
        name: [
            scene_item(f"{name}-{i}", Image.fromarray(scene.image), row)
            for i, (scene, row) in enumerate(rows)
        ]
        for name, rows in _rows(composer, language, limit).items()
    }
    return Scenes(_plurals(language), **sets)


def write(composer: Composer, language: Language, folder: Path, limit: int | None = None) -> None:
    """Write DIR/scenes; a complete folder, with every set of today, is left unchanged."""
    target = folder / "scenes/scenes.json"
    if target.is_file() and set(SETS) <= set(json.loads(target.read_text(encoding="utf-8"))):
        return
    (folder / "scenes/images").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"nouns": _plurals(language)}
    for name, rows in _rows(composer, language, limit).items():
        content[name] = []
        for i, (scene, row) in enumerate(rows):
            file = f"images/{name}-{i}.png"
            Image.fromarray(scene.image).save(folder / "scenes" / file)
            content[name].append({"image": file} | row)
    target.write_text(json.dumps(content), encoding="utf-8")


def _rows(
    composer: Composer, language: Language, limit: int | None
) -> dict[str, list[tuple[Scene, dict[str, Any]]]]:
    """The scenes of each set, with their rows of scenes.json except the image."""
    n, half = limit or 1000, limit or 500
    return {
        "singles": [(scene, _things(scene)) for scene in evaluation.stamp_singles(composer, min(n, 1000))],
        "multi": [
            (scene, _things(scene) | {"captions": language.reference_captions(scene)})
            for scene in evaluation.multi_scenes(composer, min(half, 500))
        ],
        "questions": [
            (scene, {"question": qa.question, "answer": qa.answer, "kind": qa.kind})
            for scene, qa in evaluation.unseen_questions(composer, min(n, 1000))
        ],
        "natural": [
            (scene, {"question": qa.question, "kind": qa.kind} | _right(scene, qa))
            for scene, qa in evaluation.natural_questions(composer, language, limit or 1080)
        ],
        "retrieval": [
            (scene, {"captions": [caption]})
            for scene, caption in evaluation.retrieval_pairs(composer, language, min(n, 1000))
        ],
    }


def _plurals(language: Language) -> dict[str, str]:
    return {noun: entry.plural for noun, entry in language.nouns.items()}


def _right(scene: Scene, qa: QA) -> dict[str, Any]:
    """The answer to a question; of a description, what it must name."""
    return _things(scene) if qa.kind == "description" else {"answer": qa.answer}


def _things(scene: Scene) -> dict[str, Any]:
    return {"things": dict(Counter(placed.noun for placed in scene.objects))}


def main() -> None:
    parser = argparse.ArgumentParser(description="write the scenes the default model is evaluated on")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(Composer(Cutouts.load(folder)), standard(), folder)
    print(f"{folder / 'scenes'}: ready for `blip2 eval scenes --data {folder}`")


if __name__ == "__main__":
    main()
