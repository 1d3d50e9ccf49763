"""Finding texts for images and images for texts: contrast (ITC) ranks all, matching (ITM) re-ranks the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip2.images import ImageSource
from blip2.inputs import in_batches
from blip2.matching import Matcher


@torch.inference_mode()
def match_tables(
    matcher: Matcher,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    *,
    candidates: int,
    logits: bool,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every one of I images with every one of T texts.

    Args:
        candidates: how many of the best by contrast are re-ranked, for each image and for each text.
        logits: add the matching head's logit, as for the published figures; False: its probability.
        progress: called with a label, how many are done, and of how many.

    Returns:
        The scores by contrast, float32 [I, T], and re-ranked for each image, [I, T], and for each text, [T, I]; these
        are -inf where not re-ranked.
    """
    embedded = []
    for start, batch in in_batches(list(images), batch_size):
        embedded.append(matcher.embed(list(batch)))
        progress("embedding", start + len(batch), len(images))
    words = matcher.embed_text(list(texts))  # [T, E]
    # Image by image: all queries at once would be 32 times the table.
    contrast = torch.stack([(words @ queries.T).amax(1) for queries in torch.cat(embedded)])  # [I, T]
    best_texts = _best(contrast, candidates)  # of each image, [I, T]
    best_images = _best(contrast.T.contiguous(), candidates).T  # of each text, [I, T]
    matched = torch.zeros_like(contrast)
    for row, image in enumerate(images):
        columns = (best_texts[row] | best_images[row]).nonzero().flatten().tolist()
        features = matcher.model.vision(matcher.prepare([image]).to(matcher.device))  # [1, N, W]
        for _, candidate_columns in in_batches(columns, batch_size):
            ids, mask = matcher.encode([texts[column] for column in candidate_columns])
            itm = matcher.model.itm_logits(features.expand(len(ids), -1, -1), ids, mask).float()  # [B, 2]
            scores = itm[:, 1] if logits else itm.softmax(-1)[:, 1]
            matched[row, candidate_columns] = scores.cpu()
        progress("matching", row + 1, len(images))
    summed = contrast + matched
    by_texts, by_images = (summed.masked_fill(~best, -torch.inf) for best in (best_texts, best_images))
    return contrast, by_texts, by_images.T


def _best(table: Tensor, count: int) -> Tensor:
    """True at the `count` greatest of each row."""
    top = table.topk(min(count, table.shape[1])).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)


def recalls(
    table: Tensor, right: Sequence[Sequence[int]], at: Sequence[int] = (1, 5, 10)
) -> dict[str, float | None]:
    """R@k, 0..1: the share of rows of [R, C] with one of their right columns among the k greatest.

    None where there are no more than k columns, so that each row would have one.
    """
    places = ranks(table, right)
    shares = {k: sum(place < k for place in places) / len(places) for k in at}
    return {f"R@{k}": share if table.shape[1] > k else None for k, share in shares.items()}


def ranks(table: Tensor, right: Sequence[Sequence[int]]) -> list[int]:
    """For each row the number of columns greater than the best of its right ones; 0: it comes first."""
    bests = [row[list(columns)].max() for row, columns in zip(table, right, strict=True)]
    # What was not re-ranked comes after everything else, and is never first by a tie.
    return [
        len(row) if best == -torch.inf else int((row > best).sum())
        for row, best in zip(table, bests, strict=True)
    ]
