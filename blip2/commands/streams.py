"""The standard streams as every command has them: of any encoding, closed, full, or read by nobody any more.

Results are UTF-8 where standard output is no terminal. What is printed never steers a terminal: control characters of
file names and messages are shown as escapes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any

from blip2.imagefiles.warned import report_warnings

_JOINERS = "\u200c\u200d"  # of letters and emoji: they belong to how a name is written
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


class StreamError(OSError):
    """Standard output cannot be written, for another reason than that its reader has left."""


# --- what is printed -----------------------------------------------------------------------------------------------


def steers(char: str) -> bool:
    """Whether a character does something to a terminal, or to the order of text, instead of being seen."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS


def visible(text: str) -> str:
    r"""Text for one line of a terminal, what steers it as bash's $'...' has it: \n, \x1b, \u202e, \xe9 for a byte."""
    if text.isprintable():
        return text
    return "".join(_escape(char) if steers(char) else char for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # of a file name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    long = f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(char, long)


def unsteered(text: str) -> str:
    """A piece of a model's text, with spaces for what steers a terminal."""
    return text if text.isprintable() else "".join(" " if steers(char) else char for char in text)


def one_line(text: str) -> str:
    """A model's text on one line: no line breaks, nor anything else that steers a terminal."""
    return " ".join(unsteered(text).split())


def visible_json(record: dict[str, Any]) -> str:
    """An object as one line of JSON that holds every text exactly, file names that are no Unicode too."""
    line = json.dumps(record, ensure_ascii=False)
    return line if line.isprintable() else "".join(map(_json_escape, line))


def _json_escape(char: str) -> str:
    if not steers(char):
        return char
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def put(text: str, end: str = "\n") -> None:
    """Write to standard output at once.

    Raises:
        BrokenPipeError: nobody reads it any more.
        StreamError: it cannot be written.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StreamError(f"standard output cannot be written ({error.strerror or error})") from error


def complain(message: str) -> None:
    """Print one line about what is wrong."""
    print(f"blip2: {visible(message)}", file=sys.stderr)


# --- the streams themselves ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """The streams of a command, and Python's warnings and log messages as lines of its own."""
    _open_closed()
    _reconfigure(sys.stdin, errors="surrogateescape")
    if sys.stdout.isatty():
        _reconfigure(sys.stdout, errors="replace")
    else:
        _reconfigure(sys.stdout, encoding="utf-8", errors="backslashreplace")
    _reconfigure(sys.stderr, errors="backslashreplace")
    stderr: Any = _Unfailing(sys.stderr)
    last_resort = logging.lastResort
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings():
        report_warnings(_warn)
        logging.lastResort = _Messages(logging.WARNING)
        try:
            yield
        finally:
            logging.lastResort = last_resort


def discard_output() -> None:
    """Let what standard output still holds go nowhere, or Python would report it once more at its end."""
    _to_nowhere(sys.stdout)


class _Unfailing:
    """Standard error: where it cannot be written, the work goes on without it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            _to_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Messages(logging.Handler):
    """Log messages that no other handler takes."""

    def emit(self, record: logging.LogRecord) -> None:
        _warn(record.getMessage())


def _warn(message: str) -> None:
    """A line beside the progress bars, which are drawn anew after it."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.nullcontext() if bars is None else bars.external_write_mode():
        complain(f"warning: {message}")


def _open_closed() -> None:
    """Nothing comes from, and nowhere goes to, a stream that is closed (`>&-`) or that Windows does not give."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # taken at once: else the next file that is opened would be this stream
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def _reconfigure(stream: Any, **settings: str) -> None:
    if hasattr(stream, "reconfigure"):  # a notebook's has not
        stream.reconfigure(**settings)


def _to_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # no file at all
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
