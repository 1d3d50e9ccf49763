"""Files of paddle.save: those that Paddle itself wrote (fixtures/), and what else numpy writes into a pickle."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_open import bits, equal
from torch import Tensor

from blip2.checkpoint import UnsafeFileError, UnsupportedFileError, open_tensors
from blip2.tensorfiles.filebytes import FileBytes

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def theirs() -> dict[str, bytes]:
    """The values Paddle saved, as bits; a name ends with its dtype."""
    return {name: bits(tensor) for name, tensor in load_file(FIXTURES / "expected.safetensors").items()}


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("protocol-2", 15), ("protocol-3", 15), ("protocol-4", 15), ("numpy1", 15),
        ("nested-2", 2), ("nested-4", 2), ("pairs", 2), ("split-2", 2), ("split-3", 2),
    ],
)  # fmt: skip
def test_what_paddle_wrote(file: str, count: int, theirs: dict[str, bytes]) -> None:
    with open_tensors(FIXTURES / f"{file}.pdparams") as ours:
        assert len(ours) == count
        for name in ours:
            dtype = getattr(torch, name.rsplit(".", 1)[1])
            for tensor in (ours[name], ours.copy(name)):
                assert (tensor.dtype, bits(tensor)) == (dtype, theirs[name]), name
                assert ours.info(name).shape == tuple(tensor.shape)
                assert ours.info(name).dtype == dtype
            assert ours.file(name).format == "paddle"
        if count == 15:
            assert set(ours) == set(theirs)
            assert ours.info("empty.float32").shape == (0, 4)
            assert ours.info("scalar.float32").shape == ()
        assert ours.info("long.float32").shape == (19, 31)


def test_the_recorded_files_are_what_they_are_for() -> None:
    for name, holds in {
        "split-2": b"UnpackBigParamInfor@@", "split-3": b"long.bfloat16@@.1", "protocol-2": b"_codecs\nencode",
        "protocol-4": b"numpy._core.multiarray", "numpy1": b"numpy.core.multiarray", "nested-4": b"optimizer",
        "protocol-3": b"StructuredToParameterName@@", "nested-2": b"tuple",
    }.items():  # fmt: skip
        assert holds in (FIXTURES / f"{name}.pdparams").read_bytes()


def test_what_paddle_wrote_otherwise_is_refused() -> None:
    with (
        pytest.raises(
            UnsafeFileError, match=r"calls Python's eval, as Paddle does when it saves C\+\+ tensors"
        ),
        open_tensors(FIXTURES / "from-cpp.pdparams"),
    ):
        pass
    with pytest.raises(UnsupportedFileError, match=r"Paddle's binary format .*use_binary_format=True"):  # noqa: SIM117
        with open_tensors(FIXTURES / "binary.pdparams"):
            pass


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_orders_of_bytes_and_of_values(protocol: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for dtype in ("f2", "f4", "f8", "i2", "i4", "i8", "i1", "u1", "?", "c8", "c16"):
        for order in "<>":
            array = (random.normal(size=(7, 5, 11)) * 50).astype(np.dtype(dtype).newbyteorder(order))
            arrays[f"{dtype} {order}"] = array
            arrays[f"{dtype} {order} columns first"] = np.asfortranarray(array)
    arrays["short columns first"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps(arrays, protocol))
    with open_tensors(tmp_path) as ours:
        assert list(ours) == list(arrays)
        for name, array in arrays.items():
            native = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")).copy())
            assert equal(ours[name], native), name
            assert equal(ours.copy(name), native), name


def test_shards(tmp_path: Path) -> None:
    arrays = {f"layer.{i}": np.full((3, i), i, np.float32) for i in range(6)}
    weight_map = {}
    for i in range(2):
        shard = f"model_state-0000{i + 1}-of-00002.pdparams"
        held = {name: arrays[name] for name in list(arrays)[i::2]}
        names = {"StructuredToParameterName@@": {name: name for name in held}}
        (tmp_path / shard).write_bytes(pickle.dumps({**held, **names}, 4))
        weight_map |= dict.fromkeys(held, shard)
    index = tmp_path / "model_state.pdparams.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for path in (tmp_path, index):
        with open_tensors(path) as ours:
            assert set(ours) == set(arrays)
            assert all(equal(ours[name], torch.from_numpy(array)) for name, array in arrays.items())


def test_opening_reads_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {str(i): np.zeros(1 << 20, np.float32) for i in range(4)}
    counted: list[int] = []
    original = FileBytes.read_into
    monkeypatch.setattr(FileBytes, "read_into", lambda *args: counted.append(len(args[2])) or original(*args))
    for protocol in (2, 4):
        (tmp_path / "model.pdparams").write_bytes(pickle.dumps(arrays, protocol))
        counted.clear()
        with open_tensors(tmp_path) as ours:
            assert sum(ours.info(name).nbytes for name in ours) == 16 << 20
            assert sum(counted) < 1 << 18
            ours.copy("2")
            assert 4 << 20 <= sum(counted) < 5 << 20


def write_huge(path: Path, count: int, length: int, protocol: int) -> list[tuple[float, float]]:
    """A state dict of `count` rows of `length` floats, streamed out; mostly holes, so that it takes little disk.

    Returns the first and last value of each row.
    """
    ends = []
    kind = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4I0\nI1\ntR(I3\nX\x01\x00\x00\x00<NNNI-1\nI-1\nI0\ntb"
    with path.open("wb") as file:
        file.write(b"\x80" + bytes([protocol]) + b"}(")
        for i in range(count):
            name = f"row.{i}".encode()
            file.write(b"X" + struct.pack("<I", len(name)) + name)
            file.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntX\x01\x00\x00\x00btR")
            file.write(b"(I1\n(J" + struct.pack("<i", length) + b"t" + kind + b"\x89")
            if protocol == 2:
                file.write(b"c_codecs\nencode\n(X" + struct.pack("<I", 4 * length))
            else:
                file.write(b"B" + struct.pack("<I", 4 * length))
            first, last = 1.0 + i, -2.0 - i
            start = file.tell()
            if protocol == 2:  # as a text: ASCII alone here, so that the length is known before
                first, last = (struct.unpack("<f", bytes([i % 100 + 1, 2, 3, byte]))[0] for byte in (64, 65))
            file.write(struct.pack("<f", first))
            file.seek(start + 4 * (length - 1))
            file.write(struct.pack("<f", last))
            ends.append((first, last))
            file.write(b"X\x06\x00\x00\x00latin1tR" if protocol == 2 else b"")
            file.write(b"tb")
        file.write(b"u.")
    return ends


PROGRAM = """
import json, resource, sys
from blip2.checkpoint import open_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with open_tensors(sys.argv[1]) as tensors:
    pass
