"""Opens hostile files under watch: `python tests/tensorfiles/watch.py 1` all of them, 17: every 17th.

Prints one JSON object: how many there were, by which errors they were refused, what was not refused as it should be,
what the interpreter did meanwhile (its audit events: imports, executions, files opened for writing, sockets, ...), the
slowest case's processor time, and the memory gained.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from assemble import good_files
from hostile import cases

from blip2.checkpoint import CheckpointError, open_tensors

# What reading a file may do. Opening is allowed for reading alone.
HARMLESS = {"mmap.__new__", "os.listdir", "os.scandir", "object.__getattr__"}


def read_all(path: Path) -> int:
    with open_tensors(path) as tensors:
        for name in tensors:
            tensors.copy(name)
            tensors[name].sum()
        return len(tensors)


def main(step: int) -> None:
    watching = False
    events: Counter[str] = Counter()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching or event in HARMLESS:
            return
        if event == "open":
            _, mode, flags = arguments
            if not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and not set(mode or "r") & set("wax+"):
                return
        events[f"{event} {str(arguments)[:80]}"] += 1

    sys.addaudithook(watch)
    refused: Counter[str] = Counter()
    failures = []
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for content in good_files().values():  # what is imported once is imported now
            (folder / "model").write_bytes(content)
            assert read_all(folder / "model") == 1
        before = 0
        count = 0
        for number, case in enumerate(cases()):
            if number % step:
                continue
            for path in folder.iterdir():
                path.unlink()
            for file, content in case.files.items():
                (folder / file).write_bytes(content)
            if not before:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            count += 1
            watching = True
            start = time.process_time()
            try:
                read_all(folder / next(iter(case.files)))
                failures.append(f"{case.label}: opened")
            except CheckpointError as error:
                refused[type(error).__name__] += 1
                text = str(error)
                if not isinstance(error, case.error):
                    failures.append(f"{case.label}: {type(error).__name__}: {text}")
                if "\n" in text or len(text) > 1000 or str(folder) not in text:
                    failures.append(f"{case.label}: a poor message: {text[:300]}")
            except Exception as error:
                failures.append(f"{case.label}: {type(error).__name__}: {error}")
            taken = time.process_time() - start
            watching = False
            slowest = max(slowest, (taken, case.label))
    result = {
        "cases": count,
        "refused": dict(refused),
        "failures": failures,
        "events": dict(events),
        "slowest_s": slowest[0],
        "slowest": slowest[1],
        "gained_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]))
