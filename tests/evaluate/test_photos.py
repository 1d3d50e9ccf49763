"""Photographs with the nouns that name them: when a caption is right, which rows count, what the report says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import blip2
from blip2.calibration import FILE, Calibration
from blip2.cli import main
from blip2.data.sources import DataError
from blip2.evaluate import run
from blip2.evaluate.photos import names_one, noun_forms, photo_metrics, read_photos
from blip2.evaluate.report import lines, predictions, report_summary, write
from blip2.evaluate.run import EvalSettings, Report, evaluate
from blip2.evaluate.tasks import EvalItem

PLURALS = {
    "apple": "apples", "knife": "knives", "housewife": "housewives", "bookshelf": "bookshelves", "leaf": "leaves",
    "roof": "roofs", "cafe": "cafes", "tomato": "tomatoes", "photo": "photos", "zucchini": "zucchinis",
    "cherry": "cherries", "toy": "toys", "foot": "feet", "goose": "geese", "mouse": "mice", "policeman": "policemen",
    "human": "humans", "woman": "women", "child": "children", "person": "people", "dress": "dresses", "box": "boxes",
    "fox": "foxes", "peach": "peaches", "stomach": "stomachs", "brush": "brushes", "cactus": "cacti", "bus": "buses",
    "kiwi fruit": "kiwi fruits", "wine glass": "wine glasses", "glass of wine": "glasses of wine",
}  # fmt: skip


@pytest.mark.parametrize(("noun", "plural"), PLURALS.items())
def test_a_noun_counts_in_the_singular_and_the_plural(noun: str, plural: str) -> None:
    for name in (noun, plural, noun.upper()):
        assert names_one(f"a photo of one {noun}", (name,)), name
        assert names_one(f"Two {plural.capitalize()}.", (name,)), name


def test_forms_that_are_other_words() -> None:
    for noun, other in (("cafe", "caves"), ("dress", "dres"), ("s", ""), ("as", "a")):
        assert other not in noun_forms(noun)
    for name, caption in (
        ("shorts", "a short man"), ("trunks", "an elephant's trunk"), ("glasses", "a glass"),
        ("tights", "a tight rope"), ("news", "a new car"),
    ):  # fmt: skip
        assert not names_one(caption, (name,))
        assert names_one(f"a pair of {name}", (name,))


def test_only_whole_words_count() -> None:
    for caption, name in (
        ("a grape", "ape"), ("a pineapple", "apple"), ("pearls", "pear"), ("a pear-shaped vase", "pear"),
        ("a t-shirt", "shirt"), ("a catfish", "cat"), ("a hat_box", "hat"), ("", "cat"), ("a fruit", "kiwi fruit"),
    ):  # fmt: skip
        assert not names_one(caption, (name,))
    for caption, name in (
        ("cat", "cat"), ("a dog,cat", "cat"), ("the cat's bowl", "cat"), ("a T-shirt", "t-shirt"),
        ("two T shirts", "t-shirt"), ("a top hat", "hat"), ("green bell  peppers", "bell pepper"), ("a café", "Café"),
        ("a c++ book", "c++ book"), ("kiwi-fruit", "kiwi fruit"),
    ):  # fmt: skip
        assert names_one(caption, (name,))
    assert names_one("a fruit", ("apple", "fruit")) and not names_one("a pear", ("apple", "fruit"))


def save(folder: Path, rows: list[Any]) -> Path:
    (folder / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Path]) -> Path:
    """Four photographs: two of fruit, one of clothes, one in no folder."""
    for picture, name in zip(
        pictures, ("fruit/0.png", "fruit/1.png", "clothes/2.png", "3.png"), strict=False
    ):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(picture.read_bytes())
    rows = [
        {"image": "fruit/0.png", "names": ["apple", "fruit"]},
        {"image": "fruit/1.png", "names": ["pear"]},
        {"image": "clothes/2.png", "names": ["t-shirt", "shirt"]},
        {"image": "3.png", "names": ["apple"]},
    ]
    return save(tmp_path / "photos", rows)


def test_rows_and_those_that_cannot_be_used(folder: Path) -> None:
    good = [json.loads(line) for line in (folder / "photos.jsonl").read_text().splitlines()]
    bad = [
        7, [], None, {}, {"names": ["cat"]}, {"image": 3, "names": ["cat"]}, {"image": " ", "names": ["cat"]},
        {"image": "a.png"}, {"image": "a.png", "names": []}, {"image": "a.png", "names": [" ", ""]},
        {"image": "a.png", "names": "cat"}, {"image": "a.png", "names": ["cat", 3]},
        {"image": "a.png", "names": ["\ud83d"]},
    ]  # fmt: skip
    again = {"image": "./fruit/0.png", "names": ["fruit", "  red\tapple "]}
    task = read_photos(save(folder, [*bad, *good, again]))
    assert [item.id for item in task.items] == ["fruit/0.png", "fruit/1.png", "clothes/2.png", "3.png"]
    assert [item.kind for item in task.items] == ["fruit", "fruit", "clothes", ""]
    assert task.items[0].names == ("apple", "fruit", "red apple")
    assert task.items[0].image == folder / "fruit/0.png"
    assert [int(text.split()[1]) for text in task.left_out] == list(range(1, len(bad) + 1))
    assert "row 8 (a.png) has no list `names` of nouns, but None" in task.left_out
    assert "row 9 (a.png) has 0 names" in task.left_out
    assert read_photos(folder, images=Path("/elsewhere")).items[1].image == Path("/elsewhere/fruit/1.png")


def test_missing_data_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"name the folder with --data DIR"):
        read_photos(None)
    with pytest.raises(DataError, match=r"MISSING .*fruit/photos\.jsonl - a row a photograph"):
        read_photos(folder / "fruit")
    (folder / "photos.jsonl").write_text('{"image": \n')
    with pytest.raises(DataError, match=r"photos\.jsonl, line 1"):
        read_photos(folder)
    for rows, message in (
        ([], "the data hold nothing to score$"),
        ([{"image": "3.png"}], r"nothing to score; left out: 1 \(row 1 \(3\.png\) has no list"),
        ([{"image": "gone.png", "names": ["cat"]}], r"cannot be read, and no others: 1 .*gone\.png"),
    ):
        save(folder, rows)
        with pytest.raises(DataError, match=message):
            evaluate(lambda: pytest.fail("loaded"), "photos", folder, EvalSettings(), model_name="x")


def report_of(model: blip2.Predictor, folder: Path, **settings: Any) -> Report:
    (report,) = evaluate(lambda: model, "photos", folder, EvalSettings(**settings), model_name="x")
    return report


def test_the_report(folder: Path, generator_folder: Path, tmp_path: Path) -> None:
    model = blip2.load(generator_folder)
    texts = [
        str(text) for text in model.caption([folder / "fruit/0.png", folder / "3.png"], max_new_tokens=30)
    ]
    word = texts[0].split()[0]
    rows = [json.loads(line) for line in (folder / "photos.jsonl").read_text().splitlines()]
    report = report_of(model, save(folder, [rows[0] | {"names": ["apple", word]}, *rows[1:]]))
    assert [outcome.text for outcome in report.outcomes][::3] == texts
    right = [outcome.scores["named"] for outcome in report.outcomes]
    assert right == [float(names_one(o.text, o.item.names)) for o in report.outcomes] and right[0] == 1
    assert report.metrics["named rightly"] == sum(right) / 4
    assert report.metrics["  of which fruit/"] == sum(right[:2]) / 2
    assert report.metrics["  of which apple"] == (right[0] + right[3]) / 2
    assert not any("flagged" in name for name in report.metrics)
    results, _, page = write(report, tmp_path / "out")
    rows = json.loads(results.read_text())["outcomes"]
    assert [(row["id"], row["text"]) for row in rows] == [(o.item.id, o.text) for o in report.outcomes]
    assert rows[0]["names"] == ["apple", word] and rows[0]["image"].endswith("fruit/0.png")
    assert "<p class=reference>t-shirt</p>" in page.read_text()
    assert predictions(report)[0] == {"image_id": "fruit/0.png", "caption": texts[0]}
    assert report_of(model, folder, limit=1).metrics == {"named rightly": 1.0}


def test_damaged_and_missing_photographs_are_left_out(
    folder: Path, generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "fruit/1.png").write_bytes(b"none")
    (folder / "3.png").unlink()
    with (folder / "photos.jsonl").open("a") as file:
        file.write('{"image": "a.png"}\n')
    arguments = [
        "eval",
        "photos",
        "--data",
        str(folder),
        "--model",
        str(generator_folder),
        "--quiet",
        "--json",
    ]
    assert main(arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["items"], report["damaged"], report["left_out"]) == (2, 2, 1)
    assert "named rightly" in report["metrics"]
    assert main([*arguments[:3], str(folder), "--answers", __file__]) == 2
    assert main([*arguments[:-1], "--protocol", "paper"]) == 2
    assert "there is none for photos" in capsys.readouterr().err


def test_captions_that_a_calibrated_model_warns_of_are_flagged(
    folder: Path, generator_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(generator_folder, tmp_path / "model")
    for threshold, share in ((1.0, 1.0), (0.0, 0.0)):
        calibration = Calibration(0.0, 1.0, 0.0, 0.0, threshold, "this looks unlike what the model knows")
        (tmp_path / "model" / FILE).write_text(json.dumps(calibration.to_dict()))
        report = report_of(blip2.load(tmp_path / "model"), folder)
        assert report.metrics["flagged of wrong captions"] == share
        assert {outcome.scores["flagged"] for outcome in report.outcomes} == {share}


def test_shares_that_are_flagged(
    folder: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [EvalItem(i, "", names=("cat",), kind=kind) for i, kind in enumerate("aab")]
    metrics = photo_metrics(photos, [True, False, False], [True, True, False])
    assert metrics == {
        "named rightly": 1 / 3, "  of which a/": 1 / 2, "  of which b/": 0.0,
        "flagged of wrong captions": 1 / 2, "flagged of right captions": 1.0,
    }  # fmt: skip
    monkeypatch.setattr(run, "flagged", lambda caption: True)
    monkeypatch.setattr(run, "names_one", lambda caption, names: False)
    report = report_of(blip2.load(generator_folder), folder)
    assert report.metrics["flagged of wrong captions"] == 1
    assert report.metrics["flagged of right captions"] is None
    assert report.outcomes[0].scores == {"named": 0.0, "flagged": 1.0}
    assert "a share of no captions is not defined" in report_summary(report)["notes"]
    assert any("flagged of right captions" in line and "not defined" in line for line in lines(report))
