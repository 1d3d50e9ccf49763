"""Captioning any number of images: sources in, a database that survives anything, and the output a user asked for."""

from blip2.bulk.database import BulkError
from blip2.bulk.estimate import Estimate, estimate
from blip2.bulk.run import caption_all, caption_rows
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import ImageItem, Inputs

__all__ = [
    "BulkError", "Estimate", "ImageItem", "Inputs", "RunSettings", "caption_all", "caption_rows", "estimate",
]  # fmt: skip
