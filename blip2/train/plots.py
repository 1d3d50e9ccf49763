"""The loss curve of a training run, drawn from its log.csv."""

from __future__ import annotations

import csv
import importlib.util
import logging
from functools import cache
from pathlib import Path

from blip2.train.metrics import NO_LOSSES

log = logging.getLogger(__name__)


@cache  # so that the warning comes once
def _available() -> bool:
    available = importlib.util.find_spec("matplotlib") is not None
    if not available:
        log.warning("loss.png is not drawn: matplotlib is not installed (pip install 'blip2[train]')")
    return available


def draw(csv_path: Path, png_path: Path) -> None:
    """Draw the losses in log.csv over the steps into a PNG; without matplotlib do nothing."""
    if not csv_path.exists() or not _available():
        return
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    with open(csv_path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for name in (name for name in rows[0] if name not in (*NO_LOSSES, "grad_norm")):
        losses.plot(steps, [float(row[name]) for row in rows], label=name, linewidth=1)
    losses.set_ylabel("loss")
    losses.legend()
    losses.grid(alpha=0.3)
    rates.plot(steps, [float(row["lr"]) for row in rows], linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    try:
        figure.savefig(png_path, dpi=100)
    except OSError as error:  # a full disk: no reason to end the training
        log.warning("could not draw %s: %s", png_path, error)
