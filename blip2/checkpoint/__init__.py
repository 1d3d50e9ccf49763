"""Checkpoints: finding, reading, loading and writing them."""

from blip2.checkpoint.files import open_tensors
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.load import load_model, load_processing
from blip2.checkpoint.save import save_model
from blip2.checkpoint.tensors import (
    BrokenFileError,
    CheckpointError,
    TensorInfo,
    Tensors,
    UnsafeFileError,
    UnsupportedFileError,
)

__all__ = [
    "BrokenFileError",
    "CheckpointError",
    "TensorInfo",
    "Tensors",
    "UnsafeFileError",
    "UnsupportedFileError",
    "load_model",
    "load_processing",
    "open_tensors",
    "resolve",
    "save_model",
]
