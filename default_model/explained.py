"""Do explanations point at the object a word names? `python -m default_model.explained DIR`, DIR with the materials.

Scenes of two different objects from the test split. For each object that the model's own caption names, the peak of its
word's heat map over the picture must fall into the object's box. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import blip2
from blip2.explain import Explanation, spread
from blip2.predict import Predictor
from default_model import evaluation
from default_model.materials import Cutouts
from default_model.scenes import Composer, Noun, Placed, Scene

EXPLAINED = 7_000_000  # the first scene number; evaluation.py uses lower ones
GOAL = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="another model than the shipped one")
    parser.add_argument("--limit", type=int, default=200, help="number of scenes (default: 200)")
    arguments = parser.parse_args()
    composer = Composer(Cutouts.load(arguments.folder))
    counts = point(blip2.load(arguments.model), composer, arguments.limit)
    named = counts["named"]
    for name, goal in (("peak in the thing's box", f"   goal {GOAL:.0%}"), ("peak in the other's box", "")):
        print(f"{name:32} {counts[name] / max(1, named):6.1%}{goal}")
    print(f"{'a point by chance':32} {counts['box px'] / max(1, counts['px']):6.1%}")
    print(f"{'things the captions name':32} {named} of {counts['things']}")
    print(json.dumps(counts))


def two_things(composer: Composer, n: int) -> Iterator[Scene]:
    """The first n scenes of the test split that show two different objects."""
    number = EXPLAINED
    while n:
        number += 1
        scene = composer.compose(number, "test", objects=2)
        if len({placed.noun for placed in scene.objects}) == 2:
            n -= 1
            yield scene


def point(model: Predictor, composer: Composer, n: int) -> Counter[str]:
    """Count, over n scenes, the objects, those named, and where the peaks of their words fall."""
    counts: Counter[str] = Counter()
    for scene in tqdm(two_things(composer, n), total=n, desc="scenes", disable=None):
        counts["things"] += len(scene.objects)
        explanation = model.explain(Image.fromarray(scene.image))
        for thing, other in (scene.objects, scene.objects[::-1]):
            named = evaluation.names_object(
                explanation.text, thing.noun, composer.nouns
            )  # "teddy bear" is no bear
            places = words_for(explanation, composer.nouns[thing.noun]) if named else []
            if not places:
                continue
            x, y = peak(explanation, places)
            counts["named"] += 1
            counts["peak in the thing's box"] += inside(thing, x, y)
            counts["peak in the other's box"] += inside(other, x, y)
            counts["box px"] += (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1])
            counts["px"] += scene.side**2
    return counts


def words_for(explanation: Explanation, noun: Noun) -> list[int]:
    """The indices of the words that name an object, all three of "hot air balloon"; empty if none does."""
    words = [word.text.strip(".,") for word in explanation.words]
    text = " ".join(words)
    for form in sorted((noun.singular, noun.plural), key=len, reverse=True):
        if match := re.search(rf"(?<![\w-]){re.escape(form)}(?![\w-])", text):
            first = text[: match.start()].count(" ")
            return list(range(first, first + form.count(" ") + 1))
    return []


def peak(explanation: Explanation, places: list[int]) -> tuple[int, int]:
    """The point (x, y) of the picture with the highest heat for some words together."""
    heat = spread(
        np.mean([explanation.words[place].heat for place in places], axis=0), explanation.picture.size
    )
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    return int(x), int(y)


def inside(thing: Placed, x: int, y: int) -> bool:
    """Whether a point is in the object's box."""
    return thing.box[0] <= x < thing.box[2] and thing.box[1] <= y < thing.box[3]


if __name__ == "__main__":
    main()
