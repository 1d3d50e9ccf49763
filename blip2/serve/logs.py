"""The server's log on standard error: one JSON object a line or, at a terminal, lines to read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("blip2.serve")


def log_to_stderr(*, own_process: bool = True) -> None:
    """Log to standard error.

    own_process: the process does nothing but serve, and whatever its libraries log, Python's warnings and what ends a
        thread belong into its log; else the server's entries alone.
    """
    terminal = sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalLines() if terminal else _JsonLines())
    log.setLevel(logging.INFO)
    if not own_process:
        log.handlers, log.propagate = [handler], False
        return
    for name in logging.root.manager.loggerDict:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING if terminal else logging.INFO)
    logging.getLogger("asyncio").addFilter(_AcceptErrors())
    logging.raiseExceptions = False  # a log that nobody can write is no reason to write to it
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error


@contextlib.contextmanager
def stray_lines_logged() -> Iterator[None]:
    """Where the log is JSON, whatever else this process prints to standard error becomes entries of it."""
    stderr = sys.stderr
    if not stderr.isatty():
        sys.stderr = _StrayLines()
    try:
        yield
    finally:
        sys.stderr = stderr


def log_event(event: str, **values: Any) -> None:
    """Write an entry to the server's log."""
    log.info("%s", json.dumps({"event": event} | values))


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        log.error("a thread ended with an error", exc_info=args.exc_value)


class _StrayLines(io.TextIOBase):
    _rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            log.warning("%s", line.rstrip())
        return len(text)


class _AcceptErrors(logging.Filter):
    """Lets one of asyncio's reports that no connection can be accepted pass in a second."""

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("socket.accept()"):
            return True
        now = time.monotonic()
        passes = now >= self._next
        if passes:
            self._next = now + 1
            record.exc_text, record.exc_info = "", None  # the same one every time
        return passes


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname}
        entry |= _entry(record)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _TerminalLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = _entry(record)
        match entry.pop("event"):
            case "message":
                text = str(entry["message"])
            case "listening":
                text = f"listening on {entry['url']}; Ctrl-C ends it"
            case "request":
                text = "{method} {route} {status}, {ms} ms, {client}".format_map(entry)
            case event:
                text = " ".join((event, *(f"{value}" for value in entry.values())))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        lines = [f"{self.formatTime(record, '%H:%M:%S')} {level}{_harmless(text)}"]
        if record.exc_info:
            lines += map(_harmless, self.formatException(record.exc_info).split("\n"))
        return "\n".join(lines)


def _entry(record: logging.LogRecord) -> dict[str, Any]:
    """What a record holds: the server's own are JSON."""
    try:
        text = record.getMessage()
    except Exception:  # its arguments do not fit
        text = str(record.msg)
    if record.name == log.name and text.startswith("{"):
        with contextlib.suppress(ValueError):
            entry: dict[str, Any] = json.loads(text)
            return entry
    return {"event": "message", "message": text}


def _harmless(text: str) -> str:
    """Text that does not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
