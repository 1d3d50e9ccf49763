"""The only training loop: `fit` runs a task over a dataset and can be killed at any moment without loss.

Every random number of a step comes from (seed, step), and so does its batch. Beside weights and optimizer a checkpoint
therefore needs only the step's number, and a resumed run repeats the uninterrupted one bit for bit on the same device.
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
from blip2.tensorfiles.scan import digest_tensors
from blip2.train import checkpoints, plots
from blip2.train.metrics import TrainingError, TrainingLog
from blip2.train.muon import Muon

Batch = Any  # what the dataset returns and the task takes: mostly a dict of tensors
PLOT_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Dataset(Protocol):
    """Batches by position, as a pure function: the same position always gives the same batch."""

    def __getitem__(self, position: int, /) -> Batch:
        """The batch at a position, 0 or more."""
        ...


class Task(ABC):
    """What is trained, and on what loss. Parameters are trained if they require a gradient."""

    module: nn.Module

    @abstractmethod
    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of a batch, scalars; "loss" is minimized, the others are shown beside it."""

    def train_mode(self) -> None:
        """Set train or eval mode on every part."""
        self.module.train()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups. A group may hold "lr_scale", by which its learning rate is multiplied, and "muon":
        True: its matrices are then trained by Muon (Jordan et al., 2024), all others by AdamW.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(weight_decay if decays(name, parameter) else 0.0, []).append(parameter)
        return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: to weights, not to vectors (biases, norms), as in LAVIS."""
    return parameter.ndim >= 2 and "bias" not in name


_LEAST = {"steps": 1, "accumulate": 1, "log_every": 1, "workers": 0, "warmup_steps": 0, "lr": 0, "min_lr": 0}
_LEAST |= {
    "warmup_lr": 0,
    "weight_decay": 0,
    "betas": 0,
    "clip_norm": 0,
    "save_every_s": 0,
    "save_every_steps": 1,
}


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
        for name, least in _LEAST.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not least <= value < math.inf:
                    raise ValueError(f"{name} is {values}, must be {least} or more, and finite")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}, must be 'fp32' or 'bf16'")


# Options that decide which batch and which random numbers a step gets: a run cannot be resumed with others.
_FIXED = ("seed", "accumulate")
# Options that do not change the result.
_FREE = ("device", "workers", "log_every", "save_every_s", "save_every_steps")


@dataclass(frozen=True)
class FitResult:
    """step: optimizer steps done in all; finished: False if a signal ended the run early; losses: the latest means;
    damaged: the images that could not be read and were passed over, by their names."""

    step: int
    finished: bool
    losses: dict[str, float]
    damaged: tuple[str, ...] = ()


def learning_rate(step: int, options: FitOptions) -> float:
    """Rate of step 0, 1, ...: linear from `warmup_lr` to `lr`, then half a cosine down to `min_lr`."""
    if step < options.warmup_steps:
        return options.warmup_lr + (options.lr - options.warmup_lr) * step / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def fit(
    task: Task, dataset: Dataset, options: FitOptions, folder: str | Path, *, resume: bool = True
) -> FitResult:
    """Train until `options.steps`, resuming from the latest checkpoint in `folder` if there is one.

    The folder receives log.csv, loss.png and the last two checkpoints. SIGINT and SIGTERM end the run after the
    current step, with a checkpoint; a second SIGINT ends it at once.

    Args:
        task: its module is moved to the device and holds the trained weights afterwards.
        dataset: batch i * accumulate + j is the j-th of step i. With workers it is copied to other processes. Under
            "damaged" a batch may name images that could not be read: they are counted, and reported at the end.
        resume: False: refuse a folder that already holds checkpoints.

    Raises:
        ValueError: the folder's checkpoints do not fit the task or the options, or all of them are damaged.
        TrainingError: a loss that is not finite, a checkpoint that could not be written (a full disk), or a folder
            another process trains in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder), _stop_on_signal() as stop, _deterministic(options.device):
        run = _Run(task, options, folder)
        run.restore(resume)
        return run.train(dataset, stop)


