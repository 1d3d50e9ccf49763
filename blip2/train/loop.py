"""The only training loop: `fit` runs a task over a dataset and can be killed at any moment without loss.

Every random number of a step comes from (seed, step), and so does its batch. What a checkpoint holds beside weights
and optimizer is therefore only the step's number, and a continued run repeats the undisturbed one bit for bit on the
same device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from blip2.storage import lock_file
from blip2.train import plots, saves
from blip2.train.muon import Muon
from blip2.train.record import Record, TrainingError

Batch = Any  # what the dataset gives and the task takes: a dict of tensors, mostly
PLOT_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Dataset(Protocol):
    """Batches by position. A pure function: the same position always gives the same batch."""

    def __getitem__(self, position: int, /) -> Batch:
        """The batch at a position, 0 or more."""
        ...


class Task(ABC):
    """What is trained, and on what loss. Parameters are trained if they require a gradient."""

    module: nn.Module

    @abstractmethod
    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of a batch, scalars; "loss" is the one to lower, the others are shown beside it."""

    def train_mode(self) -> None:
        """Set train or eval mode on every part."""
        self.module.train()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups. A group may hold "lr_scale", by which its learning rate is multiplied, and "muon":
        True: its matrices are then trained by Muon (Jordan et al., 2024), all others by AdamW.
        """
        return decay_groups(self.module, weight_decay)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: weights decay, vectors (biases, norms) do not. As LAVIS does."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    weights = [p for name, p in trained if decays(name, p)]
    vectors = [p for name, p in trained if not decays(name, p)]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim >= 2 and "bias" not in name


@dataclass(frozen=True)
class FitOptions:
    """How a task is trained. Steps are optimizer steps, each over `accumulate` batches."""

    steps: int
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 0
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float | None = 1.0
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    workers: int = 0
    seed: int = 42
    log_every: int = 20
    save_every_s: float = 600.0
    save_every_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in {
            "steps": 1,
            "accumulate": 1,
            "log_every": 1,
            "workers": 0,
            "warmup_steps": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}, must be 'fp32' or 'bf16'")


# Options that decide which batch and which random numbers a step sees: a run cannot go on with others.
_FIXED = ("seed", "accumulate")
# Options that do not touch the result.
_FREE = ("device", "workers", "log_every", "save_every_s", "save_every_steps")


@dataclass(frozen=True)
class FitResult:
    """step: optimizer steps done in all; finished: False if a signal ended the run early; losses: the latest means."""

    step: int
    finished: bool
    losses: dict[str, float]


def learning_rate(step: int, options: FitOptions) -> float:
    """Rate of step 0, 1, ...: linear from `warmup_lr` to `lr`, then half a cosine down to `min_lr`."""
    if step < options.warmup_steps:
        return options.warmup_lr + (options.lr - options.warmup_lr) * step / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def fit(
    task: Task, dataset: Dataset, options: FitOptions, folder: str | Path, *, resume: bool = True
) -> FitResult:
    """Train until `options.steps`, going on from the latest checkpoint in `folder` if there is one.

    The folder receives log.csv, loss.png and the last two checkpoints. SIGINT and SIGTERM end the run after the step
    at hand, with a checkpoint; a second SIGINT ends it at once.

    Args:
        task: its module is moved to the device and holds the trained weights afterwards.
        dataset: batch i * accumulate + j is the j-th of step i. With workers it is copied to other processes.
        resume: False: refuse a folder that holds checkpoints already.

    Raises:
        ValueError: the folder's checkpoints do not fit the task or the options, or all of them are damaged.
        TrainingError: a loss that is not finite, a checkpoint that could not be written (a full disk), or a folder
            another process trains in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder), _StopOnSignal() as stop, _deterministic(options.device):
        run = _Run(task, options, folder)
        run.restore(resume)
        return run.train(dataset, stop)


