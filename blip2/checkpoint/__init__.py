"""Checkpoints: finding, reading, loading and writing them."""

from blip2.checkpoint.files import CheckpointError, TensorInfo, Tensors, open_tensors
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.load import load_model, load_processing
from blip2.checkpoint.save import save_model

__all__ = [
    "CheckpointError",
    "TensorInfo",
    "Tensors",
    "load_model",
    "load_processing",
    "open_tensors",
    "resolve",
    "save_model",
]