class _Run:
    """One training run: its optimizers, its log, the steps done."""

    def __init__(self, task: Task, options: FitOptions, folder: Path) -> None:
        self.task, self.options, self.folder = task, options, folder
        self.device = torch.device(options.device)
        task.module.to(self.device)
        parameters = dict(task.module.named_parameters())
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        # of what training leaves as it is: a checkpoint does not hold it
        self.frozen = digest_tensors((n, p) for n, p in parameters.items() if n not in self.trained)
        if not self.trained:
            raise ValueError("the task trains nothing: no parameter of its module requires a gradient")
        self.optimizers = _optimizers(task.parameter_groups(options.weight_decay), options, self.device)
        self.step = 0
        self.training_log = TrainingLog(folder / "log.csv")
        self.plotted_at = time.monotonic()

    def train(self, dataset: Dataset, stop: threading.Event) -> FitResult:
        options, training_log = self.options, self.training_log
        self.task.train_mode()
        training_log.start(self.step, options.steps)
        saved_at, saved_step = time.monotonic(), self.step
        with self._batches(dataset) as batches:
            while self.step < options.steps and not stop.is_set():
                losses, rows = self._one_step(batches)
                self.step += 1
                training_log.add(losses, rows)
                if self.step % options.log_every == 0 or self.step == options.steps:
                    training_log.write(self.step, learning_rate(self.step - 1, options))
                due = time.monotonic() - saved_at >= options.save_every_s
                if due or (options.save_every_steps and self.step % options.save_every_steps == 0):
                    self.save()
                    saved_at, saved_step = time.monotonic(), self.step
        if saved_step != self.step:
            self.save()
        training_log.end()
        plots.draw(training_log.path, self.folder / "loss.png")
        finished, damaged = self.step >= options.steps, tuple(sorted(training_log.damaged))
        return FitResult(self.step, finished, dict(training_log.latest), damaged)

    @contextlib.contextmanager
    def _batches(self, dataset: Dataset) -> Iterator[Iterator[Batch]]:
        options = self.options
        loader: DataLoader[Batch] = DataLoader(
            dataset,  # type: ignore[arg-type]  # no base class is needed
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
            # An error's traceback keeps the iterator alive, and with it data processes that ignore signals.
            if options.workers:
                batches._shutdown_workers()  # type: ignore[attr-defined]

    def _one_step(self, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], int]:
        """Forward, backward and update; the losses (means over the accumulated batches) and the number of rows."""
        options = self.options
        rate = learning_rate(self.step, options)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group.get("lr_scale", 1.0)
        generator = _seed_everything(options.seed, self.step, self.device)
        means: dict[str, Tensor] = {}
        rows = 0
        for _ in range(options.accumulate):
            batch = next(batches)
            if isinstance(batch, Mapping) and "damaged" in batch:
                self.training_log.damaged |= set(batch["damaged"])
                batch = {key: value for key, value in batch.items() if key != "damaged"}
            batch = _to_device(batch, self.device)
            rows += _num_rows(batch)
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
        """Write a checkpoint. TrainingError: a loss since the last row of the log is not finite."""
        self.training_log.check(self.step)
        tensors = {f"module.{name}": tensor for name, tensor in self._trained_state().items()}
        for name, parameter in self.trained.items():
            for key, value in self._optimizer_of(parameter).state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        notes = {
            "options": _as_json(self.options),
            "frozen": self.frozen,
            "record": self.training_log.state(),
        }
        checkpoints.save(self.folder, self.step, tensors, notes)
        if time.monotonic() - self.plotted_at >= PLOT_EVERY_S:
            plots.draw(self.training_log.path, self.folder / "loss.png")
            self.plotted_at = time.monotonic()

    def restore(self, resume: bool) -> None:
        """Resume from the latest checkpoint, if there is one."""
        if not resume and checkpoints.list_checkpoints(self.folder):
            raise ValueError(
                f"{self.folder} holds checkpoints already; choose another folder, or let the run resume"
            )
        checkpoint = checkpoints.load_latest(self.folder)
        if checkpoint is None:
            self.training_log.restore(0, None)
            return
        self._check_options(checkpoint.notes["options"])
        current, prefix = self._trained_state(), "module."
        saved = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        shapes, saved_shapes = ({(name, t.shape) for name, t in state.items()} for state in (current, saved))
        if wrong := sorted({name for name, _ in shapes ^ saved_shapes}):
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} in {self.folder} is of another model: "
                f"{', '.join(wrong[:4])} ({len(wrong)} tensors in all) differ; train in another folder"
            )
        if checkpoint.notes.get("frozen", self.frozen) != self.frozen:
            raise ValueError(
                f"the run in {self.folder} began from another model: weights that it does not train differ; "
                "start from the model it began with, or train in another folder"
            )
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(saved[name])
            for full, value in checkpoint.tensors.items():
                if full.startswith("optimizer."):
                    name, key = full.removeprefix("optimizer.").rsplit(".", 1)
                    # cloned: aligned memory of its own, as the optimizer's tensors have
                    state = self._optimizer_of(self.trained[name]).state
                    state[self.trained[name]][key] = value.to(self.device).clone()
        self.step = checkpoint.step
        self.training_log.restore(self.step, checkpoint.notes["record"])
        log.info("going on from step %d in %s", self.step, self.folder)

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self.optimizers
            if any(parameter is p for group in optimizer.param_groups for p in group["params"])
        )

    def _trained_state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and buffers."""
        module = self.task.module
        buffers = module.state_dict(keep_vars=True).keys() & dict(module.named_buffers()).keys()
        return dict(self.trained) | {name: module.get_buffer(name) for name in sorted(buffers)}

    def _check_options(self, saved: Mapping[str, Any]) -> None:
        current = _as_json(self.options)
        changed = [name for name in current if name not in _FREE and saved.get(name) != current[name]]
        for name in changed:
            if name in _FIXED:
                raise ValueError(
                    f"the run in {self.folder} began with {name} {saved.get(name)}, now it is {current[name]}; "
                    "that would change which data follows. Keep it, or train in another folder"
                )
            log.warning("%s was %s, the run goes on with %s", name, saved.get(name), current[name])


# --- helpers ---------------------------------------------------------------------------------------------------------


def _optimizers(
    groups: list[dict[str, Any]], options: FitOptions, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the groups that request it."""
    by_muon = [group for group in groups if group.get("muon")]
    others = [group for group in groups if not group.get("muon")]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        fused = device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(others, lr=options.lr, betas=options.betas, fused=fused))
    if by_muon:
        optimizers.append(Muon(by_muon, lr=options.lr))
    return optimizers


def _as_json(options: FitOptions) -> dict[str, Any]:
    return dataclasses.asdict(options) | {"betas": list(options.betas)}  # as JSON reads it back


def _seed_everything(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Set every source of randomness from (seed, step); the generator is for the task's own random numbers."""
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


def _num_rows(batch: Batch) -> int:
    """Images in a batch, or rows of its first tensor."""
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        first = batch.get("pixels", tensors[0] if tensors else None)
        return 0 if first is None else len(first)
    return len(batch) if isinstance(batch, Tensor) else 0


def _start_worker(worker: int) -> None:
    """In a data process: leave the CPU cores to training, and signals to the main process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """While open, the first SIGINT or SIGTERM sets the event instead of ending the process."""
    stop, before = threading.Event(), dict[signal.Signals, Any]()

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.set()
        print(f"\n{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the system releases it when the process ends, however it ends."""
    with open(folder / "lock", "a+") as file:
        if not lock_file(file, inherited=False):  # data processes may outlive this process by seconds
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise TrainingError(f"process {holder} trains in {folder}; wait for it, or use another folder")
        file.truncate(0)
        file.write(str(os.getpid()))
        with contextlib.suppress(OSError):  # for the message above only; on a full disk it may be missing
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
