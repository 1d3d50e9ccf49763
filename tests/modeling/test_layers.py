"""What the parts compute in bf16, on CPUs without instructions for it too: as torch does, and closer to fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2.checkpoint import load_model
from blip2.modeling import layers
from blip2.modeling.blip2 import Blip2
from blip2.quantization.packed import WideningLinear


@pytest.fixture(params=[True, False], ids=["with", "without"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(layers, "cpu_has_bf16", lambda: request.param)
    return bool(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 7, 8, 300])
@pytest.mark.parametrize("outputs", [5, 256, 600])
def test_bf16_products(rows: int, outputs: int, has_bf16: bool) -> None:
    narrow = nn.Linear(70, outputs).bfloat16()
    layer = WideningLinear(narrow)
    x = drawn(2, rows, 70).bfloat16()
    with torch.inference_mode():
        exact = x.double() @ layer.weight.double().mT + layer.bias.double()
        ours, theirs = layer(x), narrow(x)
    assert ours.dtype == torch.bfloat16 and ours.shape == (2, rows, outputs)
    assert off(ours, exact) < 1.2 * off(theirs, exact) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype, has_bf16: bool) -> None:
    layer = WideningLinear(nn.Linear(64, 300, bias=False)).to(dtype)
    x = drawn(20, 64).to(dtype)
    with torch.inference_mode():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_training_goes_through_torch(has_bf16: bool) -> None:
    layer, x = WideningLinear(nn.Linear(64, 300)).bfloat16(), drawn(20, 64).bfloat16()
    layer(x).float().square().sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())


def test_a_model_in_bf16_is_no_further_from_fp32(generator_folder: Path, has_bf16: bool) -> None:
    exact, narrow = load_model(generator_folder, dtype="fp64"), load_model(generator_folder, dtype="bf16")
    assert isinstance(exact, Blip2) and isinstance(narrow, Blip2)
    size = exact.config.vision.image_size
    pixels, ids = drawn(3, 3, size, size, seed=9), torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 3)
    with torch.inference_mode():
        expected, ours = exact(pixels.double(), ids), narrow(pixels, ids)
    assert off(ours, expected) < 0.1
    widens = any(isinstance(part, WideningLinear) for part in narrow.modules())
    assert widens != has_bf16 and not any(isinstance(part, WideningLinear) for part in exact.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_an_image_attends_as_torch_s_fused_attention_does(dtype: torch.dtype) -> None:
    query, key, value = drawn(2, 200, 3, 4, 24).to(dtype).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
    exact = nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = nn.functional.scaled_dot_product_attention(query, key, value)
    ours = layers.attend(query, key, value)
    assert ours.shape == exact.shape and ours.dtype == dtype
    assert off(ours, exact) < 2.5 * off(theirs, exact) + 1e-6  # scores and shares are rounded to bf16
    assert torch.equal(layers.attend(query[1:], key[1:], value[1:]), ours[1:])  # alone as in a batch


def test_a_torch_without_onednn_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(torch.ops), "mkldnn", object())
    assert layers.cpu_has_bf16.__wrapped__() is False
