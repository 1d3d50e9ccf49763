"""A cache of encoded images by the content of their files; the least recently used is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from blip2.results import EncodedImage


def size_of(encoded: EncodedImage) -> int:
    """Bytes of an encoded image."""
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
        self._entries: OrderedDict[bytes, tuple[EncodedImage, int]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: bytes) -> EncodedImage | None:
        """The image of a key, counted as a hit or a miss."""
        with self._lock:
            if key not in self._entries:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def peek(self, key: bytes) -> EncodedImage | None:
        """As `get`, but not counted: for a second look-up."""
        with self._lock:
            return self._entries[key][0] if key in self._entries else None

    def put(self, key: bytes, encoded: EncodedImage) -> None:
        """Keep an image, dropping others as needed; one larger than the whole cache is not kept."""
        size = size_of(encoded)
        with self._lock:
            if key in self._entries or size > self._limit:
                return
            self._entries[key] = encoded, size
            self.bytes += size
            while self.bytes > self._limit:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed
