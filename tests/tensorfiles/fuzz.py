"""Coverage-guided fuzzing: `python tests/tensorfiles/fuzz.py safetensors|archive|legacy|paddle [seconds]`.

Sound files are mutated; a mutant that takes a step from line to line that no file took before is kept and mutated on.
A reader must open a file or raise CheckpointError, within two seconds of processor time. A file that breaks this is
written to the current folder, and the exit status is 1. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from assemble import good_files
from watch import read_all

import blip2.tensorfiles.open
from blip2.checkpoint import CheckpointError

PACKAGE = str(Path(blip2.tensorfiles.open.__file__).parent)
READERS = {
    "safetensors": ("safetensors",),
    "archive": ("archive",),
    "legacy": ("legacy",),
    "paddle": ("paddle", "split"),
}
NUMBERS = [
    n.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for n in (0, 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
]
OPCODES = [bytes([n]) for n in b"(.0125BCFGIJKLMNPQRSTUVX]abcdeghijlopqrstu})" + bytes(range(0x80, 0x99))]


class Coverage:
    """Pairs of lines that followed each other within a function of the readers."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.new = 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        last = 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            pair = (code.co_filename, last, frame.f_lineno)
            last = frame.f_lineno
            if pair not in self.seen:
                self.seen.add(pair)
                self.new += 1
            return line

        return line


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(out) + 1)
        piece = draw.choice((draw.choice(NUMBERS), draw.choice(OPCODES), bytes([draw.randrange(256)])))
        match draw.randrange(6):
            case 0:
                out[at : at + len(piece)] = piece
            case 1:
                out[at:at] = piece
            case 2:
                del out[at : at + draw.choice((1, 2, 8, 50))]
            case 3:  # repeat a part
                out[at:at] = out[at : at + draw.choice((1, 4, 30))]
            case 4:  # splice in a part of another file
                other = draw.choice(others)
                start = draw.randrange(len(other) + 1)
                out[at : at + draw.choice((0, 20))] = other[start : start + 40]
            case 5 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def main(reader: str, seconds: float) -> int:
    draw = random.Random(0)
    corpus = [content for label, content in good_files().items() if label.startswith(READERS[reader])]
    coverage = Coverage()
    sound = len(corpus)
    runs = refused = 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model"
        end = time.monotonic() + seconds
        for number in range(sys.maxsize):
            if time.monotonic() > end:
                break
            content = corpus[number] if number < sound else mutated(draw.choice(corpus), corpus, draw)
            path.write_bytes(content)
            runs, coverage.new, start = runs + 1, 0, time.process_time()
            sys.settrace(coverage.trace)
            try:
                read_all(path)
                failure = None
            except CheckpointError:
                refused, failure = refused + 1, None
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            finally:
                sys.settrace(None)
            if time.process_time() - start > 2:
                failure = "took over 2 s"
            if failure:
                Path(f"fuzz-{reader}").write_bytes(content)
                print(json.dumps({"reader": reader, "runs": runs, "failure": failure}))
                return 1
            if coverage.new and number >= sound and len(content) < 100_000:
                corpus.append(content)
    kept = len(corpus) - sound
    print(
        json.dumps(
            {"reader": reader, "runs": runs, "refused": refused, "kept": kept, "steps": len(coverage.seen)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 60.0))
