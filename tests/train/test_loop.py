"""The loop: killed, damaged and concurrent runs, and the arithmetic of a step."""

import csv
import math
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip2.train import FitOptions, Task, TrainingError, checkpoints, fit, plots
from blip2.train.loop import learning_rate

FORK = multiprocessing.get_context("fork")  # a child begins at once, with torch loaded


class Noise:
    """Batches of noise; `delay_s` lengthens a step."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        time.sleep(self.delay_s)
        return {"pixels": torch.randn(8, 6, generator=torch.Generator().manual_seed(position))}


class Toy(Task):
    """Random in every way a task may be: dropout, its own draws, python's and torch's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 1))
        self.module[0].bias.requires_grad_(False)

    def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        x = batch["pixels"] + 0.1 * torch.randn(8, 6, generator=generator) + 0.01 * random.random()
        out = self.module(x)
        return {"loss": (out - x.sum(1, keepdim=True)).pow(2).mean(), "size": out.abs().mean()}


class ByMuon(Toy):
    """The same with two matrices trained by Muon."""

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        matrices = [p for p in self.module.parameters() if p.ndim == 2]
        others = [p for p in self.module.parameters() if p.ndim < 2 and p.requires_grad]
        return [{"params": matrices, "muon": True, "lr_scale": 2.0}, {"params": others, "weight_decay": 0.0}]


def options(steps: int = 24, **changes: Any) -> FitOptions:
    base = {"lr": 0.01, "log_every": 3, "save_every_steps": 2, "warmup_steps": 4, "accumulate": 2}
    return FitOptions(steps=steps, **(base | changes))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "draw", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """The uninterrupted run: the rows of its log and its weights."""
    folder, task = tmp_path_factory.mktemp("straight"), Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: None)
        assert fit(task, Noise(), options(), folder).finished
    return rows(folder), task.module.state_dict()


def same_as(straight: tuple[list[dict[str, str]], dict[str, Tensor]], folder: Path, task: Task) -> None:
    assert rows(folder) == straight[0]
    for name, tensor in task.module.state_dict().items():
        assert torch.equal(tensor, straight[1][name]), name


def start(folder: Path, delay_s: float = 0.0, steps: int = 24) -> Any:
    child = FORK.Process(target=lambda: fit(Toy(), Noise(delay_s), options(steps), folder))
    child.start()
    return child


