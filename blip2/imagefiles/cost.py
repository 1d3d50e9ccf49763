"""What decoding a file may take, and what its headers say it does."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PIXELS = 89_000_000  # a third of a GiB once decoded; Pillow itself warns from 89,478,485 on
MAX_PARTS = 100_000  # chunks, segments, tiles, strips
MAX_SCANNED_PIXELS = 1_000_000_000  # scans of a JPEG x pixels
MAX_METADATA = 2**20  # bytes of it that Pillow may be given to read


@dataclass(frozen=True)
class Cost:
    """What decoding a file takes beside its pixels.

    rewrite: Pillow takes long over the file as it is, or misreads it; `bare_file` makes the same picture.
    memory: bytes that the decoder needs beside the picture.
    ends: False for a JPEG without an end marker although its scans hold every coefficient to its last bit. Whether the
        last scan is whole, no header says.
    """

    rewrite: bool = False
    memory: int = 0
    ends: bool = True
