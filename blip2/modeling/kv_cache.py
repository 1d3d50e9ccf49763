"""The KV cache: keys and values of every decoder layer, of the prompts (`PromptCache`) and the new tokens (`KVCache`).

A prompt is stored once, however many rows (beams or samples) continue it; each row stores only its own new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PromptCache:
    """The keys and values of B prompts. A value: reading on gives a new one.

    layers: one (keys, values) pair a layer, each [B, H, S, D].
    mask: bool [B, S], False where a position is padding.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @property
    def length(self) -> int:
        """Positions S, padding included."""
        return self.mask.shape[1]

    def batch_select_indices(self, indices: Tensor) -> PromptCache:
        """The cache of the prompts `indices` (int64 [k]), in that order."""
        return PromptCache(tuple((k[indices], v[indices]) for k, v in self.layers), self.mask[indices])

    def split(self, length: int) -> list[PromptCache]:
        """A cache for each prompt, of its first `length` positions; copies, so that the rest can be freed."""
        return [
            PromptCache(
                tuple((k[i, :, :length].clone(), v[i, :, :length].clone()) for k, v in self.layers),
                self.mask[i, :length].clone(),
            )
            for i in (slice(row, row + 1) for row in range(len(self.mask)))
        ]


def concat_prompt_caches(caches: Sequence[PromptCache]) -> PromptCache:
    """Several caches as one; the shorter prompts are padded on the left."""
    if len(caches) == 1:
        return caches[0]
    firsts = [int(cache.mask.any(0).int().argmax()) for cache in caches]  # padding all rows share is left out
    length = max(cache.length - first for cache, first in zip(caches, firsts))
    pads = [length - cache.length + first for cache, first in zip(caches, firsts)]

    def concat(tensors: Iterable[Tensor]) -> Tensor:  # each [B, H, S, D]
        cut = (tensor[:, :, first:] for tensor, first in zip(tensors, firsts))
        return torch.cat([F.pad(tensor, (0, 0, pad, 0)) for tensor, pad in zip(cut, pads)])

    layers = zip(*(cache.layers for cache in caches), strict=True)
    joined = tuple((concat(k for k, _ in layer), concat(v for _, v in layer)) for layer in map(tuple, layers))
    masks = (cache.mask[:, first:] for cache, first in zip(caches, firsts))
    return PromptCache(joined, torch.cat([F.pad(mask, (pad, 0)) for mask, pad in zip(masks, pads)]))


class KVCache:
    """Keys and values of the new tokens of R rows, one buffer a layer, allocated once.

    length: the new tokens of the row that has most.
    starts: int64 [R], where each row's tokens begin, where some began later; None: all at 0.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        """`shape`: layers, rows, heads, tokens at most, width of a head. Device and dtype are those of `like`."""
        self.buffer = like.new_empty((shape[0], 2, *shape[1:]))
        self.length = 0
        self.starts: Tensor | None = None

    @property
    def row_lengths(self) -> Tensor | int:
        """How many tokens each row has: one number, or int64 [R]."""
        return self.length if self.starts is None else self.length - self.starts

    @property
    def padding(self) -> Tensor | None:
        """bool [R, length + 1], True before a row's first token; None where all rows began together."""
        if self.starts is None:
            return None
        return torch.arange(self.length + 1, device=self.starts.device) < self.starts[:, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token's keys and values [R, H, 1, D]; returns all of this layer's so far: [R, H, t + 1, D]."""
        buffer, end = self.buffer[layer], self.length + 1
        buffer[0, :, :, self.length : end] = key
        buffer[1, :, :, self.length : end] = value
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] (int64 [r]) was; fewer rows drop the rest, more repeat them."""
        tokens = self.buffer[..., : self.length, :].index_select(2, rows)
        layers, pair, before, *shape = self.buffer.shape
        if len(rows) > before:
            self.buffer = self.buffer.new_empty(layers, pair, len(rows), *shape)
        self.buffer = self.buffer[:, :, : len(rows)]
        self.buffer[..., : self.length, :] = tokens
        if self.starts is not None:
            self.starts = self.starts[rows]

    def select(self, rows: Tensor) -> KVCache:
        """These rows (int64 [r]), copied."""
        layers, _, _, heads, room, width = self.buffer.shape
        chosen = KVCache((layers, len(rows), heads, room, width), self.buffer)
        chosen.length, tokens = self.length, self.buffer[..., : self.length, :]
        chosen.buffer[..., : self.length, :] = tokens.index_select(2, rows)
        chosen.starts = None if self.starts is None else self.starts[rows]
        return chosen

    def concat(self, other: KVCache) -> KVCache:
        """The rows of both, aligned at their last tokens."""
        caches = (self, other)
        starts = [
            cache.length - cache.row_lengths + self.buffer.new_zeros(cache.buffer.shape[2], dtype=torch.int64)
            for cache in caches
        ]
        firsts = [int(start.min()) for start in starts]  # positions that no row uses any more are left out
        length = max(cache.length - first for cache, first in zip(caches, firsts))
        room = max(cache.buffer.shape[-2] - cache.length for cache in caches)
        layers, _, _, heads, _, width = self.buffer.shape
        joined = KVCache((layers, sum(map(len, starts)), heads, length + room, width), self.buffer)
        joined.buffer[..., :length, :] = 0  # garbage times a weight of 0 may be NaN
        row = 0
        for cache, first, start in zip(caches, firsts, starts):
            tokens = cache.buffer[..., first : cache.length, :]
            joined.buffer[:, :, row : row + len(start), :, length - cache.length + first : length] = tokens
            row += len(start)
        joined.length = length
        joined.starts = torch.cat([start + length - cache.length for cache, start in zip(caches, starts)])
        return joined
