"""A checkpoint's tensors under the names and in the shapes of another layout, each computed when it is read.

A table of recipes leads from a layout to Hugging Face's and back: which stored tensors a tensor is made of, and how.
Linear weights are transposed, a joint bias is concatenated or split; everything else is a new name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.checkpoint.key_mapping import HF_HEAD, HF_OPT_EMBEDDINGS, rename
from blip2.checkpoint.layouts import HUGGING_FACE, Layout
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import BLOCK_ELEMENTS, TensorFile, TensorInfo, Tensors

_T5_MARKS = ("t5_model.", "language_model.t5.", "language_model.encoder.")


@dataclass(frozen=True)
class TensorRecipe:
    """How a tensor is made of stored ones.

    stored: their names; they are concatenated along the first side. None stands for zeros.
    transposed: the only stored one is transposed.
    third: it is the first, second or third part (0, 1, 2) of the only stored one.
    """

    info: TensorInfo
    stored: tuple[str | None, ...]
    transposed: bool = False
    third: int | None = None

    @property
    def plain(self) -> str | None:
        """The stored tensor that differs from this in nothing but its name and leading ones."""
        return None if self.transposed or self.third is not None or len(self.stored) > 1 else self.stored[0]


class RemappedTensors(TensorFile):
    """Tensors made of others."""

    format = "remapped"

    def __init__(self, tensors: Tensors, recipes: Mapping[str, TensorRecipe]) -> None:
        self.tensors, self.recipes = tensors, recipes
        self.info = {name: recipe.info for name, recipe in recipes.items()}

    def mapped(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        if recipe.plain is not None:
            return self.tensors[recipe.plain].reshape(recipe.info.shape)
        return self.copied(name)

    def copied(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        parts = [None if part is None else self.tensors.copy(part) for part in recipe.stored]
        if len(parts) == 1:
            assert parts[0] is not None
            if recipe.transposed:
                return parts[0].t().contiguous()
            stored = parts[0] if recipe.third is None else parts[0].chunk(3)[recipe.third].clone()
            return stored.reshape(recipe.info.shape)
        length = next(len(part) for part in parts if part is not None)
        zeros = torch.zeros(length, dtype=recipe.info.dtype)
        return torch.cat([zeros if part is None else part for part in parts])

    def sources(self, name: str) -> Iterator[tuple[TensorFile, str]]:
        for part in filter(None, self.recipes[name].stored):
            yield from self.tensors.file(part).sources(part)

    def blocks(self, name: str, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
        """A transposed tensor is never in memory twice."""
        recipe = self.recipes[name]
        if not recipe.transposed:
            yield from (
                super().blocks(name, size) if recipe.plain is None else self.tensors.blocks(recipe.plain)
            )
            return
        assert recipe.stored[0] is not None
        stored = self.tensors.copy(recipe.stored[0])  # [in, out] for [out, in], or the other way round
        rows = max(1, size // max(1, stored.shape[0]))
        for start in range(0, stored.shape[1], rows):
            # copied before they are transposed: torch transposes a whole matrix fast, a part of one slowly
            yield stored[:, start : start + rows].contiguous().t().contiguous().view(-1)


def equal_values(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two streams of values of one dtype are equal, in pieces of whatever lengths; NaN equals itself."""
    return all(torch.equal(a, b) or same_bits(a, b) for a, b in aligned_blocks(one, other))


def same_bits(expected: Tensor, actual: Tensor) -> bool:
    """Whether values are equal bit by bit; one that was stored in fewer bits is widened first."""
    widened = actual.to(expected.dtype)
    return torch.equal(expected.contiguous().view(torch.uint8), widened.contiguous().view(torch.uint8))


