"""A digest of tensors' values, and which are not finite or too large for a narrower dtype: one pass for both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.tensorfiles.tensors import TensorFile, TensorInfo

_FP16_MAX = 65504.0
_MOST_THREADS = 4  # hashing takes longer than reading: 2 GB/s a core
_BLOCK = 1 << 18  # values read at a time: they are still in the processor's cache when they are looked at


@dataclass(frozen=True)
class Scan:
    """What one pass over all values of a file finds.

    digest: of every tensor's name, dtype, shape and values, whatever their order in the file.
    large: the largest absolute value of each tensor that has one beyond fp16's range; inf where one is not finite.
    """

    digest: str
    large: Mapping[str, float]


def scan_file(file: TensorFile) -> Scan:
    """Read all values of a file, a block of a few tensors at a time."""

    def scan(name: str) -> tuple[bytes, float]:
        return _scan_tensor(name, file.info[name], file.blocks(name, _BLOCK))

    with ThreadPoolExecutor(min(_MOST_THREADS, torch.get_num_threads())) as pool:
        results = dict(zip(file.info, pool.map(scan, file.info), strict=True))
    large = {name: largest for name, (_, largest) in results.items() if largest > _FP16_MAX}
    return Scan(join_digests(digest for digest, _ in results.values()), large)


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of tensors in memory, named; one at a time is copied where it lies on another device."""
    parts = []
    for name, tensor in tensors:
        info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        flat = tensor.detach().cpu().reshape(-1)
        parts.append(_scan_tensor(name, info, iter((flat,)))[0])
    return join_digests(parts)


def join_digests(parts: Iterable[bytes]) -> str:
    """One digest of several: their sum, so that neither their order nor the files they are spread over matter."""
    return f"{sum(int.from_bytes(part) for part in parts) % (1 << 256):064x}"


def _scan_tensor(name: str, info: TensorInfo, blocks: Iterator[Tensor]) -> tuple[bytes, float]:
    """A tensor's digest, and its largest absolute value; inf where one is not finite, 0 where it holds no floats."""
    digest = hashlib.sha256(repr((name, str(info.dtype), info.shape)).encode("utf-8", "surrogatepass"))
    largest = 0.0
    for block in blocks:
        if len(block):
            digest.update(block.contiguous().view(torch.uint8).numpy().data)
            largest = max(largest, _largest(block))
    return digest.digest(), largest


def _largest(block: Tensor) -> float:
    if block.is_complex():
        block = torch.view_as_real(block).reshape(-1)
    if not block.is_floating_point():
        return 0.0
    if block.dtype.itemsize == 1:  # torch compares no 8-bit floats
        block = block.float()
    low, high = torch.aminmax(block)  # NaN where one value is
    largest = max(-low.item(), high.item())
    return largest if math.isfinite(largest) and not math.isnan(low.item()) else math.inf
