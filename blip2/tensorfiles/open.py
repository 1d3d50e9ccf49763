"""Any file or folder of tensors, opened by its content: names, shapes and dtypes at once, values on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsupportedFileError, quoted
from blip2.tensorfiles.filebytes import FileBytes
from blip2.tensorfiles.paddle_files import open_paddle
from blip2.tensorfiles.safetensors_files import open_safetensors
from blip2.tensorfiles.strict_json import read_json
from blip2.tensorfiles.tensors import TensorFile, Tensors
from blip2.tensorfiles.torch_files import is_legacy, open_archive, open_legacy

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What a folder is searched for, in this order: data alone before pickles, whole files before shards.
FOLDER_FILES = (
    SINGLE_FILE,
    INDEX_FILE,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_state.pdparams",
    "model_state.pdparams.index.json",
)
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".pdparams")
MAX_INDEX_BYTES = 4 << 20
MAX_SHARDS = 1000


@contextmanager
def open_tensors(path: str | Path) -> Iterator[Tensors]:
    """Open the tensors of a file, of an index of shards (*.index.json), or of a folder.

    A file is what its content says: safetensors, torch.save's (.bin, .pth, .pt; zip archive or older), or paddle.save's
    (.pdparams). Nothing in it is run. In a folder the first of `FOLDER_FILES` counts, or else its only tensor file.

    Raises:
        UnsafeFileError: a file that asks for code.
        BrokenFileError: a file that is cut short or contradicts itself, an index and shards that do not agree.
        UnsupportedFileError: a file of another kind.
        CheckpointError: nothing there, or several files none of which is the one to take.
    """
    path = Path(path)
    with ExitStack() as stack:
        if path.is_dir():
            path = _choose(path)
        if path.name.endswith(".json"):
            yield _open_index(path, stack)
        else:
            file = _open_file(path, stack)
            yield Tensors(dict.fromkeys(file.info, file))


def _choose(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    if not files:
        raise CheckpointError(
            f"{folder}: no {SINGLE_FILE} and no other tensor file ({', '.join(f'*{suffix}' for suffix in SUFFIXES)})"
        )
    raise CheckpointError(
        f"{folder}: no {SINGLE_FILE} nor {INDEX_FILE}, and {len(files)} tensor files "
        f"({', '.join(file.name for file in files[:5])}{' ...' if len(files) > 5 else ''}); give the path of the one "
        "to take, or get the index if they are the shards of one model"
    )


def _open_file(path: Path, stack: ExitStack) -> TensorFile:
    """Open one file by how it begins."""
    file = FileBytes(path, stack)
    start = file.read(0, min(file.size, 64), "its beginning")
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header <= file.size - 8:
        return open_safetensors(file)
    if start.startswith(b"PK\x03\x04"):
        return open_archive(file)
    if is_legacy(start):
        return open_legacy(file)
    # Protocols 0 and 1 have no mark of their own: they begin with a container or a name and end with a full stop.
    if (start[:1] == b"\x80" and start[1:2] <= b"\x05") or (
        start[:1] in (b"(", b"}", b"]", b")", b"c") and file.read(file.size - 1, 1, "its end") == b"."
    ):
        return open_paddle(file)
    raise file.unsupported(_what_it_is(start, file))


def _what_it_is(start: bytes, file: FileBytes) -> str:
    """What a file of no known kind seems to be, and what to do about it."""
    if start.startswith(b"version "):
        return "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if file.path.suffix == ".safetensors":
        return "a truncated or broken safetensors file; get it again"
    if file.size > 262 and file.read(257, 5, "its beginning") == b"ustar":
        return "a tar archive, as torch wrote before version 0.2; save it anew with today's torch"
    if start[:12] == bytes(12) and len(start) > 12:
        return (
            "Paddle's binary format (paddle.save with use_binary_format=True, or a static graph's parameters); load it "
            "in Paddle and save it with paddle.save(state_dict, path)"
        )
    return (
        f"no tensor file (it begins with {start[:16]!r}); give one of safetensors, torch.save or paddle.save"
    )


def _open_index(path: Path, stack: ExitStack) -> Tensors:
    weight_map = read_json(path, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BrokenFileError(
            f"{path}: no valid index: 'weight_map' must give the file of every tensor; give the path of a tensor file "
            "or of its *.index.json"
        )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise UnsupportedFileError(f"{path}: the index names {len(names):,} files, over {MAX_SHARDS:,}")
    # model.safetensors.index.json lists .safetensors files, pytorch_model.bin.index.json .bin files.
    suffix = Path(path.name.removesuffix(".json").removesuffix(".index")).suffix
    shards: dict[str, TensorFile] = {}
    for shard in names:
        # A plain file name: an index may not reach outside its folder.
        expected = (suffix,) if suffix in SUFFIXES else SUFFIXES
        if not shard.endswith(expected) or shard != Path(shard).name or {"\\", "\0"} & set(shard):
            raise BrokenFileError(
                f"{path}: the index names {quoted(shard)}, expected the plain name of a {' or '.join(expected)} file"
            )
        if len(shard.encode("utf-8", "surrogatepass")) > 255 or not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path}: the index names {quoted(shard)}, which is not there; get the missing file"
            )
        shards[shard] = _open_file(path.parent / shard, stack)
    for name, shard in weight_map.items():
        if name not in shards[shard].info:
            raise BrokenFileError(
                f"{path}: the index puts {quoted(name)} in {shard}, which does not hold it; get both again"
            )
    for shard, file in shards.items():
        for name in file.info:
            if weight_map.get(name) != shard:
                raise BrokenFileError(
                    f"{path}: {shard} holds {quoted(name)}, which the index does not list; get both again"
                )
    return Tensors({name: shards[shard] for name, shard in weight_map.items()})
