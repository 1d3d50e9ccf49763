"""Finding texts for images and images for texts: contrast (ITC) ranks all, matching (ITM) re-ranks the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.images import ImageSource
from blip2.inputs import in_batches
from blip2.matching import Matcher

CANDIDATES, TEXT_LENGTH = 128, 35  # of the published figures


@dataclass(frozen=True)
class Tables:
    """How well I images and T texts fit: by contrast float32 [I, T]; re-ranked for each direction.

    texts: [I, T], for each image; images: [T, I], for each text. What was not re-ranked is -inf there.
    """

    contrast: Tensor
    texts: Tensor
    images: Tensor


@torch.inference_mode()
def match_tables(
    matcher: Matcher,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    candidates: int = CANDIDATES,
    logits: bool = True,
    batch_size: int = 32,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Tables:
    """Score every image with every text.

    Args:
        candidates: so many of the best by contrast are re-ranked, for each image and for each text.
        logits: add the matching head's logit, as the published figures do; False: the probability.
        progress: called with what is done, how many, of how many.
    """
    embedded = []
    for start, some in in_batches(list(images), batch_size):
        embedded.append(matcher.embed(list(some)))
        progress("embedding", start + len(some), len(images))
    words = matcher.embed_text(list(texts))  # [T, E]
    # Image by image: all queries at once would be 32 times the table.
    contrast = torch.stack([(words @ queries.T).amax(1) for queries in torch.cat(embedded)])  # [I, T]
    wanted = _best(contrast, candidates)
    wanted_images = _best(contrast.T.contiguous(), candidates).T  # of each text, as [I, T]
    matched = torch.zeros_like(contrast)
    for row, image in enumerate(images):
        columns = (wanted[row] | wanted_images[row]).nonzero().flatten().tolist()
        features = matcher.features([image])  # [1, N, W]
        for start, few in in_batches(columns, batch_size):
            ids, mask = matcher.encode([texts[column] for column in few])
            scores = matcher.model.itm_logits(features.expand(len(few), -1, -1), ids, mask).float()
            one = scores[:, 1] if logits else scores.softmax(-1)[:, 1]
            matched[row, columns[start : start + len(few)]] = one.cpu()
        progress("matching", row + 1, len(images))
    summed = contrast + matched
    nothing = torch.tensor(-torch.inf)
    return Tables(
        contrast, torch.where(wanted, summed, nothing), torch.where(wanted_images, summed, nothing).T
    )


def _best(table: Tensor, count: int) -> Tensor:
    """True at the `count` greatest of each row."""
    top = table.topk(min(count, table.shape[1])).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)


def recalls(
    table: Tensor, right: Sequence[Sequence[int]], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k, 0..1: the share of rows [R, C] that hold one of their right columns among the k greatest."""
    places = ranks(table, right)
    return {f"R@{k}": sum(place < k for place in places) / len(places) for k in at}


def ranks(table: Tensor, right: Sequence[Sequence[int]]) -> list[int]:
    """For each row how many columns are greater than the best of its right ones; 0: it comes first."""
    found = []
    for row, columns in zip(table, right, strict=True):
        best = row[list(columns)].max()
        # What was not re-ranked comes after all that was, and is never first by a tie.
        found.append(len(row) if best == -torch.inf else int((row > best).sum()))
    return found