def wait_until(happened: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


def test_the_loss_falls(straight: tuple[list[dict[str, str]], dict[str, Tensor]]) -> None:
    log = straight[0]
    assert [int(row["step"]) for row in log] == list(range(3, 25, 3))
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_killed_again_and_again(straight: Any, tmp_path: Path) -> None:
    moments = random.Random(5)
    kills = 0
    while True:
        before = checkpoints.list_checkpoints(tmp_path)
        child = start(tmp_path, delay_s=0.001)
        # However slow the machine, every run gets one checkpoint further, and then a little.
        wait_until(
            lambda old=before, process=child: (
                checkpoints.list_checkpoints(tmp_path) != old or process.exitcode is not None
            )
        )
        child.join(moments.uniform(0.0, 0.02))
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        assert kills < 200
    assert kills >= 2
    task = Toy()
    fit(task, Noise(), options(), tmp_path)  # nothing is left to do: it loads the last checkpoint
    same_as(straight, tmp_path, task)
    assert not list(tmp_path.glob("*.unfinished"))


def test_muon_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    straight, resumed = ByMuon(), ByMuon()
    assert fit(straight, Noise(), options(), tmp_path).finished
    checkpoints.list_checkpoints(tmp_path)[-1].unlink()  # as if the run had been killed before its end
    assert fit(resumed, Noise(), options(), tmp_path).finished
    for name, tensor in straight.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_data_processes_change_nothing(straight: Any, tmp_path: Path) -> None:
    task = Toy()
    fit(task, Noise(), options(workers=1), tmp_path)
    same_as(straight, tmp_path, task)


class Broken:
    """A dataset whose fourth batch cannot be read."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if position == 3:
            raise OSError("the disk is gone")
        return Noise()[position]


def test_an_error_in_a_data_process_ends_the_run(tmp_path: Path) -> None:
    child = FORK.Process(target=lambda: fit(Toy(), Broken(), options(workers=1), tmp_path))
    child.start()
    child.join(60)
    try:
        assert child.exitcode == 1, "the process of a failed run must end"
    finally:
        child.kill()


def test_sigterm_saves_and_ends(straight: Any, tmp_path: Path) -> None:
    def run() -> None:
        result = fit(Toy(), Noise(0.02), options(save_every_steps=None), tmp_path)
        os._exit(7 if not result.finished and checkpoints.list_checkpoints(tmp_path) else 1)

    child = FORK.Process(target=run)
    child.start()
    wait_until(lambda: (tmp_path / "log.csv").exists() and rows(tmp_path))
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 7
    task = Toy()
    assert fit(task, Noise(), options(), tmp_path).finished
    same_as(straight, tmp_path, task)


def test_a_damaged_checkpoint_is_set_aside(straight: Any, tmp_path: Path) -> None:
    child = start(tmp_path, steps=24)
    child.join(60)
    latest = checkpoints.list_checkpoints(tmp_path)[-1]
    content = bytearray(latest.read_bytes())
    content[-20] ^= 1
    latest.write_bytes(content)
    task = Toy()
    assert fit(task, Noise(), options(), tmp_path).finished
    same_as(straight, tmp_path, task)
    assert latest.with_suffix(".damaged").exists()


def test_truncated_checkpoints_all_damaged(tmp_path: Path) -> None:
    fit(Toy(), Noise(), options(4), tmp_path)
    for path in checkpoints.list_checkpoints(tmp_path):
        os.truncate(path, 100)
    with pytest.raises(ValueError, match="all 2 checkpoints"):
        fit(Toy(), Noise(), options(4), tmp_path)


def test_two_writers(tmp_path: Path) -> None:
    child = start(tmp_path, delay_s=0.05)
    deadline = time.monotonic() + 10
    while not (tmp_path / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with pytest.raises(TrainingError, match=f"process {child.pid} trains in"):
            fit(Toy(), Noise(), options(), tmp_path)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert fit(Toy(), Noise(), options(), tmp_path).finished  # the dead process locks nothing


def test_a_full_disk(straight: Any, tmp_path: Path) -> None:
    fit(Toy(), Noise(), options(save_every_steps=6), tmp_path / "a")
    fit(Toy(), Noise(), options(6), tmp_path / "b")
    size = checkpoints.list_checkpoints(tmp_path / "a")[-1].stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # writing fails half-way, as on a full disk
    try:
        with pytest.raises(TrainingError, match="make room and start the same command again"):
            fit(Toy(), Noise(), options(), tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.stem for p in checkpoints.list_checkpoints(tmp_path / "b")][-1] == "step-000000006"
    assert not list((tmp_path / "b").glob("*.unfinished"))
    assert fit(Toy(), Noise(), options(), tmp_path / "b").finished


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    class Broken(Toy):
        def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
            factor = 1.0 if float(batch["pixels"][0, 0]) < 1 else math.nan
            return {name: value * factor for name, value in super().losses(batch, generator).items()}

    with pytest.raises(TrainingError, match="loss became nan"):
        fit(Broken(), Noise(), options(200), tmp_path)
    checkpoint = checkpoints.load_latest(tmp_path)
    assert checkpoint is None or all(t.isfinite().all() for t in checkpoint.tensors.values())


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    fit(Toy(), Noise(), options(4), tmp_path)
    with pytest.raises(ValueError, match="began with seed 42"):
        fit(Toy(), Noise(), options(8, seed=1), tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints already"):
        fit(Toy(), Noise(), options(8), tmp_path, resume=False)
    other = Toy()
    other.module[3] = nn.Linear(64, 2)
    with pytest.raises(ValueError, match="of another model: 3"):
        fit(other, Noise(), options(8), tmp_path)
    assert fit(Toy(), Noise(), options(8, log_every=1), tmp_path).step == 8


@pytest.mark.parametrize("place", [0, 31, 63])
def test_what_is_not_trained_must_be_the_same(place: int, tmp_path: Path) -> None:
    """A checkpoint does not hold it: with another model the run would go on to something else."""
    fit(Toy(), Noise(), options(4), tmp_path)
    other = Toy()
    with torch.no_grad():
        other.module[0].bias[place] += 1e-6
    with pytest.raises(ValueError, match="began from another model: weights that it does not train differ"):
        fit(other, Noise(), options(8), tmp_path)
    other = Toy()
    with torch.no_grad():
        other.module[0].weight.zero_()  # trained: the checkpoint's counts
    assert fit(other, Noise(), options(8), tmp_path).step == 8


def test_checkpoints_hold_only_what_is_trained(tmp_path: Path) -> None:
    fit(Toy(), Noise(), options(2), tmp_path)
    checkpoint = checkpoints.load_latest(tmp_path)
    assert checkpoint is not None
    assert "module.0.weight" in checkpoint.tensors
    assert "module.1.running_mean" in checkpoint.tensors
    assert "module.0.bias" not in checkpoint.tensors  # frozen
    assert "optimizer.0.weight.exp_avg" in checkpoint.tensors


def test_accumulation_is_one_larger_batch(tmp_path: Path) -> None:
    class Linear(Task):
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.module = nn.Linear(6, 1)

        def losses(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
            return {"loss": self.module(batch["pixels"]).pow(2).mean()}

    class Pairs:
        def __getitem__(self, position: int) -> dict[str, Tensor]:
            return {"pixels": torch.cat([Noise()[2 * position + i]["pixels"] for i in (0, 1)])}

    halves, pairs = Linear(), Linear()
    fit(halves, Noise(), options(5), tmp_path / "a")
    fit(pairs, Pairs(), options(5, accumulate=1), tmp_path / "b")
    torch.testing.assert_close(halves.module.weight, pairs.module.weight)


def test_weight_decay_and_learning_rates() -> None:
    groups = Toy().parameter_groups(0.05)
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    assert [len(g["params"]) for g in groups] == [2, 3]
    plan = FitOptions(steps=100, lr=1e-3, min_lr=1e-5, warmup_steps=10, warmup_lr=1e-6)
    rates = [learning_rate(step, plan) for step in range(101)]
    assert rates[0] == 1e-6
    assert rates[5] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[10] == 1e-3
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[100] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_bf16_runs(tmp_path: Path) -> None:
    task = Toy()
    fit(task, Noise(), options(2, precision="bf16"), tmp_path)
    assert task.module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"accumulate": 0}, {"precision": "fp16"}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitOptions(**({"steps": 1} | wrong))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1])
@pytest.mark.parametrize(
    "name", ["steps", "lr", "min_lr", "warmup_lr", "weight_decay", "clip_norm", "save_every_s", "betas"]
)
def test_numbers_that_no_run_can_have(name: str, value: float) -> None:
    changed: Any = (0.9, value) if name == "betas" else value
    with pytest.raises(ValueError, match=f"^{name} is .*, must be [01] or more, and finite"):
        FitOptions(**{"steps": 3, name: changed})
