"""Checkpoints: finding, reading, loading, inspecting, converting and writing them."""

from blip2.checkpoint.conversion import Conversion, convert
from blip2.checkpoint.files import open_tensors
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.inspection import Inspection, inspect
from blip2.checkpoint.load import count_parameters, load_model, load_processing, stored_as
from blip2.checkpoint.quantization import Quantization, quantize_checkpoint
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
    "Conversion",
    "Inspection",
    "Quantization",
    "TensorInfo",
    "Tensors",
    "UnsafeFileError",
    "UnsupportedFileError",
    "convert",
    "count_parameters",
    "inspect",
    "load_model",
    "load_processing",
    "open_tensors",
    "quantize_checkpoint",
    "resolve",
    "save_model",
    "stored_as",
]
