"""Encoded images by the content of their files, the least recently used going first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from blip2.results import EncodedImage


def size_of(encoded: EncodedImage) -> int:
    """Bytes an encoded image holds."""
    parts = [encoded.prefix]
    if encoded.prompt_cache is not None:
        parts += [part for layer in encoded.prompt_cache.layers for part in layer] + [
            encoded.prompt_cache.mask
        ]
    return sum(part.numel() * part.element_size() for part in parts)


class ImageCache:
    """At most `limit` bytes of encoded images of one model. Safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._held: OrderedDict[bytes, tuple[EncodedImage, int]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: bytes) -> EncodedImage | None:
        with self._lock:
            found = self._held.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._held.move_to_end(key)
            return found[0]

    def peek(self, key: bytes) -> EncodedImage | None:
        """As `get`, but not counted: for a second look."""
        with self._lock:
            found = self._held.get(key)
            return None if found is None else found[0]

    def put(self, key: bytes, encoded: EncodedImage) -> None:
        size = size_of(encoded)
        with self._lock:
            if key in self._held or size > self._limit:
                return
            self._held[key] = encoded, size
            self.bytes += size
            while self.bytes > self._limit:
                _, (_, freed) = self._held.popitem(last=False)
                self.bytes -= freed

    def __len__(self) -> int:
        return len(self._held)
