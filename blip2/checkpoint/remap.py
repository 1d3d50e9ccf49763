"""A checkpoint's tensors under the names and in the shapes of another layout, one made when it is asked for.

Between a layout and Hugging Face's stands a plan: for each wanted tensor, which stored ones it is made of and how.
Linear weights are transposed, a joint bias is put together or taken apart; everything else is a new name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.checkpoint.layouts import HUGGING_FACE, LAVIS, Layout, is_transposed, to_hugging_face, to_theirs
from blip2.tensorfiles.tensors import CheckpointError, TensorInfo, Tensors, quoted

BLOCK_ELEMENTS = 8 << 20  # how much is converted and written at a time: 32 MB of fp32
_T5_MARKS = ("t5_model.", "language_model.t5.", "language_model.encoder.")
_CLIP_ADDED = {  # what CLIP stores without leading ones
    "vision_model.embeddings.class_embedding": 2,
    "vision_model.embeddings.position_embedding": 1,
}


@dataclass(frozen=True)
class Piece:
    """How a tensor is made.

    stored: the tensors it is made of, joined along the first side; None stands for zeros.
    transposed: the only stored one is turned round.
    third: it is the first, second or third part (0, 1, 2) of the only stored one.
    """

    info: TensorInfo
    stored: tuple[str | None, ...]
    transposed: bool = False
    third: int | None = None

    @property
    def plain(self) -> str | None:
        """The stored tensor that this is as it stands, but for its name and leading ones."""
        return None if self.transposed or self.third is not None or len(self.stored) > 1 else self.stored[0]


class Translated:
    """Tensors made from others: a file of tensors, as far as its users can see."""

    format = "translated"
    metadata: Mapping[str, str] = {}

    def __init__(self, tensors: Tensors, pieces: Mapping[str, Piece]) -> None:
        self.tensors, self.pieces = tensors, pieces
        self.info: Mapping[str, TensorInfo] = {name: piece.info for name, piece in pieces.items()}

    def mapped(self, name: str) -> Tensor:
        """The tensor; mapped from the file where it stands there as it is."""
        piece = self.pieces[name]
        if piece.plain is not None:
            return self.tensors[piece.plain].reshape(piece.info.shape)
        return self.copied(name)

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        piece = self.pieces[name]
        if piece.transposed:
            out = torch.empty(piece.info.shape, dtype=piece.info.dtype)
            done = 0
            for block in self.blocks(name):
                out.view(-1)[done : done + len(block)] = block
                done += len(block)
            return out
        parts = [None if stored is None else self.tensors.copy(stored) for stored in piece.stored]
        if len(parts) == 1:
            assert parts[0] is not None
            whole = parts[0] if piece.third is None else parts[0].chunk(3)[piece.third].clone()
            return whole.reshape(piece.info.shape)
        length = next(len(part) for part in parts if part is not None)
        zeros = torch.zeros(length, dtype=piece.info.dtype)
        return torch.cat([zeros if part is None else part for part in parts])

    def place(self, name: str) -> None:
        """None: `blocks` knows better."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The values in order, flat, in pieces; a transposed tensor is never in memory twice."""
        piece = self.pieces[name]
        if piece.plain is not None:
            yield from read_blocks(self.tensors, piece.plain)
            return
        if not piece.transposed:
            yield from blocks(self.copied(name))
            return
        assert piece.stored[0] is not None
        stored = self.tensors.copy(piece.stored[0])  # [in, out] for [out, in], or the other way round
        rows = max(1, BLOCK_ELEMENTS // max(1, stored.shape[0]))
        for start in range(0, stored.shape[1], rows):
            # first a copy of some columns, then the turn: torch turns a whole matrix fast, a part of one slowly
            yield stored[:, start : start + rows].contiguous().t().contiguous().view(-1)


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values in order, flat, in pieces."""
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), BLOCK_ELEMENTS):
        yield flat[start : start + BLOCK_ELEMENTS]


def read_blocks(tensors: Tensors, name: str) -> Iterator[Tensor]:
    """The values of a tensor in order, flat, in pieces; read piece by piece where the file lets them."""
    file, info = tensors.file(name), tensors.info(name)
    if isinstance(file, Translated):
        yield from file.blocks(name)
        return
    place = file.place(name)
    if place is None:
        yield from blocks(tensors.copy(name))
        return
    content, start = place
    width = BLOCK_ELEMENTS * info.dtype.itemsize
    for done in range(0, info.nbytes, width):
        block = torch.empty(min(width, info.nbytes - done), dtype=torch.uint8)
        content.read_into(start + done, block.numpy().data, f"tensor {quoted(name)}")
        yield block.view(info.dtype)


def equal_values(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two streams of values are equal, however they are cut. Values that are no number equal nothing."""
    return all(torch.equal(a, b) for a, b in side_by_side(one, other))


def side_by_side(one: Iterable[Tensor], other: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two streams of equally many values, cut alike."""
    left, right = iter(one), iter(other)
    a, b = torch.empty(0), torch.empty(0)
    while True:
        a = a if len(a) else next(left, a)
        b = b if len(b) else next(right, b)
        length = min(len(a), len(b))
        if not length:
            assert len(a) == len(b), "one stream is longer than the other"
            return
        yield a[:length], b[:length]
        a, b = a[length:], b[length:]


def joined(*several: Mapping[str, tuple[Tensors, str]]) -> Tensors:
    """Tensors of several files as one; of two with one name the first counts. name -> (where it is, its name there)."""
    files: dict[str, Translated] = {}
    for part in several:
        for name, (tensors, stored) in part.items():
            if name not in files:
                files[name] = Translated(tensors, {name: Piece(tensors.info(stored), (stored,))})
    return Tensors(files)


def view(tensors: Tensors, pieces: Mapping[str, Piece]) -> Tensors:
    """Tensors made from others."""
    return Tensors(dict.fromkeys(pieces, Translated(tensors, pieces)))


# --- a layout -> Hugging Face's --------------------------------------------------------------------------------------


def as_hugging_face(tensors: Tensors, layout: Layout) -> Tensors:
    """A file's tensors under Hugging Face's names and in its shapes.

    A tensor that the layout has no name for keeps its own, for the strict check of whoever loads it.
    """
    if layout is HUGGING_FACE:
        return tensors
    rules = layout.all_rules
    t5 = any(name.startswith(_T5_MARKS) for name in tensors)
    pieces: dict[str, Piece] = {}
    for name in tensors:
        if layout.is_dropped(name) or _is_other_bias(name, tensors, layout):
            continue
        info = tensors.info(name)
        if layout.split_qkv_bias and name.endswith(".q_bias"):
            joint = name.removesuffix("q_bias")
            stored = (name, joint + "k_bias" if joint + "k_bias" in tensors else None, joint + "v_bias")
            target = to_hugging_face(joint + "qkv.bias", rules) or name
            if target == name or stored[2] not in tensors or len(info.shape) != 1:
                target, piece = name, Piece(info, (name,))
            else:
                if any(each is not None and tensors.info(each) != info for each in stored):
                    raise CheckpointError(f"{name} and the other biases beside it differ in length or dtype")
                piece = Piece(TensorInfo((3 * info.shape[0],), info.dtype), stored)
        else:
            target = to_hugging_face(name, rules) or name
            piece = _turned(info, name, is_transposed(target, len(info.shape), layout, t5=t5), target)
        if target in pieces:
            raise CheckpointError(
                f"the file holds {target} under two names, {name} and {pieces[target].stored[0]}"
            )
        pieces[target] = piece
    return view(tensors, pieces)


def _is_other_bias(name: str, tensors: Tensors, layout: Layout) -> bool:
    """Whether this is the key's or value's bias of a joint one that its query's bias stands for."""
    if not layout.split_qkv_bias or not name.endswith((".k_bias", ".v_bias")):
        return False
    return name[: -len("k_bias")] + "q_bias" in tensors


def _turned(info: TensorInfo, name: str, transposed: bool, target: str) -> Piece:
    shape = info.shape
    if transposed:
        shape = (shape[1], shape[0])
    elif target in _CLIP_ADDED and len(shape) == 3 - _CLIP_ADDED[target]:
        shape = (1,) * _CLIP_ADDED[target] + shape
    elif target == "temp" and shape == (1,):
        shape = ()
    return Piece(TensorInfo(shape, info.dtype), (name,), transposed)


# --- Hugging Face's -> a layout --------------------------------------------------------------------------------------


def as_layout(tensors: Tensors, layout: Layout) -> Tensors:
    """Tensors under Hugging Face's names as the layout stores them; the inverse of `as_hugging_face`.

    Raises:
        CheckpointError: a tensor the layout has no place for.
    """
    if layout is HUGGING_FACE:
        return tensors
    rules = layout.rules(tensors)
    t5 = any(name.startswith(_T5_MARKS) for name in tensors)
    clip = any(name.startswith("vision_model.pre_layernorm.") for name in tensors)
    pieces: dict[str, Piece] = {}
    for name in tensors:
        info = tensors.info(name)
        target = to_theirs(name, rules)
        if target is None:
            raise CheckpointError(f"{name} has no place in the layout of {layout.name}")
        if layout.split_qkv_bias and not clip and name.endswith(".self_attn.qkv.bias"):
            pieces |= _split_bias(tensors, name, target.removesuffix("qkv.bias"))
            continue
        shape = info.shape
        transposed = is_transposed(name, len(shape), layout, t5=t5)
        if transposed:
            shape = (shape[1], shape[0])
        elif layout is LAVIS and clip and name in _CLIP_ADDED:
            shape = shape[_CLIP_ADDED[name] :]
        elif layout.transposed and name == "temp":
            shape = (1,)
        pieces[target] = Piece(TensorInfo(shape, info.dtype), (name,), transposed)
    head, words = "language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"
    if layout.transposed and not t5 and words in tensors and head not in tensors:
        # PaddleNLP never ties OPT's head: it is stored, or drawn at random
        target = to_theirs(head, rules)
        assert target is not None
        pieces[target] = Piece(tensors.info(words), (words,))
    return view(tensors, pieces)


def _split_bias(tensors: Tensors, name: str, prefix: str) -> dict[str, Piece]:
    """A joint bias as the query's and the value's. The key's is zero and not stored; where it is not (it changes no
    output, softmax takes it away, but training may leave it so) it is kept beside them, and LAVIS does not look."""
    length, dtype = tensors.info(name).shape[0] // 3, tensors.info(name).dtype
    info = TensorInfo((length,), dtype)
    key = tensors.copy(name).chunk(3)[1].contiguous()
    kept = ("q", "k", "v") if bool(key.view(torch.uint8).any()) else ("q", "v")
    return {f"{prefix}{each}_bias": Piece(info, (name,), third="qkv".index(each)) for each in kept}


def parameters(tensors: Tensors) -> int:
    """How many values the tensors hold."""
    return sum(math.prod(tensors.info(name).shape) for name in tensors)
