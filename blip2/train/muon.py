"""Muon: the optimizer that makes momentum orthogonal before applying it. For the matrices of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic of Jordan et al. (2024): steepest at zero, and brings singular values to about one in five steps.
A, B, C = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay and updates as large as AdamW's, so that one learning rate fits both.

    Jordan et al., Muon (2024); Liu et al., Muon is Scalable for LLM Training (2025). As `torch.optim.Muon` with
    adjust_lr_fn="match_rms_adamw", except that it computes in float32: half the time or less on a CPU without
    bfloat16 instructions.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(mean, momentum))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """[M, N] -> the same with every singular value near one (0.7 to 1.2), by Newton-Schulz iteration.

    It runs on the smaller Gram matrix; the matrix itself is multiplied once, at the end.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    gram = x @ x.mT
    total: Tensor | None = None
    for left in reversed(range(NEWTON_SCHULZ_STEPS)):
        factor = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal().add_(A)
        total = factor if total is None else factor @ total
        if left:
            gram = factor @ gram @ factor
    assert total is not None
    x = total @ x
    out: Tensor = x if matrix.shape[0] <= matrix.shape[1] else x.mT
    return out
