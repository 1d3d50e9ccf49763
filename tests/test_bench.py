"""The benchmark runs what it says, on every side; its figures are never judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from blip2.bench import Bench, Contender, decode_bytes, run
from blip2.checkpoint import load_model
from blip2.cli import main
from blip2.model import Blip2


def test_every_side_is_measured_on_the_same_files(
    generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(generator_folder), "--quantize", "int8", "--rounds", "1", "--batches", "1", "3"]
    assert main([*command, "--against", "transformers"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)["figures"]
    assert [*figures] == ["blip2 fp32", "blip2 int8", "transformers fp32"]
    for side in figures.values():
        assert side.keys() == figures["blip2 fp32"].keys()
        assert all(value > 0 for name, value in side.items() if "step" not in name)
        assert side["an image in a batch of 3"] > 0 and side["peak"] > 1e8
    assert any(line.startswith("caption of 10 tokens, 5 beams") and line.count("x)") == 2 for line in table)
    assert json.loads(last)["limits"].keys() == {"read", "fp32", "bf16", "int8"}


def test_ratios_are_the_peers_time_over_ours() -> None:
    ours, theirs = Contender("blip2", "a", "bf16"), Contender("transformers", "a", "bf16")
    figures = {
        ours.name: {"load": 1.0, "greedy step": 0.5, "peak": 1e9},
        theirs.name: {"load": 4.0, "greedy step": 1.0, "peak": 3e9},
    }
    limits = {"read": 20e9, "fp32": 1e11, "bf16": 1e11, "int8": 1e11}
    bench = Bench((ours, theirs), 3, limits, figures, {ours.name: 5e9, theirs.name: 5e9})
    lines = bench.lines()
    assert "(4.00x)" in lines[1] and "(2.00x)" in lines[2] and "1.00 GB (3.00x)" in lines[3]
    assert "blip2 bf16: a greedy step reads 5.00 GB at 10.0 GB/s, 50% of what this machine reads" in lines


@pytest.mark.parametrize("folder", ["generator_folder", "t5_folder"])
def test_a_step_reads_the_matrices_of_the_language_model(folder: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    model = load_model(path)
    assert isinstance(model, Blip2)
    values = 0
    for name, part in model.language.named_modules():
        # T5's encoder, and keys and values of what that gives, are read once for a picture
        once = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        if isinstance(part, nn.Linear) and not once:
            values += part.weight.numel()
    assert decode_bytes(Contender("blip2", str(path), "fp32")) / 4 == values


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blip2 fp32 failed: .*nothing"):
        run((Contender("blip2", str(tmp_path / "nothing"), "fp32"),), rounds=1, batches=(1,))
