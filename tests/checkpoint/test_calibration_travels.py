"""A model's calibration goes where its weights go, and nowhere where it would not hold."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from blip2.calibration import FILE, Calibration
from blip2.checkpoint import CheckpointError, convert, load_model, quantize_checkpoint, save_model
from blip2.checkpoint.hub import HUB_FILES

GIVEN = Calibration(1.0, 0.5, 0.25, -0.5, 0.5, "this looks unlike what the model knows")


@pytest.fixture
def source(generator_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(generator_folder, tmp_path / "source")
    (tmp_path / "source" / FILE).write_text(json.dumps(GIVEN.to_dict()))
    return tmp_path / "source"


def test_it_is_converted_and_quantized_along(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "hf", to="hf", dtype="bf16")
    quantize_checkpoint(source, tmp_path / "int8", "int8")
    for name in ("hf", "int8"):
        assert Calibration.load(tmp_path / name) == GIVEN


@pytest.mark.parametrize("to", ["paddle", "lavis"])
def test_layouts_that_cannot_hold_it_are_written_without(
    source: Path, tmp_path: Path, to: str, caplog: pytest.LogCaptureFixture
) -> None:
    convert(source, tmp_path / to, to=to)  # type: ignore[arg-type]
    assert not (tmp_path / to / FILE).exists()
    (record,) = caplog.records
    assert record.getMessage() == f"{source / FILE} is left out: {to}'s layout has no place for it"


def test_a_broken_one_is_not_passed_on(source: Path, tmp_path: Path) -> None:
    (source / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="caption must be an object"):
        convert(source, tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_it_is_saved_where_it_is_given_alone(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(source)
    save_model(model, tmp_path / "same", tokenizer=source, calibration=GIVEN)
    assert Calibration.load(tmp_path / "same") == GIVEN and not caplog.records
    save_model(model, tmp_path / "trained", tokenizer=source)
    assert Calibration.load(tmp_path / "trained") is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{source / FILE} is left out: it does not hold for weights")


def test_nothing_is_said_where_there_is_none(
    generator_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(load_model(generator_folder), tmp_path / "saved", tokenizer=generator_folder)
    convert(generator_folder, tmp_path / "paddle", to="paddle")
    assert not caplog.records


def test_it_is_fetched_from_the_hub() -> None:
    assert FILE in HUB_FILES
