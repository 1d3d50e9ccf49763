"""What the parts compute where the processor is slow in bf16: as torch does, and closer to fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2 import layers
from blip2.checkpoint import load_model
from blip2.layers import Linear
from blip2.model import Blip2


@pytest.fixture(params=[True, False], ids=["with", "without"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(layers, "processor_has_bf16", lambda: request.param)
    return bool(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 7, 8, 300])
@pytest.mark.parametrize("outputs", [5, 256, 600])
def test_bf16_products(rows: int, outputs: int, has_bf16: bool) -> None:
    narrow = nn.Linear(70, outputs).bfloat16()
    layer = Linear(70, outputs).bfloat16()
    layer.load_state_dict(narrow.state_dict())
    x = drawn(2, rows, 70).bfloat16()
    with torch.inference_mode():
        exact = x.double() @ layer.weight.double().mT + layer.bias.double()
        found, theirs = layer(x), narrow(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, rows, outputs)
    assert off(found, exact) < 1.2 * off(theirs, exact) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, has_bf16: bool) -> None:
    layer = Linear(64, 300, bias=False).to(dtype)
    x = drawn(20, 64).to(dtype)
    with torch.inference_mode():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_training_goes_through_torch(has_bf16: bool) -> None:
    layer, x = Linear(64, 300).bfloat16(), drawn(20, 64).bfloat16()
    layer(x).float().square().sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())


def test_a_model_in_bf16_is_no_further_from_fp32(generator_folder: Path, has_bf16: bool) -> None:
    exact, narrow = load_model(generator_folder, dtype="fp64"), load_model(generator_folder, dtype="bf16")
    assert isinstance(exact, Blip2) and isinstance(narrow, Blip2)
    size = exact.config.vision.image_size
    pixels, ids = drawn(3, 3, size, size, seed=9), torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 3)
    with torch.inference_mode():
        expected, found = exact(pixels.double(), ids), narrow(pixels, ids)
    assert off(found, expected) < 0.1