def aligned_blocks(one: Iterable[Tensor], other: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two streams of equally many values, in pieces of the same lengths."""
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


def remap_tensors(tensors: Tensors, recipes: Mapping[str, TensorRecipe]) -> Tensors:
    """Tensors made of others, by name."""
    return Tensors(dict.fromkeys(recipes, RemappedTensors(tensors, recipes)))


def rename_tensors(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Some tensors under other names. names: new name -> the name in `tensors`."""
    recipes = {new: TensorRecipe(tensors.info(old), (old,)) for new, old in names.items()}
    return remap_tensors(tensors, recipes)


def to_hf_layout(tensors: Tensors, layout: Layout) -> Tensors:
    """A file's tensors under Hugging Face's names and in its shapes.

    A tensor that the layout has no name for keeps its own, for the strict check of whoever loads it.
    """
    if layout is HUGGING_FACE:
        return tensors
    rules = layout.all_rules
    t5 = any(name.startswith(_T5_MARKS) for name in tensors)
    recipes: dict[str, TensorRecipe] = {}
    for name in tensors:
        if layout.is_dropped(name) or _is_other_bias(name, tensors, layout):
            continue
        info = tensors.info(name)
        if layout.split_qkv_bias and name.endswith(".q_bias"):
            joint = name.removesuffix("q_bias")
            stored = (name, joint + "k_bias" if joint + "k_bias" in tensors else None, joint + "v_bias")
            target = rename(joint + "qkv.bias", rules, back=True) or name
            if target == name or stored[2] not in tensors or len(info.shape) != 1:
                target, recipe = name, TensorRecipe(info, (name,))
            else:
                if any(part is not None and tensors.info(part) != info for part in stored):
                    raise CheckpointError(f"{name} and the other biases beside it differ in length or dtype")
                recipe = TensorRecipe(TensorInfo((3 * info.shape[0],), info.dtype), stored)
        else:
            target = rename(name, rules, back=True) or name
            recipe = _reshaped(info, name, target, layout, t5=t5)
        if target in recipes:
            raise CheckpointError(
                f"the file holds {target} under two names, {name} and {recipes[target].stored[0]}"
            )
        recipes[target] = recipe
    return remap_tensors(tensors, recipes)


def _is_other_bias(name: str, tensors: Tensors, layout: Layout) -> bool:
    """Whether this is the key's or value's bias of a joint one, which is made with the query's bias."""
    if not layout.split_qkv_bias or not name.endswith((".k_bias", ".v_bias")):
        return False
    return name[: -len("k_bias")] + "q_bias" in tensors


def _reshaped(info: TensorInfo, name: str, target: str, layout: Layout, *, t5: bool) -> TensorRecipe:
    shape, ones = info.shape, layout.leading_ones.get(target, 0)
    transposed = layout.is_transposed(target, len(shape), t5=t5)
    if transposed:
        shape = (shape[1], shape[0])
    elif ones and len(shape) == 3 - ones:
        shape = (1,) * ones + shape
    elif target == "temp" and shape == (1,):
        shape = ()
    return TensorRecipe(TensorInfo(shape, info.dtype), (name,), transposed)


def from_hf_layout(tensors: Tensors, layout: Layout) -> Tensors:
    """Tensors under Hugging Face's names as the layout stores them; the inverse of `to_hf_layout`.

    Raises:
        CheckpointError: a tensor the layout has no place for.
    """
    if layout is HUGGING_FACE:
        return tensors
    rules = layout.rules(tensors)
    t5 = any(name.startswith(_T5_MARKS) for name in tensors)
    clip = any(name.startswith("vision_model.pre_layernorm.") for name in tensors)
    recipes: dict[str, TensorRecipe] = {}
    for name in tensors:
        info = tensors.info(name)
        target = rename(name, rules)
        if target is None:
            raise CheckpointError(f"{name} has no place in the layout of {layout.name}")
        if layout.split_qkv_bias and not clip and name.endswith(".self_attn.qkv.bias"):
            recipes |= _split_bias(tensors, name, target.removesuffix("qkv.bias"))
            continue
        shape = info.shape
        transposed = layout.is_transposed(name, len(shape), t5=t5)
        if transposed:
            shape = (shape[1], shape[0])
        elif clip and name in layout.leading_ones:
            shape = shape[layout.leading_ones[name] :]
        elif layout.transposed and name == "temp":
            shape = (1,)
        recipes[target] = TensorRecipe(TensorInfo(shape, info.dtype), (name,), transposed)
    if layout.transposed and not t5 and HF_OPT_EMBEDDINGS in tensors and HF_HEAD not in tensors:
        # PaddleNLP never ties OPT's head: it is stored, or drawn at random
        target = rename(HF_HEAD, rules)
        assert target is not None
        recipes[target] = TensorRecipe(tensors.info(HF_OPT_EMBEDDINGS), (HF_OPT_EMBEDDINGS,))
    return remap_tensors(tensors, recipes)


def _split_bias(tensors: Tensors, name: str, prefix: str) -> dict[str, TensorRecipe]:
    """A joint bias as the query's and the value's. The key's is zero and not stored. Where training has left another
    value in it, which changes no output (softmax cancels it), it is kept beside them, and LAVIS does not read it."""
    length, dtype = tensors.info(name).shape[0] // 3, tensors.info(name).dtype
    info = TensorInfo((length,), dtype)
    key = tensors.copy(name).chunk(3)[1].contiguous()
    kept = ("q", "k", "v") if bool(key.view(torch.uint8).any()) else ("q", "v")
    return {f"{prefix}{part}_bias": TensorRecipe(info, (name,), third="qkv".index(part)) for part in kept}
