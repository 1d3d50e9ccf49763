"""The losses of BLIP-2's training, as pure functions of tensors.

ITC, ITM and ITG are stage 1's: Li et al., BLIP-2 (2023), section 3.2, as LAVIS computes them in one process. All are
computed in float32 whatever precision the model runs in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that is no target
LABEL_SMOOTHING = 0.1


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, also under autocast: similarities are divided by a small temperature afterwards."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def query_similarity(image_embeddings: Tensor, text_embeddings: Tensor, temp: Tensor | float) -> Tensor:
    """Every image against every text: the best query counts.

    Args:
        image_embeddings: [B, Q, E], each query of length 1.
        text_embeddings: [C, E], of length 1.
        temp: the temperature the similarities are divided by.

    Returns:
        float32 [B, C]. Its transpose is the similarity of texts to images.
    """
    by_query = matmul_fp32(image_embeddings, text_embeddings.mT)  # [B, Q, C]
    return by_query.amax(dim=1) / temp


def contrast(
    similarity: Tensor, ids: Tensor | None = None, *, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Cross-entropy of each row finding its own column and each column its own row, the mean of both directions.

    Args:
        similarity: [B, B], already divided by the temperature.
        ids: int64 [B]; rows with equal ids are each other's positives and share the target evenly. None: only the
            diagonal is positive.
        label_smoothing: share of the target spread evenly over all columns.
    """
    size = len(similarity)
    if ids is None:
        target = torch.eye(size, device=similarity.device)
    else:
        same = (ids[:, None] == ids[None, :]).float()
        target = same / same.sum(1, keepdim=True)
    target = (1 - label_smoothing) * target + label_smoothing / size
    # `same` is symmetric and so is the target of the other direction
    forth = -(similarity.log_softmax(dim=1) * target).sum(1).mean()
    back = -(similarity.mT.log_softmax(dim=1) * target).sum(1).mean()
    return (forth + back) / 2


def hard_negatives(
    sim_i2t: Tensor, sim_t2i: Tensor, generator: torch.Generator, image_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a wrong text for every image and a wrong image for every text, the similar ones more often.

    Args:
        sim_i2t, sim_t2i: [B, B], images to texts and texts to images; drawn by their softmax.
        generator: source of randomness, on the same device.
        image_ids: int64 [B]; rows of the same image are never each other's negatives.

    Returns:
        (texts for the images, images for the texts), each int64 [B].

    Raises:
        ValueError: a row of the batch has no other image beside it.
    """
    size = len(sim_i2t)
    ids = torch.arange(size, device=sim_i2t.device) if image_ids is None else image_ids
    same = ids[:, None] == ids[None, :]
    if bool(same.all(dim=1).any()):
        raise ValueError(
            f"a batch of {size} holds only one image, but matching needs another one as a negative; use larger batches"
        )
    with torch.no_grad():
        texts, images = (
            torch.multinomial(sim.float().masked_fill(same, float("-inf")).softmax(1), 1, generator=generator)
            for sim in (sim_i2t, sim_t2i)
        )
    return texts.squeeze(1), images.squeeze(1)


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Image-text matching: two-class cross-entropy. logits [P, 2], column 1 = match; labels int64 [P]."""
    return F.cross_entropy(logits.float(), labels)


def itg_loss(
    logits: Tensor, ids: Tensor, mask: Tensor, *, label_smoothing: float = LABEL_SMOOTHING
) -> Tensor:
    """Image-grounded generation: each position predicts the next token; padding is no target.

    Args:
        logits: [B, T, V], at each position for the token after it.
        ids: int64 [B, T], beginning with [DEC].
        mask: [B, T], 0 where `ids` is padding.
        label_smoothing: share of the target spread evenly over the vocabulary.
    """
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    return language_loss(logits, labels, label_smoothing=label_smoothing)


def language_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the next token. logits [B, T, V]; labels int64 [B, T], -100 = no target; shifted inside.

    Zero, not NaN, where nothing is a target.
    """
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
