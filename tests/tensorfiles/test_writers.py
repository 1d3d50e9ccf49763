"""Files that others open: torch's own loader and numpy's pickles say what we wrote."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blip2.checkpoint import CheckpointError, TensorInfo, open_tensors
from blip2.tensorfiles import tensors as tensors_module
from blip2.tensorfiles.tensors import blocks
from blip2.tensorfiles.writers import NAME_TABLE, Writer, write_pdparams, write_safetensors, write_torch

TENSORS = {
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "single": torch.randn(70, 3, generator=torch.Generator().manual_seed(2)),
    "double": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.float64),
    "long": torch.arange(-3, 300),
    "truth": torch.tensor([True, False]),
    "scalar": torch.tensor(0.07),
    "empty": torch.empty(0, 4),
    "ünïcode": torch.ones(1),
}
INFO = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(writer: Writer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "BLOCK_ELEMENTS", 64)  # several pieces a tensor
    with path.open("wb") as file:
        writer(file, INFO, lambda name: blocks(TENSORS[name]))


def assert_equal(written: dict[str, Tensor]) -> None:
    assert [*written] == [*TENSORS] or written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            written[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


def test_torch_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(write_torch, tmp_path / "model.pth", monkeypatch)
    for mapped in (False, True):
        assert_equal(torch.load(tmp_path / "model.pth", weights_only=True, mmap=mapped)["model"])


class Numpy(pickle.Unpickler):
    """What paddle.load does: a pickle of numpy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
        return super().find_class(module, name)


def test_numpy_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(write_pdparams, tmp_path / "model_state.pdparams", monkeypatch)
    written = Numpy(io.BytesIO((tmp_path / "model_state.pdparams").read_bytes())).load()
    assert written.pop(NAME_TABLE) == {name: name for name in TENSORS}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in written.items()}
    assert arrays["brain"].dtype == np.uint16
    brain = torch.from_numpy(arrays.pop("brain").copy()).view(torch.bfloat16)
    assert_equal({name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | {"brain": brain})


@pytest.mark.parametrize("writer", [write_safetensors, write_torch, write_pdparams])
def test_our_readers_open_it(writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(writer, tmp_path / "file", monkeypatch)
    with open_tensors(tmp_path / "file") as tensors:
        assert_equal({name: tensors.copy(name) for name in tensors})
        assert_equal({name: tensors[name] for name in tensors})
        pieces = {name: torch.cat([*tensors.blocks(name), torch.empty(0)]) for name in ("single",)}
        assert torch.equal(pieces["single"], TENSORS["single"].reshape(-1))


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    info = {"odd": TensorInfo((2,), torch.float8_e4m3fn)}

    def read(name: str) -> Iterator[Tensor]:
        yield torch.zeros(2).to(torch.float8_e4m3fn)

    for writer in (write_torch, write_pdparams):
        with (
            pytest.raises(CheckpointError, match=r"odd is torch\.float8_e4m3fn"),
            (tmp_path / "file").open("wb") as file,
        ):
            writer(file, info, read)
