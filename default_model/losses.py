"""The losses that only the default model is trained on, as pure functions of tensors; float32 in any precision."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.train.losses import contrast, matmul_fp32

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bound on the inverse temperature, section 2.5 of its paper


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor | None = None) -> Tensor:
    """CLIP's symmetric contrastive loss. Radford et al. (2021), figure 3.

    Args:
        image, text: [B, E], of any length; normalised here.
        logit_scale: scalar, the logarithm of the inverse temperature; bounded by log 100.
        ids: int64 [B]; rows with equal ids (the same text twice, say) count as positives.
    """
    cosine = matmul_fp32(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1).mT)  # [B, B]
    return contrast(cosine * logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(), ids, label_smoothing=0.0)


def place_loss(places: Tensor, target: Tensor) -> Tensor:
    """The share of the variance of places that is not explained: 1 for always the middle, 0 for the exact places.

    Args:
        places: [B, N, 2], column and row as shares of the image's side.
        target: [B, N, 2], the same.

    Returns:
        A scalar.
    """
    return 12 * F.mse_loss(places.float(), target)  # 1 / 12: the variance of a place drawn anywhere


def region_loss(patches: Tensor, phrases: Tensor, target: Tensor, logit_scale: Tensor) -> Tensor:
    """Dense contrast: every object of an image is classified among all phrases, as a whole and patch by patch.

    An object is the patches of one image with one phrase. As a whole it is the mean of its patches; that counts twice
    as much as its single patches, whose mean is taken first, so that large objects do not outweigh small ones.

    Args:
        patches: [B, N, E], of any length; normalised here.
        phrases: [P, E], each different from the others; normalised here.
        target: int64 [B, N], the phrase of each patch, -1 where the patch is left out.
        logit_scale: scalar, the logarithm of the inverse temperature; bounded by log 100.

    Returns:
        A scalar; zero where no patch is labelled.
    """
    count = len(phrases)
    image, place = (target >= 0).nonzero(as_tuple=True)  # of the K labelled patches
    labelled = patches[image, place].float()  # [K, E]
    objects, owner, sizes = torch.unique(
        image * count + target[image, place], return_inverse=True, return_counts=True
    )  # O objects; the object of each patch; patches of each object
    weight = 1 / sizes[owner]  # [K]
    sums = labelled.new_zeros(len(objects), labelled.shape[1])
    means = sums.index_add(0, owner, labelled * weight[:, None])  # [O, E]
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    names = F.normalize(phrases.float(), dim=-1).mT  # [E, P]

    def cost(features: Tensor, labels: Tensor) -> Tensor:
        logits = matmul_fp32(F.normalize(features, dim=-1), names) * scale
        return F.cross_entropy(logits, labels, reduction="none")

    patch_costs = cost(labelled, target[image, place]) * weight  # [K]
    total: Tensor = 2 * cost(means, objects % count).sum() + patch_costs.sum()
    mean: Tensor = total / (3 * max(1, len(objects)))
    return mean
