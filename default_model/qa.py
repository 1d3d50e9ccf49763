"""A question with its answer, and the kinds of questions."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("object", "color", "count", "presence", "position", "description", "category", "breed", "nonsense")


@dataclass(frozen=True)
class QA:
    """A question about an image; the answer is short and lower case, numbers are digits. kind is one of KINDS."""

    question: str
    answer: str
    kind: str
