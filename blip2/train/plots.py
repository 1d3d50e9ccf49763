"""The loss curve of a training run, drawn from its log.csv."""

from __future__ import annotations

import csv
import importlib.util
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_APART = ("step", "lr", "grad_norm", "images_per_s")  # columns that are no losses


@cache  # say it once
def _available() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        log.warning("loss.png is not drawn: matplotlib is not installed (pip install 'blip2[train]')")
    return found


def draw(record: Path, picture: Path) -> None:
    """Draw the losses in `record` (a log.csv) over the steps into `picture` (a PNG); without matplotlib do nothing."""
    if not record.exists() or not _available():
        return
    from matplotlib.figure import Figure  # the figure alone: no window system, no global state

    with open(record, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for name in (name for name in rows[0] if name not in _APART):
        losses.plot(steps, [float(row[name]) for row in rows], label=name, linewidth=1)
    losses.set_ylabel("loss")
    losses.legend()
    losses.grid(alpha=0.3)
    rates.plot(steps, [float(row["lr"]) for row in rows], linewidth=1)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    try:
        figure.savefig(picture, dpi=100)
    except OSError as error:  # a full disk: no reason to end the training
        log.warning("could not draw %s: %s", picture, error)
