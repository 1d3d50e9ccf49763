"""Whether a checkpoint's weights are finite, and a digest that tells them from all others.

Both take a pass over all values of a file. What it found is remembered in the user's cache for as long as the file has
the same size, times and inode, so it is made once. A cache that cannot be read or written costs that pass each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from blip2.storage import OutputError, replace_file
from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.scan import Scan, digest_tensors, join_digests, scan_file
from blip2.tensorfiles.strict_json import read_json
from blip2.tensorfiles.tensors import StoredTensors, Tensors

# Of a file: its path, size, inode, and the times of its values and of its inode.
_Identity = tuple[str, int, int, int, int]
_scans: dict[_Identity, Scan] = {}  # of this process


def check_weights(tensors: Tensors) -> str:
    """The digest of the files that hold these tensors: one value changed anywhere gives another.

    Raises:
        CheckpointError: a weight is not finite; the message names the tensor and its file.
    """
    scans: dict[StoredTensors, Scan] = {}
    for name in tensors:
        for file, stored in tensors.file(name).sources(name):
            assert isinstance(file, StoredTensors)
            if file not in scans:
                scans[file] = _scanned(file)
            if math.isinf(scans[file].large.get(stored, 0.0)):
                raise CheckpointError(
                    f"{file.path}: tensor {quoted(stored)} holds values that are not finite (NaN or infinite); "
                    "get the file again, or save the model anew from a state before training went wrong"
                )
    return join_digests(bytes.fromhex(scan.digest) for scan in scans.values())


def check_range(tensors: Tensors, name: str, dtype: torch.dtype) -> None:
    """Refuse a tensor that holds values beyond the range of the dtype it is about to be converted to.

    Raises:
        CheckpointError: it does; the message names it.
    """
    if torch.finfo(dtype).max >= torch.finfo(tensors.info(name).dtype).max:
        return
    for file, stored in tensors.file(name).sources(name):
        assert isinstance(file, StoredTensors)
        largest = _scanned(file).large.get(stored, 0.0)
        if not math.isfinite(torch.tensor(largest, dtype=torch.float64).to(dtype).item()):
            raise CheckpointError(
                f"{file.path}: tensor {quoted(stored)} holds values up to {largest:.3g}, beyond the range of {dtype} "
                f"({torch.finfo(dtype).max:.3g}); load it in a wider dtype"
            )


def model_digest(model: nn.Module) -> str:
    """The digest of a model in memory: every tensor that its state_dict would give, a module's at a time."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for parent, module in model.named_modules():
            own: dict[str, torch.Tensor] = {}
            module._save_to_state_dict(
                own, f"{parent}." if parent else "", keep_vars=False
            )  # packed ones: a copy
            yield from own.items()

    return digest_tensors(tensors())


def _scanned(file: StoredTensors) -> Scan:
    """What a pass over a file finds: as remembered, or made now."""
    identity = _identity(file)
    if identity not in _scans:
        scan = _recall(identity)
        if scan is None:
            scan = scan_file(file)
            if _identity(file) != identity:
                raise CheckpointError(f"{file.path} was changed while it was read; load it again")
            _remember(identity, scan)
        _scans[identity] = scan
    return _scans[identity]


def _identity(file: StoredTensors) -> _Identity:
    status = file.status()
    return str(file.path.resolve()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _cache_file(identity: _Identity) -> Path:
    """One file a file of weights: two processes never write the same at once but for the same weights."""
    return cache_folder() / "weights" / f"{hashlib.sha256(os.fsencode(identity[0])).hexdigest()[:32]}.json"


def cache_folder() -> Path:
    """This package's folder in the user's cache: XDG_CACHE_HOME, or the system's usual place."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():
        return chosen / "blip2"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "blip2" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "blip2"


def _recall(identity: _Identity) -> Scan | None:
    """What is remembered of a file; None where nothing is, or something that is not to be understood."""
    try:
        entry = read_json(_cache_file(identity), optional=True)
    except (CheckpointError, OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    digest, large = entry.get("digest"), entry.get("large")
    if entry.get("file") != list(identity) or not isinstance(digest, str) or not isinstance(large, dict):
        return None
    values = {name: math.inf if value is None else value for name, value in large.items()}
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        return None
    return Scan(digest, values) if all(type(value) is float for value in values.values()) else None


def _remember(identity: _Identity, scan: Scan) -> None:
    with (
        contextlib.suppress(OSError, OutputError, RuntimeError),
        replace_file(_cache_file(identity)) as beside,
    ):
        beside.write_bytes(_entry(identity, scan))


def _entry(identity: _Identity, scan: Scan) -> bytes:
    large: Mapping[str, float | None] = {n: None if math.isinf(v) else v for n, v in scan.large.items()}
    return json.dumps({"file": identity, "digest": scan.digest, "large": large}).encode()
