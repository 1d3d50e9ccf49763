"""Checkpoints of a training run: one safetensors file each, written completely or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2.storage import UNFINISHED, replace_file
from blip2.train.metrics import RESUME_HINT, TrainingError

KEPT = 2  # checkpoints kept: the latest, and the one to fall back to
_SUFFIX, _DAMAGED = ".safetensors", ".damaged"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A point to resume from: after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]  # values of JSON


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Path:
    """Write a checkpoint beside its final name, flush it to the disk, rename it; then drop the oldest ones.

    Raises:
        TrainingError: it could not be written; nothing has changed.
    """
    path = folder / f"step-{step:09d}{_SUFFIX}"
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(notes), sort_keys=True)
    meta = {"format": "pt", "notes": text, "sha256": _digest(flat, text)}
    try:
        with replace_file(path) as beside:
            save_file(flat, beside, meta)
    except Exception as error:  # safetensors reports a full disk with an error class of its own
        raise TrainingError(f"could not write {path}: {error}; {RESUME_HINT}") from error
    for old in list_checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the oldest first."""
    return sorted(folder.glob(f"step-*{_SUFFIX}"))


def load_latest(folder: Path) -> TrainingCheckpoint | None:
    """The latest checkpoint whose digest is right; damaged ones are set aside with a warning.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    for leftover in folder.glob(f"*{UNFINISHED}"):
        leftover.unlink()
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return _read(path)
        except Exception as error:  # whatever a damaged file provokes: the one before it may still be good
            aside = path.with_suffix(_DAMAGED)
            log.warning("%s is damaged (%s); set aside as %s, trying the one before", path, error, aside.name)
            os.replace(path, aside)
    if paths:
        raise ValueError(
            f"all {len(paths)} checkpoints in {folder} are damaged; start again in another folder"
        )
    return None


def _read(path: Path) -> TrainingCheckpoint:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(tensors, meta.get("notes", "")) != meta.get("sha256"):
        raise ValueError("its content is not what was written")
    return TrainingCheckpoint(int(path.stem.removeprefix("step-")), tensors, json.loads(meta["notes"]))


def _digest(tensors: Mapping[str, Tensor], notes: str) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors, and of the notes."""
    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
