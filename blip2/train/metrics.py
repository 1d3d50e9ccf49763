"""The metrics of a training run: log.csv with a row of mean losses every `log_every` steps, and progress on stderr."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from blip2.storage import replace_file

NO_LOSSES = ("step", "lr", "damaged", "images_per_s")  # the other columns; damaged: of images so far
RESUME_HINT = "make room and start the same command again, it goes on from the last checkpoint"

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, a full disk, or another process in the same folder."""


class TrainingLog:
    """Sums losses between rows. Its state is part of a checkpoint, so that a resumed run writes the same rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest: dict[str, float] = {}
        self.damaged: set[str] = set()  # images that were passed over so far
        # Tensors of one element, so that adding does not wait for the device.
        self._sums: dict[str, Tensor | float] = {}
        self._count = 0
        self._rows = 0  # images (or texts) since the last row, for the speed shown
        self.start(0, 0)

    def start(self, step: int, steps: int) -> None:
        """Begin timing at `step` of `steps`."""
        self._since = self._started = time.monotonic()
        self._first, self._steps = step, steps

    def add(self, losses: Mapping[str, Tensor], rows: int) -> None:
        """Add the losses of one step over `rows` images."""
        if self._sums and self._sums.keys() != losses.keys():
            raise ValueError(f"the task returned losses {sorted(losses)}, before that {sorted(self._sums)}")
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in losses.items()}
        self._count += 1
        self._rows += rows

    def check(self, step: int) -> None:
        """Raise TrainingError if a loss since the last row is not finite."""
        for name, total in self._sums.items():
            if not math.isfinite(float(total)):
                raise TrainingError(
                    f"{name} became {float(total)} within the {self._count} steps up to {step}; the last checkpoint is "
                    "from before. Lower the learning rate, or train in fp32"
                )

    def write(self, step: int, rate: float) -> None:
        """Append a row of means and the learning rate, show it, and start new sums."""
        self.check(step)
        self.latest = {name: float(total) / self._count for name, total in self._sums.items()}
        now = time.monotonic()
        speed = self._rows / max(now - self._since, 1e-9)
        more = {"lr": rate, "damaged": len(self.damaged), "images_per_s": round(speed, 2)}
        row = {"step": step, **self.latest, **more}
        new = not self.path.exists() or self.path.stat().st_size == 0
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([list(row)] * new)
                writer.writerow(row.values())  # floats as repr gives them: exact
        except OSError as error:
            raise TrainingError(f"could not write {self.path}: {error}; {RESUME_HINT}") from error
        left = (now - self._started) / max(step - self._first, 1) * (self._steps - step)
        self._show(step, rate, speed, left)
        self._sums, self._count, self._rows, self._since = {}, 0, 0, now

    def _show(self, step: int, rate: float, speed: float, left_s: float) -> None:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in self.latest.items())
        line = f"step {step}/{self._steps}  {numbers}  lr {rate:.3g}  {speed:.1f} images/s  {_duration(left_s)} left"
        start, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")  # one line that changes, or many
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the line of progress, and report the images that were passed over."""
        if sys.stderr.isatty() and self.latest:
            print(file=sys.stderr)
        if self.damaged:
            names = sorted(self.damaged)
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            log.warning(
                "%d images cannot be read and were passed over: %s%s", len(names), ", ".join(names[:3]), more
            )

    def state(self) -> dict[str, Any]:
        """What resuming needs: the sums since the last row, and what was passed over."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"sums": sums, "count": self._count, "damaged": sorted(self.damaged)}

    def restore(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Resume after `step`: rows written later than the checkpoint, and a partly written last one, are dropped."""
        if state is not None:
            self._sums, self._count = dict(state["sums"]), int(state["count"])
            self.damaged = set(state.get("damaged", ()))
        if not self.path.exists():
            return
        text = self.path.read_text()
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= step]
        if step and lines and lines[0].endswith("\n"):
            kept.insert(0, lines[0])
        with replace_file(self.path) as beside:
            beside.write_text("".join(kept))
        if len(kept) > 1:
            last = next(csv.DictReader(io.StringIO(kept[0] + kept[-1])))
            self.latest = {k: float(v) for k, v in last.items() if k not in NO_LOSSES}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
