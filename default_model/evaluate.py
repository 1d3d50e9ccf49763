"""The default model's scores on unseen scenes: `python -m default_model.evaluate DIR`, DIR with the materials.

`blip2 eval default --data DIR` gives the same figures from files; here scenes are composed when needed. Prints a table
with the goals; the last line is one JSON object. `--model` and `--matcher` name folders other than the shipped ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import blip2
from blip2.evaluate.report import figure
from blip2.evaluate.run import EvalSettings, Metrics, scenes_report, task_report
from blip2.evaluate.tasks import read_task
from blip2.predict import Predictor
from default_model.language import Language, standard
from default_model.make_scenes import compose
from default_model.materials import Cutouts
from default_model.scenes import Composer

GOALS = {
    "easy-VQA test, exact match": 0.99,
    "one stamp on an unseen background, named": 0.92,
    "scenes of 2-4 objects, every object named": 0.85,
    "unseen questions, exact match": 0.90,
    "questions, natural wordings": 0.90,
    "answers that change with letter case": 0.01,
    "text retrieval among 1,000, R@1": 0.85,
    "image retrieval among 1,000, R@1": 0.85,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--matcher", type=Path)
    parser.add_argument("--quantize", choices=("int8", "int4"), help="with quantized weights")
    parser.add_argument("--limit", type=int, help="items of each set, for a quick look")
    arguments = parser.parse_args()
    model = blip2.load(arguments.model, matcher=arguments.matcher, quantize=arguments.quantize)
    composer = Composer(Cutouts.load(arguments.folder))
    scores = evaluate(model, composer, standard(), arguments.folder, arguments.limit)
    for name, score in scores.items():
        goal = f"goal {GOALS[name]:.0%}" if name in GOALS else ""
        print(f"{name:48} {figure(name, score):>8}   {goal}")
    print(json.dumps({name: score and round(score, 4) for name, score in scores.items()}))


def evaluate(
    model: Predictor, composer: Composer, language: Language, folder: Path, limit: int | None = None
) -> Metrics:
    """Every figure of the table, 0..1; with `limit`, on the first items of each set alone."""
    bars: dict[str, tqdm[None]] = {}

    def progress(label: str, done: int, total: int) -> None:
        if label not in bars:
            bars[label] = tqdm(desc=label, total=total, disable=None)
        bars[label].update(done - bars[label].n)

    settings = EvalSettings(limit=limit, progress=progress)
    shapes = task_report(model, read_task("easyvqa", folder).first(limit), settings, model_name="default")
    scenes = scenes_report(model, compose(composer, language, limit), settings, model_name="default")
    for bar in bars.values():
        bar.close()
    return {"easy-VQA test, exact match": shapes.metrics["accuracy"]} | scenes.metrics


if __name__ == "__main__":
    main()
