"""How models are asked: our way, and the way of the published tables; and what those tables say.

Li et al., BLIP-2 (2023), tables 2-5 of its first edition and the models' cards; settings as LAVIS's configurations have
them. What LAVIS does besides: it lemmatises answers to OK-VQA with spaCy, which is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from blip2.registry import DEFAULT, resolve_alias
from blip2.text import CAPTION_PROMPT


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings of one kind of task. image_px: what the published model reads, None: whatever the model reads."""

    name: str
    prompt: str = CAPTION_PROMPT
    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    candidates: int = 128  # retrieval: so many are re-ranked
    text_length: int | None = None  # retrieval: tokens of a text
    logits: bool = True  # retrieval: what matching adds, its logit or its probability
    image_px: int | None = None


_OWN = Protocol(name="default")
_PAPER = Protocol(name="paper")
PROTOCOLS = {
    "default": {
        "captions": _OWN,
        "questions": replace(_OWN, max_new_tokens=10, length_penalty=-1.0),
        "retrieval": replace(_OWN, candidates=32, logits=False),
    },
    # The shortest caption has 8 tokens with the four of "</s>a photo of"; lengths here count new tokens alone.
    "paper": {
        "captions": replace(_PAPER, min_new_tokens=4, image_px=364),
        "questions": replace(_PAPER, max_new_tokens=10, length_penalty=-1.0, image_px=224),
        "retrieval": replace(_PAPER, candidates=128, text_length=35, image_px=364),
    },
}

_COCO_OPT_27 = {
    "BLEU-1": 0.832, "BLEU-2": 0.691, "BLEU-3": 0.556, "BLEU-4": 0.438, "METEOR": 0.317, "ROUGE-L": 0.620,
    "CIDEr": 1.461, "SPICE": 0.252,
}  # fmt: skip
_COCO_OPT_67 = {
    "BLEU-1": 0.831, "BLEU-2": 0.689, "BLEU-3": 0.552, "BLEU-4": 0.434, "METEOR": 0.316, "ROUGE-L": 0.618,
    "CIDEr": 1.451, "SPICE": 0.251,
}  # fmt: skip


def _nocaps(near: float, inside: float, out: float, whole: float) -> dict[str, float]:
    return {"CIDEr": whole, "CIDEr in-domain": inside, "CIDEr near-domain": near, "CIDEr out-domain": out}


# Task -> model on the Hub, without "Salesforce/blip2-" -> figure -> its value, 0..1 (CIDEr 0..10).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "coco": {
        "opt-2.7b-coco": _COCO_OPT_27,
        "opt-6.7b-coco": _COCO_OPT_67,
        "flan-t5-xl-coco": {"BLEU-4": 0.424, "CIDEr": 1.445},
    },
    "nocaps": {
        "opt-2.7b-coco": _nocaps(1.178, 1.230, 1.234, 1.197),
        "opt-6.7b-coco": _nocaps(1.192, 1.237, 1.244, 1.210),
        "flan-t5-xl-coco": _nocaps(1.202, 1.237, 1.248, 1.216),
    },
    "vqav2": {
        name: {"accuracy": value}
        for name, value in (
            ("opt-2.7b", 0.535), ("opt-6.7b", 0.543), ("flan-t5-xl", 0.631), ("flan-t5-xxl", 0.652),
        )
    },
    "okvqa": {
        name: {"accuracy": value}
        for name, value in (
            ("opt-2.7b", 0.317), ("opt-6.7b", 0.364), ("flan-t5-xl", 0.407), ("flan-t5-xxl", 0.459),
        )
    },
    "gqa": {
        name: {"accuracy": value}
        for name, value in (
            ("opt-2.7b", 0.346), ("opt-6.7b", 0.364), ("flan-t5-xl", 0.442), ("flan-t5-xxl", 0.447),
        )
    },
    "retrieval-coco": {"itm-vit-g-coco": {"text R@1": 0.854, "image R@1": 0.683}},
    "retrieval-flickr30k": {"itm-vit-g-coco": {"text R@1": 0.976, "image R@1": 0.897}},
}  # fmt: skip


PAPER_TASKS = (*PUBLISHED, "flickr30k")


def published(task: str, model: str) -> dict[str, float]:
    """The published figures of a model, by its name or alias; empty where there are none."""
    if model == DEFAULT:
        return {}
    return PUBLISHED.get(task, {}).get(resolve_alias(model).rpartition("blip2-")[2], {})