class _Run:
    """One training run: its optimizer, its record, the steps it has done."""

    def __init__(self, task: Task, options: FitOptions, folder: Path) -> None:
        self.task, self.options, self.folder = task, options, folder
        self.device = torch.device(options.device)
        task.module.to(self.device)
        self.trained = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("the task trains nothing: no parameter of its module requires a gradient")
        self.optimizers = _optimizers(task.parameter_groups(options.weight_decay), options, self.device)
        self.step = 0
        self.record = Record(folder / "log.csv")
        self.plotted_at = time.monotonic()

    def train(self, dataset: Dataset, stop: _StopOnSignal) -> FitResult:
        options, record = self.options, self.record
        self.task.train_mode()
        record.start(self.step, options.steps)
        saved_at, saved_step = time.monotonic(), self.step
        with self._batches(dataset) as batches:
            while self.step < options.steps and not stop.asked:
                losses, rows = self._one_step(batches)
                self.step += 1
                record.add(losses, rows)
                if self.step % options.log_every == 0 or self.step == options.steps:
                    record.write(self.step, learning_rate(self.step - 1, options))
                due = time.monotonic() - saved_at >= options.save_every_s
                if due or (options.save_every_steps and self.step % options.save_every_steps == 0):
                    self.save()
                    saved_at, saved_step = time.monotonic(), self.step
        if saved_step != self.step:
            self.save()
        record.end()
        plots.draw(record.path, self.folder / "loss.png")
        return FitResult(self.step, self.step >= options.steps, dict(record.latest))

    @contextlib.contextmanager
    def _batches(self, dataset: Dataset) -> Iterator[Iterator[Batch]]:
        options = self.options
        loader: DataLoader[Batch] = DataLoader(
            dataset,  # type: ignore[arg-type]  # needs no base class
            batch_size=None,
            sampler=range(self.step * options.accumulate, options.steps * options.accumulate),
            num_workers=options.workers,
            worker_init_fn=_start_worker if options.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        try:
            yield batches
        finally:
            # An error's traceback keeps the iterator, and with it data processes that no signal ends, alive.
            if options.workers:
                batches._shutdown_workers()  # type: ignore[attr-defined]

    def _one_step(self, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], int]:
        """Forward, backward and update; the losses (means over the accumulated batches) and how many rows it saw."""
        options = self.options
        rate = learning_rate(self.step, options)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group.get("lr_scale", 1.0)
        generator = _seed_everything(options.seed, self.step, self.device)
        means: dict[str, Tensor] = {}
        rows = 0
        for _ in range(options.accumulate):
            batch = _to_device(next(batches), self.device)
            rows += _rows(batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                losses = self.task.losses(batch, generator)
            (losses["loss"] / options.accumulate).backward()
            for name, value in losses.items():
                part = value.detach().double() / options.accumulate
                means[name] = means[name] + part if name in means else part
        if options.clip_norm is not None:
            means["grad_norm"] = nn.utils.clip_grad_norm_(self.trained.values(), options.clip_norm).double()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return means, rows

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless the losses since the last row of the record are not finite."""
        self.record.check(self.step)
        tensors = {f"module.{name}": tensor for name, tensor in self._kept().items()}
        for name, parameter in self.trained.items():
            for key, value in self._optimizer_of(parameter).state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        notes = {"options": _plain(self.options), "record": self.record.state()}
        saves.save(self.folder, self.step, tensors, notes)
        if time.monotonic() - self.plotted_at >= PLOT_EVERY_S:
            plots.draw(self.record.path, self.folder / "loss.png")
            self.plotted_at = time.monotonic()

    def restore(self, resume: bool) -> None:
        """Take up the latest checkpoint, if there is one."""
        if not resume and saves.checkpoints(self.folder):
            raise ValueError(
                f"{self.folder} holds checkpoints already; choose another folder, or let the run resume"
            )
        checkpoint = saves.load_latest(self.folder)
        if checkpoint is None:
            self.record.restore(0, None)
            return
        self._check_options(checkpoint.notes["options"])
        kept = self._kept()
        saved = {
            n.removeprefix("module."): t for n, t in checkpoint.tensors.items() if n.startswith("module.")
        }
        shapes = {name: tuple(t.shape) for name, t in kept.items()}
        wrong = {
            name
            for name in shapes.keys() | saved.keys()
            if name not in saved or shapes.get(name) != saved[name].shape
        }
        if wrong:
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} in {self.folder} is of another model: "
                f"{', '.join(sorted(wrong)[:4])} ({len(wrong)} tensors in all) differ; train in another folder"
            )
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(saved[name])
            for full, value in checkpoint.tensors.items():
                if full.startswith("optimizer."):
                    name, key = full.removeprefix("optimizer.").rsplit(".", 1)
                    # cloned: memory of its own, aligned as the optimizer's own tensors are
                    state = self._optimizer_of(self.trained[name]).state
                    state[self.trained[name]][key] = value.to(self.device).clone()
        self.step = checkpoint.step
        self.record.restore(self.step, checkpoint.notes["record"])
        log.info("going on from step %d in %s", self.step, self.folder)

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self.optimizers
            if any(parameter is p for group in optimizer.param_groups for p in group["params"])
        )

    def _kept(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and buffers."""
        buffers = (
            self.task.module.state_dict(keep_vars=True).keys() & dict(self.task.module.named_buffers()).keys()
        )
        return dict(self.trained) | {name: self.task.module.get_buffer(name) for name in sorted(buffers)}

    def _check_options(self, saved: Mapping[str, Any]) -> None:
        now = _plain(self.options)
        changed = [name for name in now if name not in _FREE and saved.get(name) != now[name]]
        for name in changed:
            if name in _FIXED:
                raise ValueError(
                    f"the run in {self.folder} began with {name} {saved.get(name)}, now it is {now[name]}; "
                    "that would change which data follows. Keep it, or train in another folder"
                )
            log.warning("%s was %s, the run goes on with %s", name, saved.get(name), now[name])


# --- small parts -----------------------------------------------------------------------------------------------------


def _optimizers(
    groups: list[dict[str, Any]], options: FitOptions, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the groups that ask for it."""
    by_muon = [group for group in groups if group.get("muon")]
    others = [group for group in groups if not group.get("muon")]
    found: list[torch.optim.Optimizer] = []
    if others:
        fused = device.type in ("cpu", "cuda")
        found.append(torch.optim.AdamW(others, lr=options.lr, betas=options.betas, fused=fused))
    if by_muon:
        found.append(Muon(by_muon, lr=options.lr))
    return found


def _plain(options: FitOptions) -> dict[str, Any]:
    plain = dataclasses.asdict(options)
    return plain | {"betas": list(options.betas)}  # as JSON gives it back


def _seed_everything(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Set every source of randomness from (seed, step); the generator is for the task's own draws."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "little") >> 1
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)  # and every accelerator's
    return torch.Generator(device).manual_seed(mixed ^ 1)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _rows(batch: Batch) -> int:
    """Images in a batch, or rows of its first tensor."""
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        first = batch.get("pixels", tensors[0] if tensors else None)
        return 0 if first is None else len(first)
    return len(batch) if isinstance(batch, Tensor) else 0


def _start_worker(worker: int) -> None:
    """In a data process: leave the processors to training, and the signals to the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _StopOnSignal:
    """While open, SIGINT and SIGTERM set `asked` instead of ending the process."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {
                number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        print(f"\n{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends."""
    with open(folder / "lock", "a+") as file:
        if not lock_file(file, inherited=False):  # data processes may outlive this process by seconds
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise TrainingError(f"process {holder} trains in {folder}; wait for it, or use another folder")
        file.truncate(0)
        file.write(str(os.getpid()))
        with contextlib.suppress(OSError):  # only told to others; on a full disk it may be missing
            file.flush()
        yield


@contextlib.contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On CUDA choose algorithms that give the same bits every time; on the CPU they do anyway."""
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
