"""A lock that a process has on a file until it ends, however it ends."""

from __future__ import annotations

import os


def lock(descriptor: int) -> bool:
    """Take the lock of an open file for this process; False where another has it. Without flock it is always given."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
