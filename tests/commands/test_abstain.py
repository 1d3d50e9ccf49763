"""Captions that may well be wrong, on the command line: one line says so, and --abstain leaves them out."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from running import Run

import blip2
from blip2.calibration import FILE, Calibration
from blip2.commands import terminal

WHAT = "unlike what this model knows"
CAPTIONS = 5  # one for each picture


@pytest.fixture(scope="module")
def probabilities(generator_folder: Path, pictures: list[Path], tmp_path_factory: Any) -> list[float]:
    """How likely the captions of the pictures are right, in the pictures' order; no two alike."""
    folder = tmp_path_factory.mktemp("for") / "probabilities"
    write_model(generator_folder, folder, 0.5)
    found = [caption.probability_right or 0.0 for caption in blip2.load(folder).caption(pictures)]
    assert len({round(probability, 3) for probability in found}) == CAPTIONS
    return found


def write_model(source: Path, folder: Path, threshold: float) -> Path:
    if not folder.exists():
        shutil.copytree(source, folder)
    calibration = Calibration(2.0, 0.5, 0.25, -0.05, threshold, f"this looks {WHAT}; try another")
    (folder / FILE).write_text(json.dumps(calibration.to_dict()))
    return folder


@pytest.fixture
def middle(probabilities: list[float]) -> float:
    """A probability that two of the five captions are below."""
    ordered = sorted(probabilities)
    return (ordered[1] + ordered[2]) / 2


@pytest.fixture
def model(generator_folder: Path, tmp_path: Path, middle: float) -> Path:
    """A model that flags two of the five pictures."""
    return write_model(generator_folder, tmp_path / "model", middle)


@pytest.fixture
def folder(tmp_path: Path, pictures: list[Path]) -> Path:
    (tmp_path / "in").mkdir()
    for picture in pictures:
        shutil.copy(picture, tmp_path / "in")
    return tmp_path / "in"


def test_one_line_a_run_says_how_many(run: Run, model: Path, pictures: list[Path]) -> None:
    plain = run("caption", *pictures, "--model", model, "--quiet")
    assert plain.status == 0 and len(plain.lines) == CAPTIONS
    assert plain.err == f"blip2: 2 of 5 images look {WHAT} (captions may be wrong); try another\n"


def test_of_one_image_nothing_is_counted(
    run: Run, model: Path, pictures: list[Path], probabilities: list[float]
) -> None:
    worst, best = (probabilities.index(choice(probabilities)) for choice in (min, max))
    assert run("caption", pictures[worst], "--model", model).err == f"blip2: this looks {WHAT}; try another\n"
    assert run("caption", pictures[best], "--model", model).err == ""


def test_answers_and_plain_models_are_not_judged(
    run: Run, model: Path, generator_folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "questions.txt").write_text("what is it?\n")
    for command in (
        ["ask", *pictures, "what is it?", "--model", model],
        ["caption", *pictures, "--questions", "questions.txt", "--model", model],
        ["caption", *pictures, "--model", generator_folder],
    ):
        done = run(*command, "--json")
        rows = [json.loads(line) for line in done.lines]
        assert done.status == 0 and done.err == "" and len(rows) == CAPTIONS
        assert not any("probability_right" in row for row in rows)


def test_json_has_the_probability_and_no_doubtful_caption(
    run: Run, model: Path, pictures: list[Path], probabilities: list[float], middle: float
) -> None:
    plain = [
        json.loads(line) for line in run("caption", *pictures, "--model", model, "--json", "--quiet").lines
    ]
    assert [row["probability_right"] for row in plain] == pytest.approx(probabilities, abs=1e-5)
    done = run("caption", *pictures, "--model", model, "--json", "--abstain", middle, "--quiet")
    rows = [json.loads(line) for line in done.lines]
    for row, before, probability in zip(rows, plain, probabilities, strict=True):
        if probability < middle:
            assert "caption" not in row and row["abstained"] is True
            assert row["probability_right"] == pytest.approx(probability, abs=1e-5)
        else:
            assert row == before
    assert done.status == 0
    assert done.err == (
        f"blip2: 2 of 5 images look {WHAT} (captions may be wrong); try another; "
        "2 captions left out by --abstain\n"
    )


def test_text_has_an_empty_cell(
    run: Run, model: Path, pictures: list[Path], probabilities: list[float], middle: float
) -> None:
    done = run("caption", *pictures, "--model", model, "--abstain", middle, "--score", "--quiet")
    cells = [line.split("\t") for line in done.lines]
    assert [bool(row[1]) for row in cells] == [probability >= middle for probability in probabilities]
    assert all(len(row) == 3 and float(row[2]) < 0 for row in cells)


