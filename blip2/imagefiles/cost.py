"""What decoding a file takes, as its headers say."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PARTS = 100_000  # chunks, segments, tiles, strips
MAX_METADATA = 2**20  # bytes of it that Pillow may be given to read


@dataclass(frozen=True)
class Cost:
    """What decoding a file takes beside its pixels.

    rewrite: Pillow takes long over the file as it is, or misreads it; `bare_file` makes the same picture.
    memory: bytes that the decoder needs beside the picture.
    """

    rewrite: bool = False
    memory: int = 0
