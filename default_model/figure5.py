"""Stage 2 with and without stage 1, as in the paper's figure 5: `python -m default_model.figure5 DIR PICTURE`.

DIR holds the finished stages stage2 and stage2-raw; PICTURE is the PNG to write.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

RUNS = {"stage2": "with stage 1", "stage2-raw": "without stage 1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run, title in RUNS.items():
        with open(arguments.folder / run / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
        axes.plot(steps, losses, label=f"{title}: {losses[-1]:.2f} at the end")
    axes.set_xlabel("step of stage 2")
    axes.set_ylabel("caption loss on unseen scenes")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
