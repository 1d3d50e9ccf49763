"""How a run captions, and where its texts go."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Existing = Literal["skip", "overwrite", "append", "prepend"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How images are captioned, and where the texts go.

    kind: the format of the output, as `outputs.format_of` gives it; "stdout": the rows go to the caller.
    out: the output's path; not used for "stdout".
    run_config: whatever decides what the model says; an output begun with other values is refused.
    prefix, suffix: put around each text when it is published; where they change, all that is not edited is published
        anew. Not used for "stdout".
    existing: what happens to a text file that is there already; overwrite makes a finished output of any kind anew.
    threshold: P(right) below which a caption counts as flagged; None: the model is not calibrated, and nothing is said
        of that.
    batch_size: images computed at a time. parallel_batches: batches computed at once, each in a thread.
    threads: that read and decode images.
    """

    kind: str = "stdout"
    out: Path = Path()
    run_config: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    suffix: str = ""
    existing: Existing = "skip"
    threshold: float | None = None
    batch_size: int = 8
    parallel_batches: int = 1
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))

    @property
    def style(self) -> tuple[str, str]:
        """What is put around each text."""
        return self.prefix, self.suffix
