"""What the parts compute where the processor is slow in bf16: as torch does, and closer to fp32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2.checkpoint import load_model, save_model
from blip2.modeling import layers
from blip2.modeling.blip2 import Blip2
from blip2.quantization import packed
from blip2.quantization.packed import Linear


@pytest.fixture(params=[True, False], ids=["with", "without"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(packed, "cpu_has_bf16", lambda: request.param)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_an_image_attends_as_torch_s_fused_attention_does(dtype: torch.dtype) -> None:
    query, key, value = drawn(2, 200, 3, 4, 24).to(dtype).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
    exact = nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    theirs = nn.functional.scaled_dot_product_attention(query, key, value)
    found = layers.attend(query, key, value)
    assert found.shape == exact.shape and found.dtype == dtype
    assert off(found, exact) < 2.5 * off(theirs, exact) + 1e-6  # scores and shares are rounded to bf16
    assert torch.equal(layers.attend(query[1:], key[1:], value[1:]), found[1:])  # alone as in a batch


# --- laid out for oneDNN ---------------------------------------------------------------------------------------------

needs_bf16 = pytest.mark.skipif(
    not packed.cpu_has_bf16(), reason="weights are laid out on processors that have bf16"
)


def laid_out(inputs: int, outputs: int) -> tuple[Linear, nn.Linear]:
    """A layer that is laid out, and torch's of the same weights."""
    plain = nn.Linear(inputs, outputs).bfloat16().eval()
    layer = Linear(inputs, outputs).bfloat16().eval()
    layer.load_state_dict(plain.state_dict())
    layer.lay_out(layer.weight.detach())
    return layer, plain


@needs_bf16
@pytest.mark.parametrize("rows", [1, 5, 36, 300])
@pytest.mark.parametrize("sizes", [(70, 5), (256, 600), (64, 64)])
@torch.inference_mode()
def test_a_laid_out_weight_gives_the_same_products(rows: int, sizes: tuple[int, int]) -> None:
    layer, plain = laid_out(*sizes)
    x = drawn(2, rows, sizes[0]).bfloat16()
    exact = x.double() @ plain.weight.double().mT + plain.bias.double()
    assert layer(x).shape == (2, rows, sizes[1])
    assert off(layer(x), exact) < 1.1 * off(plain(x), exact) < 0.01


@needs_bf16
def test_a_laid_out_weight_is_there_whoever_asks() -> None:
    layer, plain = laid_out(64, 48)
    assert "weight" not in dict(layer.named_parameters())
    assert torch.equal(layer.weight, plain.weight) and layer.dtype == torch.bfloat16
    state = layer.state_dict()
    assert state.keys() == plain.state_dict().keys() and torch.equal(state["weight"], plain.weight)
    x = drawn(3, 64).bfloat16().requires_grad_()
    layer(x).float().sum().backward()  # gradients still pass
    assert x.grad is not None and bool(x.grad.any())
    assert "weight" not in dict(layer.named_parameters())


@needs_bf16
@pytest.mark.parametrize("change", ["dtype", "device", "training", "copy", "loading"])
def test_a_laid_out_weight_is_put_back_before_it_changes(change: str) -> None:
    layer, plain = laid_out(64, 48)
    if change == "dtype":
        layer = layer.float()
    elif change == "device":
        layer = layer.to("cpu")
    elif change == "training":
        layer.train()
    elif change == "copy":
        layer = copy.deepcopy(layer)
    else:
        plain = nn.Linear(64, 48).bfloat16()
        layer.load_state_dict(plain.state_dict())
    held = dict(layer.named_parameters())["weight"]
    assert torch.equal(held.bfloat16(), plain.weight)
    assert torch.equal(layer(torch.eye(64, dtype=held.dtype)).bfloat16(), plain(torch.eye(64).bfloat16()))


@needs_bf16
def test_a_model_is_laid_out_for_inference_alone(generator_folder: Path, tmp_path: Path) -> None:
    plain, quick = (load_model(generator_folder, dtype="bf16", lay_out=lay_out) for lay_out in (False, True))
    assert isinstance(plain, Blip2) and isinstance(quick, Blip2)
    assert (
        quick.language.layers[0].fc1._laid_out is not None and plain.language.layers[0].fc1._laid_out is None
    )
    size = plain.config.vision.image_size
    pixels, ids = drawn(3, 3, size, size, seed=9), torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 3)
    with torch.inference_mode():
        expected, found = plain(pixels, ids), quick(pixels, ids)
    assert off(found, expected) < 0.05
    state = quick.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    again = load_model(save_model(quick, tmp_path / "saved", tokenizer=generator_folder))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    assert load_model(generator_folder, dtype="fp32", lay_out=True).language.layers[0].fc1._laid_out is None
    assert {name for name, _ in quick.train().named_parameters()} == {n for n, _ in plain.named_parameters()}


@needs_bf16
def test_a_copy_leaves_the_original_laid_out() -> None:
    layer, plain = laid_out(64, 48)
    copied = copy.deepcopy(layer)
    assert layer._laid_out is not None and torch.equal(copied.weight, plain.weight)
    with torch.inference_mode():
        layer.put_back()
    assert not layer.weight.is_inference()  # such a tensor could never be trained


@needs_bf16
def test_a_weight_that_is_set_replaces_the_laid_out_one() -> None:
    layer, plain = laid_out(64, 48)
    layer.weight = nn.Parameter(torch.zeros(48, 64, dtype=torch.bfloat16))  # as adapters that are merged do
    assert layer._laid_out is None and torch.equal(layer(torch.ones(1, 64).bfloat16())[0], plain.bias)


@needs_bf16
def test_training_reaches_every_weight_of_a_model_that_was_laid_out(generator_folder: Path) -> None:
    model = load_model(generator_folder, dtype="bf16", lay_out=True)
    assert all(parameter.requires_grad for parameter in model.train().parameters())


def test_a_torch_without_onednn_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(torch.ops), "mkldnn", object())
    assert packed.cpu_has_bf16.__wrapped__() is False