before = peak()
ends = []
with open_tensors(sys.argv[2]) as tensors:
    opened = peak()
    for name in tensors:
        tensor = tensors.copy(name)
        ends.append((tensor[0].item(), tensor[-1].item()))
        del tensor
print(json.dumps({"opened": opened - before, "read": peak() - before, "ends": ends}))
"""


@pytest.mark.full
@pytest.mark.parametrize("protocol", [2, 4])
def test_two_gigabytes_in_the_memory_of_one_tensor(protocol: int, tmp_path: Path) -> None:
    length = 16 << 20  # 64 MiB each
    ends = write_huge(tmp_path / "huge.pdparams", 32, length, protocol)
    assert (tmp_path / "huge.pdparams").stat().st_size > 2 << 30
    command = [sys.executable, "-c", PROGRAM, FIXTURES / "protocol-2.pdparams", tmp_path / "huge.pdparams"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [tuple(pair) for pair in result["ends"]] == ends
    assert result["opened"] < 4 << 20
    assert result["read"] < 4 * length + (32 << 20)


def test_streamed_files_are_those_numpy_writes(tmp_path: Path) -> None:
    for protocol in (2, 4):
        ends = write_huge(tmp_path / "small.pdparams", 3, 1000, protocol)
        theirs = pickle.loads((tmp_path / "small.pdparams").read_bytes())
        with open_tensors(tmp_path / "small.pdparams") as ours:
            assert list(ours) == list(theirs)
            for (name, array), pair in zip(theirs.items(), ends):
                assert equal(ours[name], torch.from_numpy(array.copy()))
                tensor: Tensor = ours[name]
                assert (tensor[0].item(), tensor[-1].item()) == pair
