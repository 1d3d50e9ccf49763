"""What users hand in: one image or many, opened and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from PIL import Image

from blip2.images import MAX_PIXELS, ImageError, ImageSource, load_image

BATCH_SIZE = 8  # images computed at a time

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class ListOf(Protocol[Item]):
    """A list for type checkers: `list` is invariant, so that a list[Path] would be no list of images."""

    def __iter__(self) -> Iterator[Item]: ...
    def reverse(self) -> None: ...


Many = ListOf[T] | tuple[T, ...]  # a str is one path, bytes are one file, an array is one image


def is_many(images: object) -> bool:
    """Whether the result must be a list."""
    return isinstance(images, list | tuple)


def as_list(images: Any) -> list[Any]:
    """One or many -> a list."""
    return list(images) if is_many(images) else [images]


def unnest(rows: list[list[T]], many: bool, several: bool) -> T | list[T] | list[list[T]]:
    """Results [images][texts] -> without the list over images unless `many`, over texts unless `several`."""
    results: list[list[T]] | list[T] = rows if several else [row[0] for row in rows]
    return results if many else results[0]


def in_batches(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Items in batches of `size`, each with the index of its first item."""
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size must be a whole number, 1 or more; got {size!r}")
    return ((i, items[i : i + size]) for i in range(0, len(items), size))


def open_image(image: ImageSource, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Image number `index` of a list (0: the first, or the only one) as RGB. Raises ImageError, which names it."""
    try:
        return load_image(image, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"image {index + 1}: {error}" if index else str(error)) from error
