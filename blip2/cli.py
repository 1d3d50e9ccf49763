"""The `blip2` command: errors and exit status. What a command needs (commands/) is imported when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from blip2.commands.parser import parse
from blip2.commands.terminal import DONE, NOTHING_DONE, complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # torch's threads wait for their next work spinning, for milliseconds, and keep a processor from OpenVINO's threads
    # meanwhile (and from other programs). Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="surrogateescape")  # file names are printed as the bytes they are
    args = parse(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("BLIP2_DEBUG"):
            raise
        expected = isinstance(error, ValueError | OSError | MemoryError) and str(error)
        complain(str(error) if expected else f"{type(error).__name__}: {error}")
        return NOTHING_DONE
