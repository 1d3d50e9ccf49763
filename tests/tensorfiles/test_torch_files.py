"""Files of torch.save: equal to what torch itself reads from them, bit for bit, without running anything."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assemble import ROW, archive, pickled, torch_tensor
from test_open import equal, samples
from torch import Tensor, nn

from blip2.checkpoint import BrokenFileError, CheckpointError, UnsupportedFileError, open_tensors
from blip2.tensorfiles.filebytes import FileBytes

KINDS = [
    pytest.param(True, 2, id="archive"),
    pytest.param(True, 5, id="archive, protocol 5"),
    pytest.param(False, 2, id="legacy"),
    pytest.param(False, 4, id="legacy, protocol 4"),
]


def save(value: Any, path: Path, archive: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    return path


def assert_read(path: Path, theirs: Mapping[str, Tensor]) -> None:
    """Names in order, and every tensor in both ways of reading."""
    with open_tensors(path) as ours:
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            tensor = tensor.detach()
            assert equal(ours[name], tensor), name
            assert equal(ours.copy(name), tensor), name
            assert ours.info(name).shape == tuple(tensor.shape)
            assert ours.info(name).dtype == tensor.dtype
            assert ours.file(name).format == "torch"


@pytest.mark.parametrize(("archive", "protocol"), KINDS)
def test_every_dtype_and_layout(archive: bool, protocol: int, tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = samples() | {
        "complex128": torch.randn(3, dtype=torch.complex128),
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3:5],
        "steps": base[::2, 1::3],
        "one": base[5, 7],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "parameter": nn.Parameter(torch.randn(3)),
        "frozen": nn.Parameter(torch.randn(3), requires_grad=False),
        "a long name " * 50: torch.ones(1),
    }
    assert_read(save(tensors, tmp_path / "any name", archive, protocol), tensors)


@pytest.mark.parametrize(("archive", "protocol"), KINDS)
def test_shared_storages(archive: bool, protocol: int, tmp_path: Path) -> None:
    words = torch.randn(50, 64)
    path = save({"embed": words, "head": words, "part": words[10:20]}, tmp_path / "a.bin", archive, protocol)
    assert path.stat().st_size < 2 * words.nbytes  # stored once
    assert_read(path, {"embed": words, "head": words, "part": words[10:20]})


@pytest.mark.parametrize(("archive", "protocol"), KINDS)
def test_a_training_checkpoint(archive: bool, protocol: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 4)).half()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 5, 5, dtype=torch.half)).float().sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    saved = {
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "config": {"run": {"lr": 1e-4, "name": "stage 2", "amp": True, "none": None}, "list": [1, 2]},
        "scaler": scaler,
        "epoch": 3,
    }
    assert isinstance(saved["model"], OrderedDict)
    assert hasattr(saved["model"], "_metadata")
    assert_read(save(saved, tmp_path / "checkpoint.pth", archive, protocol), model.state_dict())
    assert_read(save(model.state_dict(), tmp_path / "plain.pth", archive, protocol), model.state_dict())


def test_big_endian_archives(tmp_path: Path) -> None:
    theirs = {name: tensor for name, tensor in samples().items() if tensor.dtype.itemsize < 16}
    out = io.BytesIO()
    torch.save(theirs, out)
    pickled = {}
    with zipfile.ZipFile(out) as source:
        records = {name: source.read(name) for name in source.namelist()}
    root = next(name.split("/")[0] for name in records)
    for key, tensor in enumerate(theirs.values()):
        width = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)
        name = f"{root}/data/{key}"
        pickled[name] = np.frombuffer(records[name], f"u{width}").byteswap().tobytes()
    with zipfile.ZipFile(tmp_path / "big.bin", "w") as file:
        for name, content in (records | pickled | {f"{root}/byteorder": b"big"}).items():
            file.writestr(zipfile.ZipInfo(name), content)
    assert_read(tmp_path / "big.bin", theirs)


@pytest.mark.parametrize(("archive", "protocol"), KINDS)
def test_opening_reads_no_values(
    archive: bool, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {str(i): torch.zeros(1 << 20) for i in range(8)}
    path = save(tensors, tmp_path / "a.bin", archive, protocol)
    counted = []
    original = FileBytes.read_into
    monkeypatch.setattr(FileBytes, "read_into", lambda *args: counted.append(len(args[2])) or original(*args))
    with open_tensors(path) as ours:
        assert sum(counted) < 1 << 18
        assert sum(ours.info(name).nbytes for name in ours) == 32 << 20
        ours["3"].sum()
        assert archive is (sum(counted) < 1 << 18)  # mapped in an archive, where values stand aligned


def test_shards(tmp_path: Path) -> None:
    tensors = samples()
    names = list(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for path in (tmp_path, index):
        with open_tensors(path) as opened:
            assert set(opened) == set(tensors)
            assert all(equal(opened[name], tensor) for name, tensor in tensors.items())


def test_archives_of_over_four_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths and places stand in other fields; here in a small archive."""
    pickle = pickled({"a": torch_tensor(container="archive")}, 2)
    narrow = archive(pickle, {"0": ROW})
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    (tmp_path / "a.bin").write_bytes(archive(pickle, {"0": ROW}))
    assert (tmp_path / "a.bin").stat().st_size > len(narrow) + 100
    assert_read(tmp_path / "a.bin", {"a": torch.arange(1.0, 7.0).reshape(2, 3)})


def test_what_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(1).expand(1_000_000)}, tmp_path / "repeats.bin")
    with pytest.raises(UnsupportedFileError, match=r"tensor 'a' shows the same values several times"):  # noqa: SIM117
        with open_tensors(path):
            pass
    path = save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.bin")
    with pytest.raises(CheckpointError, match=r"_rebuild_sparse_tensor', which no tensor needs"):  # noqa: SIM117
        with open_tensors(path):
            pass
    path = save(nn.Linear(2, 2), tmp_path / "module.bin")
    with pytest.raises(CheckpointError, match=r"Linear', which no tensor needs"), open_tensors(path):
        pass
    path = save({"a": torch.arange(1000.0)}, tmp_path / "shrinks.bin")
    with open_tensors(path) as opened, path.open("r+b") as file:
        file.truncate(1000)
        with pytest.raises(BrokenFileError, match="tensor 'a' cannot be read: the file became shorter"):
            opened.copy("a")
