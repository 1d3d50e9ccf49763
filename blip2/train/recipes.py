"""The published recipes of BLIP-2 as data.

Li et al., BLIP-2 (2023), section 3.4 and appendix, and LAVIS's project files. Batch sizes are those of one GPU; the
published runs used sixteen. The betas are the paper's; LAVIS leaves the second at 0.999.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from blip2.train.loop import FitOptions


@dataclass(frozen=True)
class Recipe:
    """How one stage was trained; the defaults are those of pre-training.

    vision_layer_decay: with `train_vision`, the learning rate of each image encoder layer relative to the next.
    prompt: what the language model reads before a caption.
    """

    task: Literal["stage1", "stage2", "finetune"]
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 5000
    warmup_lr: float = 1e-6
    batch_size: int = 100
    epochs: int = 10
    image_size: int = 224
    prompt: str = ""
    max_tokens: int = 32
    train_vision: bool = False
    vision_layer_decay: float = 1.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)

    def options(self, batches_per_epoch: int, *, accumulate: int = 1) -> FitOptions:
        """Options for a dataset of `batches_per_epoch` batches; `dataclasses.replace` changes the others."""
        shared = ("lr", "min_lr", "warmup_steps", "warmup_lr", "weight_decay", "betas")
        return FitOptions(
            steps=max(1, self.epochs * batches_per_epoch // accumulate),
            **{name: getattr(self, name) for name in shared},
            clip_norm=None,  # the published runs do not clip
            accumulate=accumulate,
            precision="bf16",
        )


_COCO = Recipe(
    "finetune", lr=1e-5, min_lr=0.0, warmup_steps=1000, warmup_lr=1e-8, batch_size=16, epochs=5,
    image_size=364, train_vision=True,
)  # fmt: skip


def stage1() -> Recipe:
    """Representation learning: Q-Former on the frozen image encoder, ITC + ITM + ITG."""
    return Recipe("stage1")


def stage2() -> Recipe:
    """Generative learning: Q-Former and projection through the frozen language model."""
    return Recipe("stage2", warmup_steps=2000, batch_size=64)


def coco_caption() -> Recipe:
    """Fine-tuning on COCO captions, the image encoder included."""
    return replace(_COCO, prompt="a photo of")


def coco_retrieval() -> Recipe:
    """Fine-tuning the stage-1 model on COCO for retrieval, the image encoder included."""
    return replace(_COCO, task="stage1", batch_size=14, max_tokens=35, vision_layer_decay=0.95)
