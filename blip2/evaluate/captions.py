"""The scores of captions: BLEU-1..4, ROUGE-L, CIDEr; METEOR and SPICE where there is Java.

The scorers are pycocoevalcap's, as COCO's evaluation has them. CIDEr there is CIDEr-D (clipped counts, a penalty for
length, sigma 6), with words weighted by how many of the evaluated images' references hold them: it means something for
a set of images, and is 0 for a single one. Words are cut by `tokenizer.tokenize`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2.evaluate.tokenizer import tokenize


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, 0..1 (CIDEr: 0..10).

    each: the scores of every image. left_out: what could not be computed, and why.
    """

    total: dict[str, float]
    each: list[dict[str, float]]
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
            "one reference at least"
        )
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError("caption scores need pycocoevalcap: pip install 'blip2[eval]'") from error
    words = iter(tokenize([text for texts in listed for text in texts]))
    told = {i: [next(words) for _ in texts] for i, texts in enumerate(listed)}
    said = {i: [text] for i, text in enumerate(tokenize(captions))}
    total: dict[str, float] = {}
    each: list[dict[str, float]] = [{} for _ in captions]

    def add(name: str, score: Any, scores: Iterable[Any]) -> None:
        total[name] = float(score)
        for row, one in zip(each, scores, strict=True):
            row[name] = float(one)

    bleu, bleus = Bleu(4).compute_score(told, said, verbose=0)
    for n in range(4):
        add(f"BLEU-{n + 1}", bleu[n], bleus[n])
    add("ROUGE-L", *Rouge().compute_score(told, said))
    add("CIDEr", *Cider().compute_score(told, said))
    left_out = []
    if java:
        for name, compute in (("METEOR", _meteor), ("SPICE", _spice)):
            try:
                add(name, *compute(told, said))
            except Exception as error:  # a Java program ended, a file is not there: the others stand
                left_out.append(f"{name} is left out: {error or type(error).__name__}")
    return CaptionScores(total, each, left_out)


def _need_java() -> None:
    if shutil.which("java") is None:
        raise ValueError("needs Java (on Debian: apt-get install default-jre-headless)")


def _meteor(told: dict[int, list[str]], said: dict[int, list[str]]) -> tuple[Any, Any]:
    _need_java()
    from pycocoevalcap.meteor.meteor import Meteor

    result: tuple[Any, Any] = Meteor().compute_score(told, said)
    return result


def _spice(told: dict[int, list[str]], said: dict[int, list[str]]) -> tuple[Any, Any]:
    _need_java()
    from pycocoevalcap import spice

    if not list(
        Path(spice.__path__[0]).glob("lib/stanford-corenlp-*.jar")
    ):  # the package would wait for a network
        raise ValueError(
            "needs Stanford's parser, once: python -c 'from pycocoevalcap.spice.get_stanford_models import "
            "get_stanford_models as get; get()'"
        )
    from pycocoevalcap.spice.spice import Spice

    score, scores = Spice().compute_score(told, said)
    return score, [one["All"]["f"] for one in scores]
