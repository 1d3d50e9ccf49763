"""Captioning any number of images: sources in, a journal that survives anything, one output at the end."""

from blip2.bulk.journal import BulkError
from blip2.bulk.run import Settings, caption_all, estimate
from blip2.bulk.sources import Item, list_items

__all__ = ["BulkError", "Item", "Settings", "caption_all", "estimate", "list_items"]
