"""The settings of evaluations, ours and those of the published tables, and the figures of those tables.

Li et al., BLIP-2 (2023), tables 2-5 of its first edition and the models' cards; settings as in LAVIS's configurations.
LAVIS also lemmatises answers to OK-VQA with spaCy, which is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from blip2.generation.options import GenerateKwargs
from blip2.registry import DEFAULT, resolve_alias
from blip2.text import CAPTION_PROMPT


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings of one kind of task. image_px: the published models' image size, None: whatever the model's is."""

    name: str
    prompt: str = CAPTION_PROMPT
    options: GenerateKwargs = field(default_factory=GenerateKwargs)
    candidates: int = 128  # retrieval: how many are re-ranked
    text_length: int | None = None  # retrieval: tokens of a text
    logits: bool = True  # retrieval: whether matching adds its logit or its probability
    image_px: int | None = None


_CAPTIONS: GenerateKwargs = {"num_beams": 5, "max_new_tokens": 30, "length_penalty": 1.0}
_ANSWERS: GenerateKwargs = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0}
_OWN, _PAPER = Protocol(name="default"), Protocol(name="paper")
PROTOCOLS = {
    "default": {
        "captions": replace(_OWN, options=_CAPTIONS),
        "photos": replace(_OWN, options=_CAPTIONS),
        "questions": replace(_OWN, options=_ANSWERS),
        "retrieval": replace(_OWN, candidates=32, logits=False),
    },
    # The shortest caption has 8 tokens including the four of "</s>a photo of"; lengths here count new tokens only.
    "paper": {
        "captions": replace(_PAPER, options={**_CAPTIONS, "min_new_tokens": 4}, image_px=364),
        "questions": replace(_PAPER, options=_ANSWERS, image_px=224),
        "retrieval": replace(_PAPER, candidates=128, text_length=35, image_px=364),
    },
}


def _coco(*scores: float) -> dict[str, float]:
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
    return dict(zip(names, scores, strict=True))


def _nocaps(near: float, inside: float, out: float, overall: float) -> dict[str, float]:
    return {"CIDEr": overall, "CIDEr in-domain": inside, "CIDEr near-domain": near, "CIDEr out-domain": out}


def _vqa(*accuracies: float) -> dict[str, dict[str, float]]:
    models = ("opt-2.7b", "opt-6.7b", "flan-t5-xl", "flan-t5-xxl")
    return {model: {"accuracy": accuracy} for model, accuracy in zip(models, accuracies, strict=True)}


# Task -> model on the Hub, without "Salesforce/blip2-" -> figure -> its value, 0..1 (CIDEr 0..10).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "coco": {
        "opt-2.7b-coco": _coco(0.832, 0.691, 0.556, 0.438, 0.317, 0.620, 1.461, 0.252),
        "opt-6.7b-coco": _coco(0.831, 0.689, 0.552, 0.434, 0.316, 0.618, 1.451, 0.251),
        "flan-t5-xl-coco": {"BLEU-4": 0.424, "CIDEr": 1.445},
    },
    "nocaps": {
        "opt-2.7b-coco": _nocaps(1.178, 1.230, 1.234, 1.197),
        "opt-6.7b-coco": _nocaps(1.192, 1.237, 1.244, 1.210),
        "flan-t5-xl-coco": _nocaps(1.202, 1.237, 1.248, 1.216),
    },
    "vqav2": _vqa(0.535, 0.543, 0.631, 0.652),
    "okvqa": _vqa(0.317, 0.364, 0.407, 0.459),
    "gqa": _vqa(0.346, 0.364, 0.442, 0.447),
    "retrieval-coco": {"itm-vit-g-coco": {"text R@1": 0.854, "image R@1": 0.683}},
    "retrieval-flickr30k": {"itm-vit-g-coco": {"text R@1": 0.976, "image R@1": 0.897}},
}
PAPER_TASKS = (*PUBLISHED, "flickr30k")


def published(task: str, model: str) -> dict[str, float]:
    """The published figures of a model, by its name or alias; empty if there are none."""
    if model == DEFAULT:
        return {}
    return PUBLISHED.get(task, {}).get(resolve_alias(model).rpartition("blip2-")[2], {})
