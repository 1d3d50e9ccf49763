"""Fits how likely a model's captions are right: `python -m default_model.calibrate DIR --model M`.

It writes M/calibration.json, and prints for each set of images which shares of wrong and right captions are flagged.
DIR holds the cut-outs that `default_model.materials` makes. Scenes of the test split are captioned, none of which an
evaluation has. `--photos` adds photographs, a folder as `blip2 eval photos` takes it, or one of the folders in it; on
these the threshold is chosen. `--measure` names photographs that decide nothing and are reported alone. Both may be
repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import blip2
from blip2.calibration import FILE, Calibration, features
from blip2.evaluate.photos import names_one, read_photos
from blip2.evaluate.tasks import EvalItem
from blip2.images import load_image
from blip2.predict import Predictor
from blip2.results import Caption
from blip2.storage import replace_file, write_file
from default_model.evaluation import counts_right
from default_model.materials import Cutouts
from default_model.scenes import Composer

SCENES = 6_000_000  # the numbers of its scenes begin here; those of `evaluation` end before
MOST_RIGHT_FLAGGED = 0.15  # of right captions that the threshold may flag
RIDGE = 1e-3  # keeps coefficients finite where right and wrong can be separated
BINS = 10  # of the expected calibration error
BATCH = 32
ADVICE = "this looks unlike what the default model knows; try --model opt-2.7b-coco"

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """A set of captions: their features [N, 3], as `blip2.calibration.features` gives them, and which are right [N]."""

    name: str
    features: Floats
    right: Flags

    @classmethod
    def of(cls, name: str, captions: Iterable[tuple[Caption, bool]]) -> Judged:
        """The set of captions that are known to be right or wrong. Raises ValueError where there are none."""
        rows = [(*features(caption.token_logprobs), right) for caption, right in captions]
        if not rows:
            raise ValueError(f"{name}: there are no captions to judge")
        table = np.array(rows, dtype=np.float64)
        return cls(name, table[:, :3], table[:, 3] > 0)


def scene_captions(model: Predictor, composer: Composer, count: int) -> Iterator[tuple[Caption, bool]]:
    """Captions of scenes; right if they name exactly the scene's things, each in its number."""
    scenes = (composer.compose(SCENES + i, "test") for i in range(count))
    while batch := list(islice(scenes, BATCH)):
        captions = model.caption([Image.fromarray(scene.image) for scene in batch], batch_size=BATCH)
        for caption, scene in zip(captions, batch, strict=True):
            yield caption, counts_right(caption, scene, composer.nouns)


def photo_captions(model: Predictor, items: Sequence[EvalItem]) -> Iterator[tuple[Caption, bool]]:
    """Captions of photographs; right if they hold one of the photograph's nouns."""
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        captions = model.caption([load_image(item.image) for item in batch], batch_size=BATCH)
        for caption, item in zip(captions, batch, strict=True):
            yield caption, names_one(caption, item.names)


def photos_in(folder: Path) -> list[EvalItem]:
    """The photographs of a folder that holds photos.jsonl, or those of one folder in it."""
    if (folder / "photos.jsonl").is_file():
        return read_photos(folder).items
    return [item for item in read_photos(folder.parent).items if item.kind == folder.name]


def fit(sets: Sequence[Judged]) -> tuple[float, float, float, float]:
    """The intercept and the three coefficients of a logistic regression, to which each set counts the same."""
    table = np.concatenate([one.features for one in sets])
    right = np.concatenate([one.right for one in sets]).astype(np.float64)
    weights = np.concatenate([np.full(len(one.right), 1 / len(one.right)) for one in sets]) / len(sets)
    middle = weights @ table
    scale = np.sqrt(weights @ (table - middle) ** 2)
    scale[scale == 0] = 1  # what is always the same tells nothing
    columns = np.column_stack([np.ones(len(table)), (table - middle) / scale])
    ridge = np.diag([0.0, RIDGE, RIDGE, RIDGE])
    found = np.zeros(4)
    for _ in range(100):  # Newton's method; a step is halved while it makes things worse
        expected = _sigmoid(columns @ found)
        gradient = columns.T @ (weights * (expected - right)) + ridge @ found
        curvature = (columns * (weights * expected * (1 - expected))[:, None]).T @ columns + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(4), gradient)
        while _loss(columns, right, weights, found - step) > _loss(columns, right, weights, found) + 1e-12:
            step /= 2
        found = found - step
        if np.abs(step).max() < 1e-9:
            break
    slopes = found[1:] / scale
    intercept, mean, lowest, length = (float(number) for number in (found[0] - slopes @ middle, *slopes))
    return intercept, mean, lowest, length


