"""Every hostile file is refused with a reason, while the interpreter does nothing but read; sound files still load."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import watch
from safetensors.torch import save_file
from test_open import equal
from torch import Tensor

from blip2.checkpoint import open_tensors


@pytest.mark.parametrize(
    ("step", "least"), [(41, 150), pytest.param(1, 7000, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_hostile_files(step: int, least: int) -> None:
    done = subprocess.run([sys.executable, watch.__file__, str(step)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["events"] == {}
    assert result["cases"] == sum(result["refused"].values()) >= least
    assert result["gained_bytes"] <= 256 << 20
    assert result["slowest_s"] < 2, result["slowest"]


def test_the_watch_sees_what_it_watches_for() -> None:
    """The watcher itself: an import, a file opened for writing and a call of eval do not escape it."""
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "import hostile, watch\n"
        "def attack(path):\n"
        "    import colorsys\n"
        "    eval('1')\n"
        "    if path.name != 'model' or path.read_bytes() == b'attack':\n"
        "        open(path.parent / 'written', 'w').close()\n"
        "    return 1\n"
        "watch.read_all = attack\n"
        "watch.good_files = lambda: {}\n"
        "watch.cases = lambda: [hostile.Case('one', {'model': b'attack'}, ValueError)]\n"
        "watch.main(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(watch.__file__).parent
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["failures"] == ["one: opened"]
    seen = {event.split(" ")[0] for event in result["events"]}
    assert {"import", "compile", "exec", "open"} <= seen


DTYPES = [torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64]


def tables(seed: int) -> dict[str, Tensor]:
    """A random table of tensors."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for i in range(draw.randrange(1, 9)):
        shape = [draw.choice((0, 1, 2, 5, 40)) for _ in range(draw.randrange(4))]
        tables[f"layer.{i}"] = torch.randint(0, 2, shape, generator=generator).to(draw.choice(DTYPES))
    return tables


def test_fifty_sound_files_still_load(tmp_path: Path) -> None:
    files = 0
    for seed in range(60):
        theirs, path = tables(seed), tmp_path / str(seed)
        kind, wrap = seed % 6, seed % 4 == 0
        content = {"model": theirs, "epoch": seed} if wrap else theirs
        arrays = {name: tensor.numpy() for name, tensor in theirs.items()}
        if kind == 0:
            save_file(theirs, path)
        elif kind in (1, 2):
            torch.save(content, path, pickle_protocol=2 + seed % 4)
        elif kind == 3:
            torch.save(content, path, pickle_protocol=2 + seed % 4, _use_new_zipfile_serialization=False)
        else:
            names = {"StructuredToParameterName@@": {name: f"linear_{name}" for name in arrays}}
            content = {"model": arrays, "epoch": np.pi} if wrap else arrays | names
            path.write_bytes(pickle.dumps(content, 2 + seed % 3))
        with open_tensors(path) as ours:
            assert set(ours) == set(theirs), seed
            assert all(equal(ours[name], tensor) for name, tensor in theirs.items()), seed
            assert all(equal(ours.copy(name), tensor) for name, tensor in theirs.items()), seed
            files += 1
    assert files == 60


@pytest.mark.full
@pytest.mark.parametrize("reader", ["safetensors", "archive", "legacy", "paddle"])
def test_fuzzing_finds_nothing(reader: str, tmp_path: Path) -> None:
    command = [sys.executable, Path(watch.__file__).with_name("fuzz.py"), reader, "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["runs"] > 100
