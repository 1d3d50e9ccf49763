"""Messages that were written for Python's callers, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping


def as_typed(message: str, flags: Mapping[str, str]) -> str:
    """A message with options as they are typed: `num_beams=1` becomes `--num-beams 1`.

    Args:
        flags: how each option is typed, by its name in Python. A name that is also a word of the
            language is replaced only before "=", and where the message begins with it.
    """
    words = {name: "_" in name for name in flags}
    alone = "|".join(re.escape(name) for name, distinct in words.items() if distinct) or "(?!)"
    any_name = "|".join(map(re.escape, words)) or "(?!)"
    value = r"""(?P<value>'[^']*'|"[^"]*"|-?\w[\w.+-]*\w|\w)?(?![\w/\\])"""
    # Not within a path, a URL or a longer name.
    pattern = (
        rf"(?<![\w./\\?&-])(?:(?P<before>{any_name})={value}"
        rf"|(?P<bare>{alone})(?![\w/\\-]|\.\w))|^(?P<first>{any_name})(?= must )"
    )

    def typed(found: re.Match[str]) -> str:
        flag = flags[found["before"] or found["bare"] or found["first"]]
        given = found["value"]
        return flag if given in (None, "True") else f"{flag} {given}"

    return re.sub(pattern, typed, message)
