"""Tensor files: bit-exact and lazy, and no file that lies gets far."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2.checkpoint import (
    BrokenFileError,
    CheckpointError,
    TensorInfo,
    UnsafeFileError,
    UnsupportedFileError,
    open_tensors,
)
from blip2.tensorfiles.open import FOLDER_FILES
from blip2.tensorfiles.safetensors_files import DTYPES
from blip2.tensorfiles.tensors import blocks
from blip2.tensorfiles.writers import write_safetensors

INDEX = "model.safetensors.index.json"


def samples() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, odd shapes among them; bit patterns, so not-a-numbers too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        raw = torch.randint(
            0, 2 if dtype is torch.bool else 256, (3 * 5 * dtype.itemsize,), generator=generator
        )
        tensors[f"a {dtype}"] = raw.to(torch.uint8).view(dtype).reshape(3, 5)
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.zeros(0, 4)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.dtype, first.shape, bits(first)) == (second.dtype, second.shape, bits(second))


def raw_file(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- reading -------------------------------------------------------------------------------------------------------


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = samples()
    save_file(tensors, tmp_path / "any name.safetensors")
    with open_tensors(tmp_path / "any name.safetensors") as opened:
        assert set(opened.keys()) == tensors.keys()
        assert len(opened) == len(tensors)
        assert "scalar" in opened
        assert "other" not in opened
        for name, tensor in tensors.items():
            assert equal(opened[name], tensor)
            assert equal(opened.copy(name), tensor)
            assert opened.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)
            assert opened.info(name).nbytes == tensor.nbytes
        with pytest.raises(KeyError):
            opened["other"]


def test_a_folder_and_its_shards(tmp_path: Path) -> None:
    tensors = samples()
    names = sorted(tensors)
    shards = {f"model-0000{i}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for path in (tmp_path, str(tmp_path), tmp_path / INDEX):
        with open_tensors(path) as opened:
            assert set(opened) == tensors.keys()
            assert all(equal(opened[name], tensor) for name, tensor in tensors.items())
    save_file({"single": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as opened:
        assert list(opened) == ["single"]


@pytest.mark.parametrize(("name", "save"), [("model.safetensors", save_file), ("a.bin", torch.save)])
def test_tensors_outlive_their_file_and_leave_it_as_it_is(
    name: str, save: Callable[[dict[str, torch.Tensor], Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    save({"a": torch.arange(1000.0), "b": torch.ones(3)}, path)
    before = path.read_bytes()
    with open_tensors(path) as opened:
        tensor = opened["a"]
    path.rename(tmp_path / "elsewhere")
    tensor[0] = 7
    assert tensor[:3].tolist() == [7, 1, 2]
    assert (tmp_path / "elsewhere").read_bytes() == before
    for read in (opened.__getitem__, opened.copy):
        with pytest.raises(CheckpointError, match="tensor 'b' cannot be read"):
            read("b")


# --- refused ---------------------------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "beyond the end": ({"a": entry(offsets=(0, 16), shape=(4,))}, 8),
    "not covering the file": ({"a": entry()}, 16),
    "overlapping": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "wrong length for the shape": ({"a": entry(shape=(3,))}, 8),
    "overflowing shape": ({"a": entry(shape=(2**33, 2**33), offsets=(0, 0))}, 0),
    "huge empty shape": ({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, 0),
    "negative shape": ({"a": entry(shape=(-2,))}, 8),
    "negative offsets": ({"a": entry(offsets=(-8, 0))}, 8),
    "fractional shape": ({"a": entry(shape=(2.0,))}, 8),
    "no place": ({"a": entry(offsets=None)}, 8),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, 8),
    "no shape": ({"a": entry(shape=None)}, 8),
    "unknown dtype": ({"a": entry(dtype="F4")}, 8),
    "dtype of a wrong type": ({"a": entry(dtype=["F32"])}, 8),  # type: ignore[arg-type]
    "no object": ({"a": [1, 2]}, 8),
    "a list": (b"[1, 2]", 0),
    "no JSON": (b"{{{{", 0),
    "no text": (b"\xff\xfe\xff\xfe", 0),
    "deep": (b'{"a":' * 100_000, 0),
    "repeated": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2 + b'"b":1}', 2),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_files(lie: str, tmp_path: Path) -> None:
    header, length = LIES[lie]
    path = raw_file(tmp_path / "model.safetensors", header, b"\0" * length)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "), open_tensors(tmp_path) as opened:
        for name in opened:
            opened[name]
    assert path.exists()


def test_headers_of_absurd_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (2**64 - 1, 2**40, 17):
        path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
        with pytest.raises(CheckpointError, match="truncated or broken"), open_tensors(path):
            pass
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20) + b"{")
        file.truncate(101 << 20)  # a hole: no disk is used
    with pytest.raises(CheckpointError, match="announces 104,857,600 bytes"), open_tensors(path):
        pass


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "good.safetensors"
    )
    good = (tmp_path / "good.safetensors").read_bytes()
    random.seed(0)
    refused = 0
    for _ in range(500):
        content = bytearray(good)
        for _ in range(random.choice((1, 2, 6))):
            content[random.randrange(len(content) - 58)] = random.randrange(256)
        path = tmp_path / "bad.safetensors"
        path.write_bytes(
            bytes(content[: random.choice((len(content), len(content), random.randrange(len(content))))])
        )
        try:
            with open_tensors(path) as opened:
                for name in opened:
                    opened[name]
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return pytest.fail, ("a pickle was run",)

    for content, kind, message in (
        (pickle.dumps(Exploit()), UnsafeFileError, "asks for '.*', which no tensor needs. Nothing was run"),
        (b"PK\x03\x04 and so on", BrokenFileError, "a zip archive that does not end as one"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            UnsupportedFileError,
            "a Git LFS pointer, not the file",
        ),
        (bytes(257) + b"ustar" + bytes(500), UnsupportedFileError, "a tar archive, as torch wrote before"),
        (b"", UnsupportedFileError, "no tensor file"),
        (b"hello, world", UnsupportedFileError, "no tensor file"),
    ):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        for path in (tmp_path / "pytorch_model.bin", tmp_path):
            with pytest.raises(kind, match=message), open_tensors(path):
                pass
    with pytest.raises(CheckpointError, match="cannot be read"), open_tensors(tmp_path / "missing"):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedFileError, match="no regular file"), open_tensors(tmp_path / "pipe"):
        pass


def test_what_a_folder_is_searched_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model.safetensors and no other tensor file"):  # noqa: SIM117
        with open_tensors(tmp_path):
            pass
    writers: dict[str, Callable[[Path], object]] = {
        ".pdparams": lambda path: path.write_bytes(pickle.dumps({path.name: np.ones(2)})),
        ".safetensors": lambda path: save_file({path.name: torch.ones(2)}, path),
        ".bin": lambda path: torch.save({path.name: torch.ones(2)}, path),
    }
    # From what is taken last to what is taken first.
    for number, name in enumerate(
        ("blip2.pth", *reversed([name for name in FOLDER_FILES if "index" not in name]))
    ):
        writers.get(Path(name).suffix, writers[".bin"])(tmp_path / name)
        with open_tensors(tmp_path) as opened:
            assert list(opened) == [name]
        for other in (f"{number}.safetensors", f"{number}.bin", f"{number}.pdparams"):
            if number == 0:
                writers[Path(other).suffix](tmp_path / other)
        if number == 0:
            with (
                pytest.raises(
                    CheckpointError, match=r"4 tensor files .*0\.bin.*give the path of the one to take"
                ),
                open_tensors(tmp_path),
            ):
                pass


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.pdparams")
    torch.save({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"c": np.ones(2)}))
    for file, name, form in (
        ("model.pdparams", "a", "safetensors"),
        ("model.safetensors", "b", "torch"),
        ("model.bin", "c", "paddle"),
    ):
        with open_tensors(tmp_path / file) as opened:
            assert list(opened) == [name]
            assert opened.file(name).format == form
    # 640 bytes of header: such a file begins as a pickle does.
    save_file({"a": torch.ones(2)}, tmp_path / "odd", metadata={"format": "np", "more": "x" * 540})
    assert (tmp_path / "odd").read_bytes()[:2] == b"\x80\x02"
    with open_tensors(tmp_path / "odd") as opened:
        assert opened["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../secret.safetensors"}, "expected the plain name"),
        ({"a": "/etc/passwd"}, "expected the plain name"),
        ({"a": "sub/model.safetensors"}, "expected the plain name"),
        ({"a": "..\\secret.safetensors"}, "expected the plain name"),
        ({"a": "pytorch_model.bin"}, "expected the plain name"),
        ({"a": "x\0.safetensors"}, "expected the plain name"),
        ({"a": 7}, "must give the file of every tensor"),
        (["a"], "must give the file of every tensor"),
        ({"a": "gone.safetensors"}, "'gone.safetensors', which is not there"),
        (
            {"a": "one.safetensors", "c": "one.safetensors"},
            "the index puts 'c' in one.safetensors, which does not hold it",
        ),
        ({"a": "one.safetensors"}, "holds 'b', which the index does not list"),
        (
            {"a": "one.safetensors", "b": "two.safetensors"},
            "the index puts 'b' in two.safetensors, which does not",
        ),
    ],
)
def test_indexes_that_lie(weight_map: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "folder" / "one.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "folder" / "two.safetensors")
    (tmp_path / "folder" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message), open_tensors(tmp_path / "folder"):
        pass


def test_broken_indexes(tmp_path: Path) -> None:
    for text, message in (
        ("{", "is no valid JSON"),
        ("[]", "holds a list, expected an object"),
        ("{}", ": no valid index"),
        (
            '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
            r"is no valid JSON \(a name occurs twice\)",
        ),
        ("[" * 100_000, "is no valid JSON"),
    ):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=rf"index\.json ?{message}"), open_tensors(tmp_path):
            pass
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(33 << 20)
    with pytest.raises(CheckpointError, match="over 4,194,304"), open_tensors(tmp_path):
        pass


# --- writing -------------------------------------------------------------------------------------------------------


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = samples() | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    info = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_safetensors(file, info, lambda name: blocks(tensors[name]))
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(equal(theirs[name], tensor) for name, tensor in tensors.items())
    with open_tensors(tmp_path) as opened:
        assert all(equal(opened[name], tensor) for name, tensor in tensors.items())
        assert all(opened[name].data_ptr() % opened.info(name).dtype.itemsize == 0 for name in opened)
