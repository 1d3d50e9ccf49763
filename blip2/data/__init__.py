"""Data: samples from annotation files and folders, and the batches training takes."""

from blip2.data.loader import MatchingBatches, ReadingBatches, Rows, WritingBatches
from blip2.data.sources import DataError, Sample, read_samples

__all__ = [
    "DataError",
    "MatchingBatches",
    "ReadingBatches",
    "Rows",
    "Sample",
    "WritingBatches",
    "read_samples",
]