def _sigmoid(scores: Floats) -> Floats:
    return 0.5 + 0.5 * np.tanh(scores / 2)


def _loss(columns: Floats, right: Floats, weights: Floats, found: Floats) -> float:
    scores = columns @ found
    return float(weights @ (np.logaddexp(0, scores) - right * scores) + RIDGE / 2 * (found[1:] ** 2).sum())


def probabilities(fitted: tuple[float, float, float, float], table: Floats) -> Floats:
    """P(right) of captions with the features [N, 3]: [N]."""
    return _sigmoid(fitted[0] + table @ np.array(fitted[1:]))


def choose_threshold(probability: Floats, right: Flags) -> float:
    """The threshold that flags most wrong captions and fewest right ones, of which it flags 15 % at most."""
    values = np.unique(probability)
    best, threshold = 0.0, 0.0
    for candidate in (values[:-1] + values[1:]) / 2:
        flagged = probability < candidate
        of_right = float(flagged[right].mean()) if right.any() else 0.0
        gain = (float(flagged[~right].mean()) if not right.all() else 0.0) - of_right
        if of_right <= MOST_RIGHT_FLAGGED and gain > best:
            best, threshold = gain, float(candidate)
    return threshold


def calibration_error(probability: Floats, right: Flags) -> float:
    """The expected calibration error: how far P(right) is from the share of right captions, over equal bins of it."""
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    error = 0.0
    for number in np.unique(bins):
        inside = bins == number
        error += float(inside.mean()) * abs(float(right[inside].mean() - probability[inside].mean()))
    return error


def calibrate(scenes: Judged, photos: Sequence[Judged]) -> Calibration:
    """Fitted on all sets; the threshold is chosen on photographs, where there are any."""
    fitted = fit([scenes, *photos])
    chosen_on = list(photos) or [scenes]
    probability = np.concatenate([probabilities(fitted, one.features) for one in chosen_on])
    threshold = choose_threshold(probability, np.concatenate([one.right for one in chosen_on]))
    return Calibration(*(round(number, 6) for number in fitted), round(threshold, 6), ADVICE)


def report(calibration: Calibration, sets: Sequence[Judged]) -> Iterator[str]:
    """Lines of a table: for each set how many captions are right, which share of wrong and right ones is flagged, and
    the expected calibration error."""
    yield f"{'set':32} {'captions':>8} {'right':>7} {'flagged: wrong':>15} {'right':>7} {'ECE':>7}"
    numbers = calibration.intercept, calibration.mean, calibration.lowest, calibration.length
    for one in sets:
        probability = probabilities(numbers, one.features)
        flagged = probability < calibration.threshold
        shares = [
            f"{group.mean():.1%}" if len(group) else "-"
            for group in (flagged[~one.right], flagged[one.right])
        ]
        yield (
            f"{one.name[-32:]:32} {len(one.right):8,} {one.right.mean():7.1%} {shares[0]:>15} {shares[1]:>7} "
            f"{calibration_error(probability, one.right):7.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--model", type=Path, required=True, help="the model's folder, where the file is written"
    )
    parser.add_argument("--photos", type=Path, action="append", default=[], help="photographs to fit on too")
    parser.add_argument(
        "--measure", type=Path, action="append", default=[], help="photographs to report alone"
    )
    parser.add_argument("--scenes", type=int, default=2000, help="how many scenes (default: 2000)")
    arguments = parser.parse_args()
    composer = Composer(Cutouts.load(arguments.folder))
    sets = {folder: photos_in(folder) for folder in (*arguments.photos, *arguments.measure)}
    model = blip2.load(arguments.model)
    scenes = Judged.of("scenes", scene_captions(model, composer, arguments.scenes))
    judged = {folder: Judged.of(str(folder), photo_captions(model, items)) for folder, items in sets.items()}
    calibration = calibrate(scenes, [judged[folder] for folder in arguments.photos])
    for line in report(calibration, [scenes, *judged.values()]):
        print(line)
    path = arguments.model / FILE
    with replace_file(path) as beside:
        write_file(beside, calibration.to_dict())
    print(f"{path}: {calibration.to_dict()['caption']}")


if __name__ == "__main__":
    main()
