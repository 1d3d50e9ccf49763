"""Checkpoints: finding, reading, loading, inspecting, converting and writing them."""

from blip2.checkpoint.convert import Conversion, convert
from blip2.checkpoint.hub import resolve_path
from blip2.checkpoint.inspect import Inspection, inspect
from blip2.checkpoint.load import count_parameters, load_model, load_processors, stored_as
from blip2.checkpoint.quantize import Quantization, quantize_checkpoint
from blip2.checkpoint.save import save_model
from blip2.tensorfiles.errors import BrokenFileError, CheckpointError, UnsafeFileError, UnsupportedFileError
from blip2.tensorfiles.open import open_tensors
from blip2.tensorfiles.tensors import TensorInfo, Tensors

__all__ = [
    "BrokenFileError", "CheckpointError", "Conversion", "Inspection", "Quantization", "TensorInfo", "Tensors",
    "UnsafeFileError", "UnsupportedFileError", "convert", "count_parameters", "inspect", "load_model",
    "load_processors", "open_tensors", "quantize_checkpoint", "resolve_path", "save_model", "stored_as",
]  # fmt: skip
