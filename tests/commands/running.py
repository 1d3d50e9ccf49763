"""What a command of this process leaves, and streams of any kind for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    """What a command left: its exit status, the bytes of standard output, the text of standard error."""

    status: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().split("\n")[:-1]


class Stream(io.TextIOWrapper):
    """A standard stream that may be a terminal."""

    def __init__(self, content: bytes = b"", encoding: str = "utf-8", *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(content), encoding, newline="\n", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def content(self) -> bytes:
        return self.buffer.getvalue()  # type: ignore[attr-defined,no-any-return]


Run = Callable[..., Done]
