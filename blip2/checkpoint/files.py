"""Tensor files, lazily: names, shapes and dtypes at once, values when asked for, written one at a time.

Only safetensors, which holds data alone. Nothing is unpickled: a file of another kind is refused by how it begins.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 8 << 20  # 1,247 tensors (the 6.7B model) take 0.2 MB
MAX_INDEX_BYTES = 32 << 20

# safetensors' names of dtypes.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, loaded or written."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(Protocol):
    """One open file of tensors, whatever its format."""

    format: str  # "safetensors", "torch" or "paddle"
    metadata: Mapping[str, str]  # what a safetensors file says of itself; empty for the others
    info: Mapping[str, TensorInfo]

    def mapped(self, name: str) -> Tensor:
        """The tensor, mapped from the file where its format allows."""

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file or folder, by the names they have there. A value is read when it is asked for.

    Where the file can be mapped into memory a tensor costs no memory of its own until its values are looked at; it may
    be written to (the file stays as it is) and stays valid after the file is closed.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        """`files`: where each tensor stands."""
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].mapped(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the tensor."""
        return self._files[name].info[name]

    def file(self, name: str) -> TensorFile:
        """The open file a tensor stands in: its format, and what it says of itself."""
        return self._files[name]

    def copy(self, name: str) -> Tensor:
        """The tensor in memory of its own. For a value that is converted and dropped: a mapped one would leave the
        file's pages in the process."""
        return self._files[name].copied(name)


# --- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Tensors]:
    """Open a .safetensors file, an index of shards (*.safetensors.index.json), or a folder that holds either.

    Raises:
        CheckpointError: nothing there that this package reads, a broken or lying file, an index and shards that do not
            agree.
    """
    path = Path(path)
    with ExitStack() as stack:
        if path.is_dir():
            path = _choose(path)
        if path.name.endswith(".json"):
            yield _open_index(path, stack)
        else:
            file = _SafetensorsFile(path, stack)
            yield Tensors(dict.fromkeys(file.info, file))


def _choose(folder: Path) -> Path:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
    there = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".pdparams")
    )
    held = (
        f"it holds {', '.join(there[:5])}{' ...' if len(there) > 5 else ''}"
        if there
        else "it holds no tensor file"
    )
    raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; {held}")


class _SafetensorsFile:
    format = "safetensors"
    metadata: Mapping[str, str] = {}
    info: Mapping[str, TensorInfo]

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.info, self._starts = _read_header(path)
        try:
            self._file = stack.enter_context(safe_open(path, framework="pt"))
        except Exception as error:
            raise CheckpointError(
                f"{path}: a broken safetensors file ({_first_line(error)}); get it again"
            ) from error

    def mapped(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except Exception as error:
            raise self._unreadable(name, error) from error
        return tensor

    def copied(self, name: str) -> Tensor:
        info = self.info[name]
        values = torch.empty(info.nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[name])
                if file.readinto(values.numpy().data) != info.nbytes:
                    raise EOFError("the file is shorter than it was")
            return values.view(info.dtype).reshape(info.shape)
        except (OSError, EOFError) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name[:80]!r} cannot be read ({_first_line(error)})")


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """What a safetensors file says it holds, and where in the file each tensor begins.

    Checks what the safetensors library lets pass, repeated names and absurd sizes; offsets it checks itself.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            size = os.fstat(file.fileno()).st_size
            if len(start) < 8 or length > size - 8 or size < 10:
                raise CheckpointError(f"{path}: {_what_it_is(start, path)}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header announces {length:,} bytes, over {MAX_HEADER_BYTES:,}"
                )
            header = _parse_json(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    header.pop("__metadata__", None)
    info, starts = {}, {}
    for name, entry in header.items():
        info[name], begin = _tensor_info(name, entry, path)
        starts[name] = 8 + length + begin
    return info, starts


def _tensor_info(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int]:
    """A header's entry for a tensor: what it is, and its first byte among the data."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: the header says nothing of tensor {name[:80]!r}")
    shape, dtype, place = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
        raise CheckpointError(f"{path}: the header gives tensor {name[:80]!r} no valid shape")
    if not isinstance(place, list) or len(place) != 2 or any(type(n) is not int or n < 0 for n in place):
        raise CheckpointError(f"{path}: the header gives tensor {name[:80]!r} no valid place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name[:80]!r} has dtype {str(dtype)[:80]!r}; known are {', '.join(DTYPES)}"
        )
    return TensorInfo(tuple(shape), DTYPES[dtype]), place[0]


def _open_index(path: Path, stack: ExitStack) -> Tensors:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(
                f"{path}: an index of {path.stat().st_size:,} bytes, over {MAX_INDEX_BYTES:,}"
            )
        weight_map = _parse_json(path.read_bytes(), path).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: no valid index: 'weight_map' must give the file of every tensor")
    shards: dict[str, _SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        # A plain file name: an index may not reach outside its folder.
        if not shard.endswith(".safetensors") or shard != Path(shard).name or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{path}: the index names {shard!r}, expected the plain name of a .safetensors file"
            )
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path}: the index names {shard}, which is not there; get the missing file"
            )
        shards[shard] = _SafetensorsFile(path.parent / shard, stack)
    for name, shard in weight_map.items():
        if name not in shards[shard].info:
            raise CheckpointError(
                f"{path}: the index says {name!r} stands in {shard}, which does not hold it"
            )
    for shard, file in shards.items():
        for name in file.info:
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{path}: {shard} holds {name!r}, which the index does not say")
    return Tensors({name: shards[shard] for name, shard in weight_map.items()})


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        reason = f" ({error})" if isinstance(error, _RepeatedNameError) else ""
        raise CheckpointError(f"{path}: no valid JSON where its list of tensors should be{reason}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: its list of tensors is a {type(raw).__name__}, expected an object")
    return raw


class _RepeatedNameError(ValueError):
    """An object in a JSON file has a name twice: two readers could take it in two ways."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedNameError("a name stands there twice")
    return found


def _what_it_is(start: bytes, path: Path) -> str:
    """Says of a file that is no safetensors file what it seems to be, and what to do."""
    wanted = "this version reads .safetensors"
    if start[:4] == b"PK\x03\x04":
        return f"a zip archive, as torch.save writes; {wanted}, convert it first"
    if start[:1] == b"\x80":
        return f"a Python pickle, as older torch.save and paddle.save write; {wanted}, convert it first"
    if start.startswith(b"version "):
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if path.suffix == ".safetensors":
        return "a truncated or broken safetensors file; get it again"
    return f"no safetensors file (it begins with {start!r}); {wanted}"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
