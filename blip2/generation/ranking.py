"""How likely each of many answers is: a question is read once, and every answer is read after it.

Token ids only. N answers to each of B prompts, T the longest answer's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.modeling.blip2 import Blip2
from blip2.modeling.kv_cache import PromptCache

ROWS = 128  # answers read together: their logits, as wide as the vocabulary, are what takes the memory


@torch.inference_mode()
def answer_logprobs(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Sequence[int]],
    *,
    prompt_cache: PromptCache | None = None,
    rows: int = ROWS,
) -> Tensor:
    """The log-probability that the model writes each answer and then ends (where it has an end token): float32 [B, N].

    Args:
        prefix: [B, Q, W]; input_ids, attention_mask: [B, T], the prompts; prompt_cache: as for `Blip2.prefill`.
        answers: the ids of each answer, without the end token; the same answers for every prompt.
        rows: answers read at a time, over all prompts; memory, never the result.

    Raises:
        ValueError: an answer without tokens, or one longer than the model's positions leave room for.
    """
    if not answers or not all(answers):
        raise ValueError("every answer needs a token at least, and there must be one answer")
    prompts, device = len(input_ids), input_ids.device
    # The longest first: those that are read to their end are the last rows, and are dropped.
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
    width = min(max(1, rows // prompts), len(answers))
    limit = len(answers[order[0]]) + 1
    decoding = model.prefill(
        prefix, input_ids, attention_mask, rows=width, max_new_tokens=limit, prompt_cache=prompt_cache
    )
    ends = [i for i in model.config.language.eos_token_ids if i >= 0]  # -1: none
    end_ids = torch.tensor(ends, dtype=torch.int64, device=device)
    first = decoding.logits.log_softmax(-1)  # [B, V]
    totals = torch.zeros(prompts, len(answers), device=device)
    for start in range(0, len(answers), width):
        batch = order[start : start + width]
        decoding.crop()
        logprobs = first[:, None]  # [B, 1, V], for the first token the same for all rows
        count = width  # answers that are still read
        for t in range(len(answers[batch[0]]) + 1):
            longer = sum(len(answers[i]) > t for i in batch)
            ended = [n for n in range(len(batch)) if t and len(answers[batch[n]]) == t]
            if ended and ends:
                columns = torch.tensor([batch[n] for n in ended], device=device)
                totals[:, columns] += logprobs[:, ended][..., end_ids].logsumexp(-1)
            if not longer:
                break
            columns = torch.tensor(batch[:longer], device=device)
            ids = torch.tensor([answers[i][t] for i in batch[:longer]], device=device)
            of_rows = logprobs.expand(-1, longer, -1) if t == 0 else logprobs[:, :longer]
            totals[:, columns] += of_rows.gather(2, ids[None, :, None].expand(prompts, -1, 1))[..., 0]
            if longer < count:
                prompt_rows = torch.arange(prompts, device=device)[:, None] * count
                decoding.reorder_cache((prompt_rows + torch.arange(longer, device=device)).flatten())
                count = longer
            logprobs = decoding.decode_step(ids.repeat(prompts)).log_softmax(-1).view(prompts, longer, -1)
    return totals
