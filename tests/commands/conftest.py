"""The command line in this process, with streams of any kind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from running import Done, Run, Stream

from blip2.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run `blip2` in an empty folder: text for standard input, the encoding of the streams, and which are terminals."""
    monkeypatch.delenv("BLIP2_DEBUG", raising=False)
    monkeypatch.delenv("BLIP2_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(
        *arguments: object, stdin: bytes = b"", encoding: str = "utf-8", terminals: tuple[str, ...] = ()
    ) -> Done:
        streams = {
            name: Stream(content, encoding, terminal=name in terminals)
            for name, content in (("stdin", stdin), ("stdout", b""), ("stderr", b""))
        }
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                status = main([os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments])
            except SystemExit as stop:
                status = int(stop.code or 0)
        return Done(status, streams["stdout"].content, streams["stderr"].content.decode(encoding))

    return run
