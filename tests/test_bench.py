"""The benchmark runs what it says, on every side; its figures are never judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from blip2.bench import Bench, Contender, decode_bytes, operations, run_benchmark
from blip2.checkpoint import load_model, quantize_checkpoint
from blip2.cli import main
from blip2.modeling.blip2 import Blip2


def test_every_side_is_measured_on_the_same_files(
    generator_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
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
    reads = {ours.name: 5e9, theirs.name: 5e9}
    bench = Bench(
        (ours, theirs), 3, limits, figures, reads, {"load": 2e11, "prefill": 1e12}, {ours.name: 9e8}
    )
    lines = bench.lines()
    assert "(4.00x)" in lines[1] and "(2.00x)" in lines[2] and "1.00 GB (3.00x)" in lines[3]
    assert (
        "blip2 bf16: load 0.20 TOP at 200 GOP/s, 200% of bf16's limit; "
        "a greedy step reads 5.00 GB at 10.0 GB/s, 50% of what this machine reads; "
        "`blip2 doctor` predicts 90% of its peak" in lines
    )


def test_a_run_goes_on_where_its_record_ends(generator_folder: Path, tmp_path: Path) -> None:
    side, record = Contender("blip2", str(generator_folder), "fp32"), tmp_path / "figures.jsonl"
    kept = {"load": 7.0, "greedy step": 8.0}
    record.write_text(json.dumps([side.name, 0, kept]) + "\n")
    bench = run_benchmark((side,), rounds=1, batches=(1,), record=record)
    assert bench.figures == {side.name: kept}
    names = [json.loads(line)[0] for line in record.read_text().splitlines()]
    assert names == [side.name, "limits"] and bench.limits["read"] > 0
    record.write_text("figures\n")
    with pytest.raises(ValueError, match="holds no measurements"):
        run_benchmark((side,), rounds=1, batches=(1,), record=record)


def test_a_step_reads_what_an_image_takes(generator_folder: Path) -> None:
    counted = operations(Contender("blip2", str(generator_folder), "fp32"))
    vision = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 17 * 17 * 32  # a layer of conftest's encoder
    assert counted["encode"] == 2 * vision and counted["prefill"] > 0


def test_models_stored_in_several_precisions_are_measured_together(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = str(quantize_checkpoint(generator_folder, tmp_path / "small", "int8").folder)
    options = ["--rounds", "1", "--batches", "1"]
    assert main(["bench", str(generator_folder), small, *options]) == 0
    assert [*json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]] == ["blip2 fp32", "blip2 int8"]
    assert main(["bench", small, small, *options]) != 0
    assert "stored alike" in capsys.readouterr().err


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
        run_benchmark((Contender("blip2", str(tmp_path / "nothing"), "fp32"),), rounds=1, batches=(1,))
