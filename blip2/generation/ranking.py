"""How likely each of many answers is: a question is read once, and every answer is read after it.

Token ids only. N answers to each of B prompts, T the longest answer's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.modeling.blip2 import Blip2
from blip2.modeling.kv_cache import PromptCache

ROWS = 128  # answers read side by side: their logits, as wide as the vocabulary, are what takes the memory


@torch.inference_mode()
def answer_logprobs(
    model: Blip2,
    prefix: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    answers: Sequence[Sequence[int]],
    *,
    context: PromptCache | None = None,
    rows: int = ROWS,
) -> Tensor:
    """The log-probability that the model writes each answer and then ends: float32 [B, N].

    Args:
        prefix: [B, Q, W]; input_ids, attention_mask: [B, T], the prompts; context: as for `Blip2.start`.
        answers: the ids of each answer, without the end token; the same answers for every prompt.
        rows: answers read side by side for all prompts together; memory, never the result.

    Raises:
        ValueError: an answer without tokens, or one longer than the model's positions leave room for.
    """
    if not answers or not all(answers):
        raise ValueError("every answer needs a token at least, and there must be one answer")
    prompts, device = len(input_ids), input_ids.device
    # The longest first: those that are read to their end are the last rows, and are dropped.
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
    width = min(max(1, rows // prompts), len(answers))
    decoding = model.start(
        prefix,
        input_ids,
        attention_mask,
        rows=width,
        max_new_tokens=len(answers[order[0]]) + 1,
        context=context,
    )
    configured = model.config.language.eos_token_id
    ends = torch.tensor([configured] if isinstance(configured, int) else list(configured), device=device)
    first = decoding.logits.log_softmax(-1)  # [B, V]
    found = torch.zeros(prompts, len(answers), device=device)
    for start in range(0, len(answers), width):
        some = order[start : start + width]
        decoding.rewind()
        logprobs = first[:, None]  # [B, 1, V], for the first token the same for all rows
        reading = width
        for t in range(len(answers[some[0]]) + 1):
            going = sum(len(answers[i]) > t for i in some)
            if t:
                ended = [n for n in range(len(some)) if len(answers[some[n]]) == t]
                if ended:
                    places = torch.tensor([some[n] for n in ended], device=device)
                    found[:, places] += logprobs[:, ended][..., ends].logsumexp(-1)
            if not going:
                break
            ids = torch.tensor([answers[i][t] for i in some[:going]], device=device)
            chosen = logprobs.expand(-1, going, -1) if t == 0 else logprobs[:, :going]
            found[:, torch.tensor(some[:going], device=device)] += chosen.gather(
                2, ids[None, :, None].expand(prompts, -1, 1)
            )[..., 0]
            if going < reading:
                kept = torch.arange(prompts, device=device)[:, None] * reading + torch.arange(
                    going, device=device
                )
                decoding.reorder(kept.flatten())
                reading = going
            logprobs = decoding.step(ids.repeat(prompts)).log_softmax(-1).view(prompts, going, -1)
    return found
