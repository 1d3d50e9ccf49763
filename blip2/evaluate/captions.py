"""The scores of captions: BLEU-1..4, ROUGE-L, CIDEr; METEOR and SPICE where Java is installed.

The scorers are pycocoevalcap's, which COCO's evaluation uses. Their CIDEr is CIDEr-D (clipped counts, a penalty for
length, sigma 6), with words weighted by how many of the evaluated images' references hold them: it is meaningful for a
set of images, and not defined for a single one. Captions are split into words by `tokenizer.tokenize`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2.evaluate.tokenizer import tokenize


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, 0..1 (CIDEr: 0..10); None where a score is not defined.

    per_image: the scores of every image. left_out: scores that could not be computed or are not defined, and why.
    """

    total: dict[str, float | None]
    per_image: list[dict[str, float | None]]
    left_out: list[str] = field(default_factory=list)


def caption_scores(
    references: Sequence[Iterable[str]], captions: Sequence[str], *, java: bool = False
) -> CaptionScores:
    """Score one caption for each image against the image's references.

    Args:
        java: METEOR and SPICE too; what cannot run here is named in `left_out`.

    Raises:
        ValueError: no images, not as many references as captions, an image without one, or pycocoevalcap is missing.
    """
    listed = [list(texts) for texts in references]
    if not captions or len(listed) != len(captions) or not all(listed):
        raise ValueError(
            f"{len(captions)} captions and references for {len(listed)} images: each image needs one caption and "
            "at least one reference"
        )
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError("caption scores need pycocoevalcap: pip install 'blip2[eval]'") from error
    words = iter(tokenize([text for texts in listed for text in texts]))
    right = {i: [next(words) for _ in texts] for i, texts in enumerate(listed)}
    ours = {i: [text] for i, text in enumerate(tokenize(captions))}
    scores = CaptionScores({}, [{} for _ in captions])

    def add(name: str, total: Any, per_image: Iterable[Any], undefined: str = "") -> None:
        if not undefined and not math.isfinite(total):
            undefined = "its program gives no number"
        if undefined:
            scores.left_out.append(f"{name} is not defined here: {undefined}")
        scores.total[name] = None if undefined else float(total)
        for row, score in zip(scores.per_image, per_image, strict=True):
            row[name] = None if score is None or not math.isfinite(score) else float(score)

    bleu, per_image = Bleu(4).compute_score(right, ours, verbose=0)
    lengths = [len(text.split()) for (text,) in ours.values()]
    for n in range(1, 5):
        # A caption of fewer words has no such sequence, right or wrong.
        values = [
            value if length >= n else None for value, length in zip(per_image[n - 1], lengths, strict=True)
        ]
        add(f"BLEU-{n}", bleu[n - 1], values, "" if max(lengths) >= n else f"no caption has {n} words")
    add("ROUGE-L", *Rouge().compute_score(right, ours))
    cider, values = Cider().compute_score(right, ours)
    undefined = ""
    if len({frozenset(texts) for texts in right.values()}) == 1:  # then each word weighs nothing
        same = "there is one image" if len(captions) == 1 else "all images have the same references"
        undefined = f"it weighs words by how many images' references hold them, and {same}"
        values = [None] * len(captions)
    add("CIDEr", cider, values, undefined)
    for name, compute in (("METEOR", _meteor), ("SPICE", _spice)) if java else ():
        try:
            if shutil.which("java") is None:
                raise ValueError("needs Java (on Debian: apt-get install default-jre-headless)")
            add(name, *compute(right, ours))
        except Exception as error:  # a Java program failed or a file is missing: the other scores remain
            scores.left_out.append(f"{name} is left out: {error or type(error).__name__}")
    return scores


def _meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor().compute_score(references, captions)


def _spice(references: dict[int, list[str]], captions: dict[int, list[str]]) -> Any:
    from pycocoevalcap import spice

    if not list(
        Path(spice.__path__[0]).glob("lib/stanford-corenlp-*.jar")
    ):  # else it would wait for a network
        raise ValueError(
            "needs Stanford's parser, once: python -c 'from pycocoevalcap.spice.get_stanford_models import "
            "get_stanford_models as get; get()'"
        )
    from pycocoevalcap.spice.spice import Spice

    total, scores = Spice().compute_score(references, captions)
    return total, [score["All"]["f"] for score in scores]
