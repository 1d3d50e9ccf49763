"""Products with 4 bit weights by OpenVINO, where that is installed: [M, K] -> [M, N].

Its kernel reads a weight in 4 bits and multiplies it in whole numbers with activations in 8, which have a scale for
each group of inputs as the weights do. torch's kernel widens the weights instead, and takes several times as long at
five rows as at one.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import tempfile
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_MAX_ROWS = 64  # rows at a time: with more OpenVINO widens the weights first


@lru_cache(maxsize=1)
def _core() -> Any:
    import openvino

    return openvino.Core()


class OpenVinoLinear:
    """The product with one weight. Several threads may call it; they take turns."""

    def __init__(self, values: Tensor, scales: Tensor, zeros: Tensor, *, mapped: bool) -> None:
        """values uint8 [N, K / 2], two a byte, the first one low; scales in any float and zeros uint8 [N, groups].

        A value q stands for (q - zero) * scale.

        OpenVINO packs the weight anew and still wants the values as they were, which it does not read again. They are
        therefore left in a file: `mapped` says that they are mapped from one already, else a temporary one is made.
        """
        import openvino as ov
        from openvino import opset13 as op

        self.outputs, inputs, groups = len(values), 2 * values.shape[1], scales.shape[1]
        self._values = values.flatten() if mapped else _in_a_file(values.flatten())
        groups_shape = ov.Shape([self.outputs, groups, inputs // groups])
        steps = op.convert(op.constant(ov.Tensor(self._values.numpy(), groups_shape, ov.Type.u4)), "f32")
        steps = op.subtract(steps, op.convert(op.constant(zeros[..., None].numpy()), "f32"))
        weight = op.multiply(steps, op.constant(scales.float()[..., None].numpy()))
        weight = op.reshape(weight, op.constant([self.outputs, inputs]), special_zero=False)
        rows = op.parameter([-1, inputs], ov.Type.f32)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": inputs // groups,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # torch's threads use the same processors
        }
        model = ov.Model([op.matmul(rows, weight, False, True)], [rows])
        self._request = _core().compile_model(model, "CPU", settings).create_infer_request()
        self._lock = Lock()
        self(torch.zeros(1, inputs))  # now it is packed
        _drop_pages(self._values)

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenVinoLinear:
        return self  # nothing of it ever changes

    def __reduce__(self) -> Any:
        raise TypeError(
            "a weight that OpenVINO has packed cannot be pickled; load the model where it is needed"
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 [M, K] -> float32 [M, N]."""
        import openvino as ov

        out = rows.new_empty(len(rows), self.outputs)
        with self._lock:
            for some, result in zip(rows.contiguous().split(_MAX_ROWS), out.split(_MAX_ROWS), strict=True):
                self._request.set_input_tensor(ov.Tensor(some.numpy(), shared_memory=True))
                self._request.set_output_tensor(ov.Tensor(result.numpy(), shared_memory=True))
                self._request.infer()
        return out


def _in_a_file(values: Tensor) -> Tensor:
    """uint8 [n] -> the same in a temporary file that has no name any more, mapped."""
    with tempfile.TemporaryFile() as file:
        file.write(values.numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), len(values), access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _drop_pages(values: Tensor) -> None:
    """Let the system have the pages of what is mapped from a file and has not been written to."""
    page = mmap.PAGESIZE
    start = -(-values.data_ptr() // page) * page
    size = (values.data_ptr() + values.nbytes - start) // page * page
    if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