def test_the_best_of_several_captions_counts(
    run: Run, model: Path, pictures: list[Path], middle: float
) -> None:
    several = ["caption", *pictures, "--model", model, "--num-captions", 3, "--json", "--quiet"]
    done = run(*several)
    best: dict[str, float] = {}
    for row in map(json.loads, done.lines):
        best[row["image"]] = max(row["probability_right"], best.get(row["image"], 0))
    flagged = sum(probability < middle for probability in best.values())
    assert 0 < flagged < CAPTIONS
    assert done.err.startswith(f"blip2: {flagged} of 5 images look ")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_form_of_output_has_a_row_without_a_caption(
    run: Run,
    model: Path,
    folder: Path,
    pictures: list[Path],
    probabilities: list[float],
    middle: float,
    tmp_path: Path,
) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    left_out = {f"in/{p.name}" for p, value in zip(pictures, probabilities, strict=True) if value < middle}
    outputs = ("x.jsonl", "x.csv", "x.parquet", "x.json", "x.tar", "texts")
    for out in outputs:
        done = run("caption", "in", "--model", model, "--abstain", middle, "--out", out, "--quiet")
        assert done.status == 0 and done.err.count("\n") == 1 and "2 captions left out" in done.err
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert {row["image"] for row in rows if "caption" not in row and row["abstained"] is True} == left_out
    assert all("abstained" not in row for row in rows if row["image"] not in left_out)
    assert all(0 < row["probability_right"] < 1 for row in rows)
    by_image = {row["image"]: row for row in rows}
    for row in read_csv(tmp_path / "x.csv"):
        assert (row["caption"] == "", row["abstained"]) == (
            (True, "true") if row["image"] in left_out else (False, "")
        )
        assert float(row["probability_right"]) == by_image[row["image"]]["probability_right"]
    for row in pq.read_table(tmp_path / "x.parquet").to_pylist():
        assert (row["caption"] is None, row["abstained"]) == (
            (True, True) if row["image"] in left_out else (False, None)
        )
        assert row["probability_right"] == by_image[row["image"]]["probability_right"]
    coco = json.loads((tmp_path / "x.json").read_text())
    assert {row["image_id"] for row in coco} == by_image.keys() - left_out
    for image in by_image:
        text = (tmp_path / "texts" / f"{Path(image).stem}.txt").read_text()
        assert text == ("\n" if image in left_out else by_image[image]["caption"] + "\n")
    with tarfile.open(tmp_path / "x-000000.tar") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    records = [json.loads(files[name]) for name in files if name.endswith(".json")]
    assert {record["image"] for record in records if "abstained" in record["texts"][0]} == left_out
    assert sum(files[name] == b"" for name in files if name.endswith(".txt")) == len(left_out)


@pytest.mark.parametrize("out", ["x.jsonl", "x.csv", "texts"])
def test_what_was_left_out_is_done(
    run: Run, model: Path, folder: Path, middle: float, tmp_path: Path, out: str
) -> None:
    command = ["caption", "in", "--model", model, "--abstain", middle, "--out", out]
    assert "5 captioned, 0 failed" in run(*command).err
    again = run(*command)
    assert "0 captioned, 0 failed, 0 left alone; 5 inputs were known before" in again.err
    assert "written again" not in again.err and "images look" not in again.err
    for changed in (["--abstain", middle / 2], []):
        other = run(*command[:4], *changed, *command[6:])
        assert other.status == 2 and f"abstain was {middle}, now" in other.err


def test_a_new_calibration_is_another_setting(run: Run, model: Path, folder: Path) -> None:
    command = ["caption", "in", "--model", model, "--out", "x.jsonl"]
    assert run(*command).status == 0
    write_model(model, model, 0.125)
    assert "calibration was {'caption'" in run(*command).err


def test_a_caption_that_the_user_writes_instead_stays(
    run: Run, model: Path, folder: Path, pictures: list[Path], middle: float, tmp_path: Path
) -> None:
    command = ["caption", "in", "--model", model, "--abstain", middle, "--out", "x.csv"]
    run(*command, "--limit", 4)
    rows = read_csv(tmp_path / "x.csv")
    text = (tmp_path / "x.csv").read_text().replace(",true", ",TRUE")  # as spreadsheets save it
    (row,) = [row for row in rows if row["abstained"]][:1]
    text = text.replace(f"{row['image']},,,,", f"{row['image']},,a red cat,,")
    (tmp_path / "x.csv").write_text(text)
    done = run(*command)
    assert "1 left alone (1 edited)" in done.err
    after = {row["image"]: row for row in read_csv(tmp_path / "x.csv")}
    assert len(after) == CAPTIONS and after[row["image"]]["caption"] == "a red cat"


def test_text_of_the_user_gets_nothing_added(
    run: Run, model: Path, folder: Path, pictures: list[Path], probabilities: list[float], middle: float
) -> None:
    worst = pictures[probabilities.index(min(probabilities))]
    (folder / worst.name).with_suffix(".txt").write_text("mine\n")
    command = ["caption", "in", "--model", model, "--abstain", middle, "--out", "in", "--existing", "append"]
    assert run(*command).status == 0
    assert (folder / worst.name).with_suffix(".txt").read_text() == "mine\n"


def test_tables_of_plain_models_have_the_columns_they_had(
    run: Run, generator_folder: Path, folder: Path, tmp_path: Path
) -> None:
    assert run("caption", "in", "--model", generator_folder, "--out", "x.csv").status == 0
    header = (tmp_path / "x.csv").read_text().splitlines()[0]
    assert header == "image,question,caption,answer,score,logprob,match,hash,error"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--abstain", "1.5"], "--abstain must be a number from 0 to 1; got 1.5"),
        (["--abstain", "nan"], "--abstain must be a number from 0 to 1; got nan"),
        (["--abstain", "-0.1"], "--abstain must be a number from 0 to 1"),
        (["--abstain", "0.5", "--stream"], "leave out --abstain"),
        (["--abstain", "0.5", "--questions", "q.txt"], "leave it out with --questions"),
    ],
)
def test_an_abstention_that_cannot_be_is_refused(
    run: Run, model: Path, pictures: list[Path], options: list[str], message: str
) -> None:
    done = run("caption", pictures[0], "--model", model, *options)
    assert done.status == 2 and message in done.err


def test_a_model_that_is_not_calibrated_is_refused_before_it_is_loaded(
    run: Run, generator_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal.blip2, "load", lambda *_, **__: pytest.fail("it was loaded"))
    done = run("caption", pictures[0], "--model", generator_folder, "--abstain", 0.5)
    assert done.status == 2
    assert f"{generator_folder} has no calibration.json" in done.err and "leave it out" in done.err
