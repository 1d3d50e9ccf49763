"""The server that the page's tests drive, and the page with what went wrong in it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Server:
    address: str
    process: subprocess.Popen[bytes]
    rest: Path

    def slow(self, seconds: float) -> None:
        """Let the model rest so long between tokens."""
        self.rest.write_text(str(seconds))


@dataclass
class Watched:
    """A page of the browser and what went wrong in it: errors on its console, requests to other hosts."""

    page: Any
    wrong: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """An error that a test brought about on purpose: it must be there, and is no fault."""
        expected = [line for line in self.wrong if re.search(pattern, line)]
        assert expected, f"no console error like {pattern!r}: {self.wrong}"
        self.wrong[:] = [line for line in self.wrong if line not in expected]


def start(folder: Path, *extra: str) -> Server:
    """A server on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rest = folder / "rest"
    rest.write_text("0")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "slow_server.py"), str(port), str(rest), *extra]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            urllib.request.urlopen(address + "health", timeout=5)
            return Server(address, process, rest)
        except OSError:
            time.sleep(0.2)
    raise AssertionError((folder / "server.log").read_text())


def until(page: Any, true: str) -> None:
    """Wait until a JavaScript expression is true (the page's own policy forbids Playwright's way, which is `eval`)."""
    deadline = time.monotonic() + 60
    while not page.evaluate(true):
        assert time.monotonic() < deadline, f"still not true: {true}"
        page.wait_for_timeout(50)
