"""Captioning any number of images: sources in, a journal that survives anything, and the output a user asked for."""

from blip2.bulk.journal import BulkError
from blip2.bulk.pace import Estimate, estimate
from blip2.bulk.run import Settings, caption_all
from blip2.bulk.sources import Inputs, Item, list_items

__all__ = ["BulkError", "Estimate", "Inputs", "Item", "Settings", "caption_all", "estimate", "list_items"]
