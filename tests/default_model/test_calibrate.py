"""Calibrating a model: the fit finds the numbers behind the data, the threshold keeps its bound."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import blip2
from blip2.calibration import FILE, Calibration
from blip2.results import Caption
from default_model import calibrate
from default_model.calibrate import Judged, calibration_error, choose_threshold, fit, probabilities, report
from default_model.materials import Cutouts
from default_model.scenes import Composer

TRUE = (2.0, 1.5, 0.5, -0.25)


def drawn(count: int, seed: int, fitted: tuple[float, float, float, float] = TRUE) -> Judged:
    """Captions that are right with the probability that the numbers give."""
    random = np.random.default_rng(seed)
    mean = -random.gamma(1.0, 0.6, count)
    table = np.column_stack([mean, mean - random.gamma(2.0, 1.0, count), random.integers(3, 15, count)])
    return Judged(f"set {seed}", table, random.random(count) < probabilities(fitted, table))


def test_the_fit_finds_the_numbers_again() -> None:
    assert fit([drawn(40_000, 1)]) == pytest.approx(TRUE, abs=0.1)


def test_it_is_the_probability_that_the_package_computes() -> None:
    one = Calibration(*TRUE, threshold=0.5, advice="this looks odd")
    logprobs = [-0.5, -2.0, -0.25]
    judged = Judged.of("one", [(Caption("a", token_logprobs=logprobs), True)])
    assert probabilities(TRUE, judged.features)[0] == pytest.approx(one.probability_right(logprobs))
    assert judged.right.tolist() == [True]


def test_each_set_counts_the_same() -> None:
    large, small = drawn(20_000, 2), drawn(500, 3, (-2.0, 1.5, 0.5, -0.25))
    copies = Judged("copies", np.tile(small.features, (40, 1)), np.tile(small.right, 40))
    assert fit([large, small]) == pytest.approx(fit([large, copies]), abs=1e-6)


def test_what_can_be_separated_stays_finite() -> None:
    table = np.column_stack([np.linspace(-5, 0, 50), np.linspace(-9, 0, 50), np.full(50, 4.0)])
    fitted = fit([Judged("separable", table, table[:, 0] > -2)])
    assert np.isfinite(fitted).all() and max(map(abs, fitted)) < 1e4
    probability = probabilities(fitted, table)
    assert ((probability > 0.5) == (table[:, 0] > -2)).all()
    all_right = fit([Judged("right", table, np.ones(50, dtype=bool))])
    assert (probabilities(all_right, table) > 0.99).all()


def test_the_threshold_flags_few_right_captions() -> None:
    judged = drawn(5_000, 4)
    probability = probabilities(TRUE, judged.features)
    threshold = choose_threshold(probability, judged.right)
    flagged = probability < threshold
    assert 0.05 < flagged[judged.right].mean() <= calibrate.MOST_RIGHT_FLAGGED
    assert flagged[~judged.right].mean() > 2 * flagged[judged.right].mean()
    clear = np.array([0.1, 0.2, 0.8, 0.9])
    assert choose_threshold(clear, clear > 0.5) == 0.5
    assert choose_threshold(clear, np.ones(4, dtype=bool)) == 0.0, "nothing is wrong: nothing is flagged"
    assert choose_threshold(1 - clear, clear > 0.5) == 0.0, "the right ones would go first"


def test_the_calibration_error_is_that_of_bins() -> None:
    probability = np.array([0.05, 0.05, 0.95, 0.95])
    assert calibration_error(probability, np.array([False, False, True, True])) == pytest.approx(0.05)
    assert calibration_error(probability, np.array([True, True, True, False])) == pytest.approx(
        0.5 * 0.95 + 0.5 * 0.45
    )
    assert calibration_error(np.array([1.0]), np.array([True])) == 0


def test_the_threshold_is_chosen_on_photographs_and_all_is_reported() -> None:
    scenes, photos, others = drawn(2_000, 5), drawn(400, 6, (0.0, 1.5, 0.5, -0.25)), drawn(300, 7)
    found = calibrate.calibrate(scenes, [photos])
    numbers = found.intercept, found.mean, found.lowest, found.length
    assert numbers == pytest.approx(fit([scenes, photos]), abs=1e-5)
    probability = probabilities(numbers, photos.features)
    assert found.threshold == pytest.approx(choose_threshold(probability, photos.right), abs=1e-5)
    head, *lines = report(found, [scenes, photos, others])
    assert len(lines) == 3 and "ECE" in head
    flagged = probability < found.threshold
    assert lines[1].split()[-4:] == [
        f"{photos.right.mean():.1%}",
        f"{flagged[~photos.right].mean():.1%}",
        f"{flagged[photos.right].mean():.1%}",
        f"{calibration_error(probability, photos.right):.3f}",
    ]


def test_a_set_without_captions_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty: there are no captions"):
        Judged.of("empty", [])


def test_the_command_writes_what_the_model_then_has(
    generator_folder: Path,
    pictures: list[Path],
    cutouts: Cutouts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(generator_folder, tmp_path / "model")
    photos = tmp_path / "photos"
    for number, folder in ((3, "fruit"), (2, "people")):
        (photos / folder).mkdir(parents=True)
        for picture in pictures[:number]:
            shutil.copy(picture, photos / folder)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*"))
    rows = [{"image": name, "names": ["cat"]} for name in names]
    (photos / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(calibrate.Cutouts, "load", lambda _: cutouts)
    options = ["--photos", photos / "fruit", "--measure", photos / "people", "--scenes", 5]
    arguments = ["calibrate", tmp_path, "--model", tmp_path / "model", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    calibrate.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5] for line in lines[1:4]] == ["5", "3", "2"]
    written = Calibration.load(tmp_path / "model")
    assert written is not None and json.loads((tmp_path / "model" / FILE).read_text()) == written.to_dict()
    caption = blip2.load(tmp_path / "model").caption(pictures[0])
    assert caption.probability_right == written.probability_right(caption.token_logprobs)


def test_scenes_are_right_where_exactly_their_things_are_named(
    composer: Composer, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blip2.load(generator_folder)
    scenes = [composer.compose(calibrate.SCENES + i, "test") for i in range(3)]
    texts = [" and ".join(f"a {thing.noun}" for thing in scene.objects) for scene in scenes]
    texts[1] = "a red cat"
    written = [Caption(text, token_logprobs=[-1.0]) for text in texts]
    monkeypatch.setattr(model, "caption", lambda images, **_: written[: len(images)])
    found = [right for _, right in calibrate.scene_captions(model, composer, 3)]
    counts = [len({thing.noun for thing in scene.objects}) == len(scene.objects) for scene in scenes]
    assert found == [counts[0], False, counts[2]] and any(found)
