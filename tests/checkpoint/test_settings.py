"""A config.json that lies: every value of it, made something else, gives an error of ours or a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blip2.checkpoint import CheckpointError, convert, load_model
from blip2.config import ConfigError

LIES = (True, -1, 0, 7, 10**30, 1e30, float("nan"), float("inf"), "x", [], {}, [[1]], [1, "x"], {"a": None})


def places(settings: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every value, sections and what is within them."""
    for name, value in settings.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in places(value))


@pytest.mark.parametrize("world", ["hf", "paddle"])
@pytest.mark.parametrize("variant", ["opt", "t5", "matcher"])
def test_no_value_breaks_out(variant: str, world: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if world == "paddle":
        convert(variants[variant], folder, to="paddle")
    else:
        shutil.copytree(variants[variant], folder)
    honest = json.loads((folder / "config.json").read_text())
    refused = 0
    for number, path in enumerate(places(honest)):
        for lie in LIES[number % 4 :: 4]:  # every lie many times, if not at every place
            settings = json.loads(json.dumps(honest))
            section = settings
            for name in path[:-1]:
                section = section[name]
            section[path[-1]] = lie
            (folder / "config.json").write_text(json.dumps(settings))
            try:
                load_model(folder)
            except (CheckpointError, ConfigError):
                refused += 1
            except Exception as error:
                raise AssertionError(f"{'.'.join(path)} = {lie!r}") from error
    assert refused > 20


@pytest.mark.parametrize("text", ["9" * 5000, '{"model_type": ' + "9" * 5000 + "}", "[" * 100_000, "\ud800"])
def test_no_json_breaks_out(text: str, variants: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(variants["opt"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "model")


def test_depths_are_bounded(variants: dict[str, Path], tmp_path: Path) -> None:
    """So many layers would take for ever to build."""
    folder = shutil.copytree(variants["opt"], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 100_000
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="100000 layers"):
        load_model(folder)
