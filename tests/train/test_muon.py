"""Muon beside torch's own, and what it promises of an update."""

from __future__ import annotations

import pytest
import torch

from blip2.train.muon import Muon, orthogonal

SHAPES = [(24, 24), (72, 24), (24, 72)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonal(matrix)
    kept = torch.diagonal(left.mT @ ours @ right.mT)
    large = values > 0.05 * values.norm()
    assert ((kept > 0.65) & (kept < 1.25))[large].all()
    assert torch.allclose(left @ torch.diag(kept) @ right, ours, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    mine = Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.02)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    moved = (theirs - first).detach()
    # torch's rounds are in bfloat16, ours in float32
    assert (ours - theirs).norm() < 0.02 * moved.norm()
    assert mine.state[ours]["momentum_buffer"].equal(other.state[theirs]["momentum_buffer"])


def test_a_parameter_without_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [parameter]}], lr=0.1).step()
    assert parameter.equal(torch.ones(4, 4))
