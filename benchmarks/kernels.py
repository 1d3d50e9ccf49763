"""What each kernel takes for one weight of OPT-6.7B's size, 16384 x 4096, at a few numbers of rows.

    python -m benchmarks.kernels

1 row is a greedy step's, 5 a step with five beams, 36 a caption's prompt, 677 an image's. Several weights take turns so
that no cache helps. Printed are milliseconds, the least of a few runs: the machine may be shared. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.modeling.layers import cpu_has_bf16
from blip2.quantization import linear
from blip2.quantization.formats import Int4Weight, Int8Weight
from blip2.quantization.linear import (
    Int4Linear,
    Int8ImageLinear,
    Int8Linear,
    onednn_multiplies,
    openvino_multiplies,
)
from blip2.quantization.packed import PackedLinear

OUTPUTS, INPUTS = 16384, 4096
ROWS = (1, 5, 36, 677)
WEIGHTS = 4

Kernel = Callable[[Tensor], Tensor]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{'ms at so many rows':44}" + "".join(f"{rows:>9}" for rows in ROWS))
    least_ms = {}
    with torch.inference_mode():
        for name, make, dtype in kernels():
            layers = [make(torch.randn(OUTPUTS, INPUTS) * 0.02) for _ in range(WEIGHTS)]
            least_ms[name] = {rows: least(layers, torch.randn(rows, INPUTS).to(dtype)) for rows in ROWS}
            del layers
            print(f"{name:44}" + "".join(f"{least_ms[name][rows]:9.2f}" for rows in ROWS), flush=True)
    print(json.dumps(least_ms))


def kernels() -> Iterator[tuple[str, Callable[[Tensor], Kernel], torch.dtype]]:
    """Name, what makes a layer of a float weight, and the dtype of its rows."""

    def by_torch(weight: Tensor) -> Kernel:
        original = linear.openvino_multiplies
        linear.openvino_multiplies = lambda: False
        try:
            return Int4Linear(Int4Weight.of(weight), None)
        finally:
            linear.openvino_multiplies = original

    def plain(weight: Tensor) -> Kernel:
        narrow = weight.bfloat16()
        return lambda rows: F.linear(rows, narrow)

    narrow, wide = torch.bfloat16, torch.float32
    yield "bf16, as stored", plain, narrow
    if cpu_has_bf16():
        yield "bf16, packed for oneDNN", lambda weight: PackedLinear(weight.bfloat16(), None), narrow
    yield "8 bits, FBGEMM", lambda weight: Int8Linear(Int8Weight.of(weight), None, hi_lo=False), wide
    yield "8 bits, FBGEMM, hi/lo split", hi_lo_split, wide
    if onednn_multiplies():
        yield "8 bits, oneDNN", lambda weight: Int8ImageLinear(Int8Weight.of(weight), None), wide
    yield "4 bits, torch", by_torch, wide
    if openvino_multiplies():
        yield "4 bits, OpenVINO", lambda weight: Int4Linear(Int4Weight.of(weight), None), wide


def hi_lo_split(weight: Tensor) -> Kernel:
    """Every token an outlier: one value of it is a hundred times as large as the others."""
    layer = Int8Linear(Int8Weight.of(weight), None)

    def run(rows: Tensor) -> Tensor:
        rows[:, 0] = 400
        return layer(rows)

    return run


def least(layers: list[Kernel], rows: Tensor) -> float:
    """Milliseconds of the quickest run, the layers in turns."""
    taken = []
    for turn in range(5 if len(rows) > 100 else 16):
        start = time.perf_counter()
        layers[turn % len(layers)](rows)
        taken.append(time.perf_counter() - start)
    return round(min(taken) * 1e3, 2)


if __name__ == "__main__":
    main()
