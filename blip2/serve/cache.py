"""A cache of encoded images by the content of their files; the least recently used is dropped first."""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain
from threading import Lock

from blip2.results import EncodedImage


def size_of(encoded: EncodedImage) -> int:
    """Bytes of an encoded image."""
    cache = encoded.prompt_cache
    cached = [] if cache is None else [cache.mask, *chain.from_iterable(cache.layers)]
    return sum(tensor.nbytes for tensor in (encoded.prefix, *cached))


class ImageCache:
    """At most `limit` bytes of encoded images of one model. Safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._entries: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, key: bytes) -> EncodedImage | None:
        """The image of a key, counted as a hit or a miss."""
        with self._lock:
            if key not in self._entries:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]

    def peek(self, key: bytes) -> EncodedImage | None:
        """As `get`, but not counted: for a second look-up."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: bytes, encoded: EncodedImage) -> None:
        """Keep an image, dropping others as needed; one larger than the whole cache is not kept."""
        size = size_of(encoded)
        with self._lock:
            if key in self._entries or size > self._limit:
                return
            self._entries[key] = encoded
            self.bytes += size
            while self.bytes > self._limit:
                self.bytes -= size_of(self._entries.popitem(last=False)[1])
