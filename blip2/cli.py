"""The `blip2` command: errors and exit status. What a command needs (commands/) is imported when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from blip2.commands.options import as_typed
from blip2.commands.parser import parse
from blip2.commands.streams import StreamError, complain, discard_output, one_line, standard_streams
from blip2.commands.terminal import DONE, NOTHING_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # torch's threads wait for their next work spinning, for milliseconds, and keep a processor from OpenVINO's threads
    # meanwhile (and from other programs). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    with standard_streams():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    flags: dict[str, str] = {}
    try:
        args = parse(argv)
        flags = args.flags
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        discard_output()
        return DONE
    except Exception as error:
        if isinstance(error, StreamError):
            discard_output()
        if os.environ.get("BLIP2_DEBUG"):
            raise
        complain(as_typed(_message(error), flags))
        return NOTHING_DONE


def _message(error: Exception) -> str:
    """What an error says to the user."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ValueError | OSError | MemoryError) and str(error):
        return str(error)
    return one_line(f"{type(error).__name__}: {error}")  # of a library, on several lines for all we know
