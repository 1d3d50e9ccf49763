"""A config.json that lies: every value of it, made something else, gives an error of ours or a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2.checkpoint import CheckpointError, convert, load_model, open_tensors
from blip2.modeling.config import ConfigError

LIES = (True, -1, 0, 7, 10**30, 1e30, float("nan"), float("inf"), "x", [], {}, [[1]], [1, "x"], {"a": None})


def places(settings: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every value, sections and what is within them."""
    for name, value in settings.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in places(value))


@pytest.mark.parametrize("to", ["hf", "paddle"])
@pytest.mark.parametrize("variant", ["opt", "t5", "matcher"])
def test_no_value_breaks_out(variant: str, to: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if to == "paddle":
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


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("Qformer.bert.encoder.layer.99999999999.output.bias", (3,), "layer '99999999999'"),
        ("Qformer.bert.encoder.layer." + "9" * 500 + ".output.bias", (3,), "has a layer"),
        ("visual_encoder.blocks.5000.norm1.bias", (88,), "layer '5000'"),
        ("visual_encoder.pos_embed", (1, 0, 88), "empty"),
        ("opt_proj.weight", (), "opt_proj|language_projection"),
        ("visual_encoder.blocks.0.attn.v_bias", (9,), "differ in length"),
        ("visual_encoder.blocks.0.attn.qkv.bias", (264,), "two names"),
    ],
)
def test_tensors_that_lie_about_sizes(
    name: str, shape: tuple[int, ...], message: str, variants: dict[str, Path], tmp_path: Path
) -> None:
    """Of a file without settings sizes are derived: none may take for ever, or end in another error than ours."""
    convert(variants["opt"], tmp_path / "lavis", to="lavis")
    (tmp_path / "lavis" / "config.json").unlink()
    file = tmp_path / "lavis" / "model.pth"
    with open_tensors(file) as tensors:
        state = {stored: tensors.copy(stored) for stored in tensors}
    torch.save({"model": state | {name: torch.zeros(shape)}}, file)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_model(file, language=variants["opt"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_settings_that_never_end(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variants["opt"], tmp_path / "model")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        load_model(folder)
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="JSON of 1,099,511,627,776 bytes"):
        load_model(folder)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 5000])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(CheckpointError, match="no valid path"):
        load_model(path)
