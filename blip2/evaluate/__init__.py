"""Evaluation: published protocols, the official scores, and what was got wrong, to look through."""

from blip2.evaluate.answers import exact_match, gqa_accuracy, normalise, vqa_accuracy
from blip2.evaluate.captions import CaptionScores, caption_scores
from blip2.evaluate.report import as_json, lines, page, predictions, write
from blip2.evaluate.retrieval import match_tables, recalls
from blip2.evaluate.run import Outcome, Report, Settings, evaluate, scenes_report
from blip2.evaluate.scenes import Scenes, read_scenes
from blip2.evaluate.tasks import Item, Task, read_task
from blip2.evaluate.tokenizer import tokenize

__all__ = [
    "CaptionScores", "Item", "Outcome", "Report", "Scenes", "Settings", "Task", "as_json", "caption_scores", "evaluate",
    "exact_match", "gqa_accuracy", "lines", "match_tables", "normalise", "page", "predictions", "read_scenes",
    "read_task", "recalls", "scenes_report", "tokenize", "vqa_accuracy", "write",
]  # fmt: skip
