"""A saved model is complete or absent, and comes back as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import blip2.checkpoint.save
from blip2.checkpoint import CheckpointError, load_model, load_processors, open_tensors, save_model
from blip2.images import ImageProcessor
from blip2.modeling.blip2 import Blip2, Blip2Matcher


def equal(first: Blip2 | Blip2Matcher, second: Blip2 | Blip2Matcher) -> bool:
    state = second.state_dict()
    return first.config == second.config and all(
        torch.equal(t, state[name]) for name, t in first.state_dict().items()
    )


@pytest.mark.parametrize("which", ["generator_folder", "matcher_folder"])
def test_a_model_comes_back_as_it_was(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(which)
    model = load_model(source)
    saved = save_model(model, tmp_path / "deep" / "new", tokenizer=source, image_processor=ImageProcessor(48))
    assert equal(model, load_model(saved))
    assert load_processors(saved)[0] == ImageProcessor(48)
    assert load_processors(saved)[1].encode("a cat") == load_processors(source)[1].encode("a cat")
    assert [path.name for path in saved.parent.iterdir()] == ["new"]
    with open_tensors(saved) as tensors, open_tensors(source) as before:
        assert set(tensors) == set(before)


def test_shards_hold_what_the_index_says(generator_folder: Path, tmp_path: Path) -> None:
    model = load_model(generator_folder)
    saved = save_model(model, tmp_path / "new", shard_bytes=20_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())  # the tied head once
    assert equal(model, load_model(saved))


def test_another_dtype(generator_folder: Path, tmp_path: Path) -> None:
    saved = save_model(load_model(generator_folder, dtype="fp32"), tmp_path / "new", dtype="bf16")
    assert {parameter.dtype for parameter in load_model(saved).parameters()} == {torch.bfloat16}
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_untied_head_is_stored(generator_folder: Path, tmp_path: Path) -> None:
    model = load_model(generator_folder)
    assert isinstance(model, Blip2)
    model.language.lm_head.weight = torch.nn.Parameter(model.language.lm_head.weight * 2)
    again = load_model(save_model(model, tmp_path / "new"))
    assert isinstance(again, Blip2)
    assert not again.config.language.tie_word_embeddings
    assert torch.equal(again.language.lm_head.weight, model.language.lm_head.weight)


def test_an_image_token_only_where_the_vocabulary_has_room(generator_folder: Path, tmp_path: Path) -> None:
    model = load_model(generator_folder)
    words = load_processors(generator_folder)[1]
    assert isinstance(model, Blip2)
    with_words = save_model(model, tmp_path / "a", tokenizer=generator_folder)
    assert json.loads((with_words / "config.json").read_text())["image_token_index"] == len(words)
    without = save_model(model, tmp_path / "b")
    assert load_model(without).config == model.config


# --- refused, and interrupted --------------------------------------------------------------------------------------


def test_nothing_is_overwritten(generator_folder: Path, tmp_path: Path) -> None:
    model = load_model(generator_folder)
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")
    (tmp_path / "file").touch()
    for path in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="exists already; save to a new folder"):
            save_model(model, path)


def test_a_changed_model_is_refused(generator_folder: Path, tmp_path: Path) -> None:
    model = load_model(generator_folder)
    assert isinstance(model, Blip2)
    model.projection = torch.nn.Linear(24, 32, bias=False)
    with pytest.raises(CheckpointError, match="quantized or changed"):
        save_model(model, tmp_path / "new")
    with pytest.raises(CheckpointError, match="holds no tokenizer files"):
        save_model(load_model(generator_folder), tmp_path / "new", tokenizer=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = load_model(generator_folder)
    monkeypatch.setattr(blip2.checkpoint.save, "write_files", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.; nothing was saved"):
        save_model(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_kill_leaves_all_or_nothing(generator_folder: Path, tmp_path: Path) -> None:
    program = f"""
from itertools import count
from blip2.checkpoint import load_model, save_model
model = load_model({str(generator_folder)!r})
for i in count():
    save_model(model, {str(tmp_path)!r} + f"/{{i}}", shard_bytes=20_000)
    print("saved", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"saved\n"  # one at least, however busy the machine
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    model = load_model(generator_folder)
    saved = [path for path in tmp_path.iterdir() if not path.name.endswith(".part")]
    assert saved
    assert all(equal(model, load_model(path)) for path in saved)
