"""Checkpoints: finding, reading, loading, inspecting, converting and writing them."""

from blip2.checkpoint.convert import Conversion, convert
from blip2.checkpoint.files import CheckpointError, TensorInfo, Tensors, open_tensors
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.inspect import Inspection, inspect
from blip2.checkpoint.load import count_parameters, load_model, load_processing
from blip2.checkpoint.save import save_model

__all__ = [
    "CheckpointError",
    "Conversion",
    "Inspection",
    "TensorInfo",
    "Tensors",
    "convert",
    "count_parameters",
    "inspect",
    "load_model",
    "load_processing",
    "open_tensors",
    "resolve",
    "save_model",
]
