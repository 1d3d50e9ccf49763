"""What a decoder keeps of the positions it has read: the keys and values of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PromptCache:
    """What a decoder has read: the keys and values of every layer. A value: reading on gives a new one.

    layers: one (keys, values) pair a layer, each [B, H, S, D].
    mask: bool [B, S], False where a position is padding.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    @property
    def length(self) -> int:
        """Positions read, padding included."""
        return self.mask.shape[1]

    def select(self, rows: Tensor) -> PromptCache:
        """The context of the prompts `rows` (int64 [k]), in that order."""
        return PromptCache(tuple((k[rows], v[rows]) for k, v in self.layers), self.mask[rows])

    def expand(self, rows: int) -> PromptCache:
        """A context of one prompt as the context of `rows` prompts, without copying."""
        assert self.mask.shape[0] == 1, "only a single prompt's context can be expanded"
        return PromptCache(
            tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.layers),
            self.mask.expand(rows, -1),
        )


def concat_prompt_caches(contexts: Sequence[PromptCache]) -> PromptCache:
    """What several decoders have read as what one has; the shorter ones padded on the left."""
    if len(contexts) == 1:
        return contexts[0]
    firsts = [int(context.mask.any(0).int().argmax()) for context in contexts]  # padding all have is left out
    length = max(context.length - first for context, first in zip(contexts, firsts))
    pads = [length - context.length + first for context, first in zip(contexts, firsts)]

    def join(parts: Iterable[Tensor]) -> Tensor:  # each [B, H, S, D]
        cut = (part[:, :, first:] for part, first in zip(parts, firsts))
        return torch.cat([F.pad(part, (0, 0, pad, 0)) for part, pad in zip(cut, pads)])

    layers = zip(*(context.layers for context in contexts), strict=True)
    joined = tuple((join(k for k, _ in layer), join(v for _, v in layer)) for layer in map(tuple, layers))
    masks = (context.mask[:, first:] for context, first in zip(contexts, firsts))
    return PromptCache(joined, torch.cat([F.pad(mask, (pad, 0)) for mask, pad in zip(masks, pads)]))


class KVCache:
    """Keys and values of the tokens written so far, one buffer a layer, allocated once.

    length: the tokens of the row that has written most.
    starts: int64 [R], where each row's tokens begin, where some began later; None: all at 0.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        """`shape`: layers, rows, heads, tokens at most, width of a head. Device and dtype are those of `like`."""
        self.buffer = like.new_empty((shape[0], 2, *shape[1:]))
        self.length = 0
        self.starts: Tensor | None = None

    @property
    def written(self) -> Tensor | int:
        """How many tokens each row has written: one number, or int64 [R]."""
        return self.length if self.starts is None else self.length - self.starts

    @property
    def unwritten(self) -> Tensor | None:
        """bool [R, length + 1], True before a row's first token; None where all rows began together."""
        if self.starts is None:
            return None
        return torch.arange(self.length + 1, device=self.starts.device) < self.starts[:, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [R, H, 1, D]; all of this layer's so far: [R, H, t + 1, D]."""
        here, end = self.buffer[layer], self.length + 1
        here[0, :, :, self.length : end] = key
        here[1, :, :, self.length : end] = value
        return here[0, :, :, :end], here[1, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; fewer rows drop the rest, more repeat them."""
        written = self.buffer[..., : self.length, :].index_select(2, rows)
        layers, pair, before, *shape = self.buffer.shape
        if len(rows) > before:
            self.buffer = self.buffer.new_empty(layers, pair, len(rows), *shape)
        self.buffer = self.buffer[:, :, : len(rows)]
        self.buffer[..., : self.length, :] = written
        if self.starts is not None:
            self.starts = self.starts[rows]

    def join(self, other: KVCache) -> KVCache:
        """The rows of both, whose last tokens then stand at the same place."""
        tails = (self, other)
        starts = [
            self.buffer.new_zeros(tail.buffer.shape[2], dtype=torch.int64)
            if tail.starts is None
            else tail.starts
            for tail in tails
        ]
        firsts = [int(start.min()) for start in starts]  # what nobody needs any more is left out
        length = max(tail.length - first for tail, first in zip(tails, firsts))
        room = max(tail.buffer.shape[-2] - tail.length for tail in tails)
        layers, _, _, heads, _, width = self.buffer.shape
        joined = KVCache((layers, sum(map(len, starts)), heads, length + room, width), self.buffer)
        joined.buffer[..., :length, :] = 0  # garbage times a weight of 0 may be NaN
        row = 0
        for tail, first, start in zip(tails, firsts, starts):
            to = length - tail.length + first
            joined.buffer[:, :, row : row + len(start), :, to:length] = tail.buffer[
                ..., first : tail.length, :
            ]
            row += len(start)
        joined.length = length
        joined.starts = torch.cat([start + length - tail.length for tail, start in zip(tails, starts)])
        return joined
