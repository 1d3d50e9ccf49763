"""Bytes of text files as text: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one; nothing else."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

_MARKED = {  # in this order: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
for _encoding in _MARKED.values():  # codecs are imported now, so that reading a file imports nothing
    codecs.lookup(_encoding)


# A zero byte at an end of a line is valid UTF-8, but what UTF-16 without a mark and lists of `find -print0` look like.
_ZERO = re.compile(r"\A\0|\n\0|\0\r?\n|\0\Z")


class TextFileError(ValueError):
    """A text file that cannot be understood; the message names file and line."""


def text_encoding(head: bytes) -> str:
    """The encoding of a text file that begins with these bytes, four of them or all."""
    return next((name for mark, name in _MARKED.items() if head.startswith(mark)), "utf-8")


def decode_text(content: bytes, name: str, encoding: str = "", line: int = 1) -> str:
    """The content of file `name`, or what follows from a line on, without byte order mark. Raises TextFileError."""
    try:
        text = content.decode(encoding or text_encoding(content))
    except UnicodeDecodeError as error:
        line += content[: error.start].decode(error.encoding, "replace").count("\n")
        byte = f"byte 0x{content[error.start]:02x}"
        raise TextFileError(f"{name}, line {line}: {byte} is no {error.encoding}; save it as UTF-8") from None
    if "\0" in text and (zero := _ZERO.search(text)):
        line += text[: zero.start() + 1].count("\n")
        raise TextFileError(
            f"{name}, line {line}: a zero byte, as in UTF-16 without a mark; save it as UTF-8"
        )
    return text.removeprefix("\ufeff") if line == 1 else text


def read_text(path: str | Path) -> str:
    """The whole text of a file, line ends as "\\n". Raises TextFileError, OSError."""
    return decode_text(Path(path).read_bytes(), str(path)).replace("\r\n", "\n")
