"""Converts a full-size .pdparams file to bf16 safetensors and captions with the result, beside `cp` of the same bytes.

    python -m benchmarks.convert FOLDER

FOLDER gets 62 GB for a while and 16 GB to stay; each step is a process of its own and its peak memory that process's.
Goals: at most 1.5 GB of memory, at most twice the time of `cp`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

IMAGE = Path(__file__).parents[1] / "examples" / "rose.jpg"


@dataclass(frozen=True)
class Ran:
    """How long a command took, in seconds, and the most memory it had, in GB."""

    seconds: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="opt-6.7b-coco")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    paddle, copy, converted = folder / "paddle", folder / "copy", folder / "hf"
    blip2 = [sys.executable, "-m", "blip2"]

    written = _run(
        [
            *(sys.executable, "-m", "benchmarks.full_size"),
            *(arguments.model, str(paddle), "--to", "paddle", "--dtype", "fp32"),
        ]
    )
    size = sum(file.stat().st_size for file in paddle.iterdir())
    print(
        f"wrote {size / 1e9:.1f} GB of random weights in {written.seconds:.0f} s, {written.peak_gb:.2f} GB at most"
    )
    copied = _run(["sh", "-c", f'cp -r "{paddle}" "{copy}" && sync'])
    shutil.rmtree(copy)
    print(f"cp, {size / 1e9:.1f} GB: {copied.seconds:.0f} s")
    done = _run([*blip2, "convert", str(paddle), str(converted), "--to", "hf", "--dtype", "bf16"])
    print(f"blip2 convert: {done.seconds:.0f} s, {done.peak_gb:.2f} GB at most")
    shutil.rmtree(paddle)
    captioned = _run(
        [
            *(*blip2, "caption", str(IMAGE), "--model", str(converted), "--dtype", "bf16"),
            *("--beams", "1", "--max-new-tokens", "5", "--json"),
        ]
    )
    print(
        f"load and caption: {captioned.seconds:.0f} s, {captioned.peak_gb:.2f} GB at most (the weights are mapped)"
    )
    print(
        json.dumps(
            {
                "bytes": size,
                "cp_s": round(copied.seconds, 1),
                "convert_s": round(done.seconds, 1),
                "ratio": round(done.seconds / copied.seconds, 2),
                "convert_peak_gb": round(done.peak_gb, 2),
                "caption_s": round(captioned.seconds, 1),
            }
        )
    )


def _run(command: list[str]) -> Ran:
    """Run a command to its end; SystemExit where it fails."""
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed ({status})")
    return Ran(time.perf_counter() - start, used.ru_maxrss * 1024 / 1e9)


if __name__ == "__main__":
    main()
