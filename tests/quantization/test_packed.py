"""Linear layers with bf16 weights packed for oneDNN: the same products, plain weights in every state, and back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2.checkpoint import load_model, save_model
from blip2.modeling.blip2 import Blip2
from blip2.modeling.layers import cpu_has_bf16
from blip2.quantization.apply import prepack, unpack
from blip2.quantization.packed import PackedLinear

pytestmark = pytest.mark.skipif(not cpu_has_bf16(), reason="weights are packed on CPUs that have bf16")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def packed(inputs: int, outputs: int) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer, and torch's of the same weights."""
    plain = nn.Linear(inputs, outputs).bfloat16().eval()
    bias = nn.Parameter(plain.bias.detach().clone())
    return PackedLinear(plain.weight.detach(), bias).eval(), plain


def outputs(model: Blip2) -> Tensor:
    size = model.config.vision.image_size
    pixels, ids = drawn(3, 3, size, size, seed=9), torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 3)
    with torch.inference_mode():
        return model(pixels, ids)


@pytest.mark.parametrize("rows", [1, 5, 36, 300])
@pytest.mark.parametrize("sizes", [(70, 5), (256, 600), (64, 64)])
@torch.inference_mode()
def test_a_packed_weight_gives_the_same_products(rows: int, sizes: tuple[int, int]) -> None:
    layer, plain = packed(*sizes)
    x = drawn(2, rows, sizes[0]).bfloat16()
    exact = x.double() @ plain.weight.double().mT + plain.bias.double()
    assert layer(x).shape == (2, rows, sizes[1])
    assert off(layer(x), exact) < 1.1 * off(plain(x), exact) < 0.01


def test_a_packed_weight_is_plain_in_the_state_and_gradients_pass() -> None:
    layer, plain = packed(64, 48)
    assert "weight" not in dict(layer.named_parameters())
    assert torch.equal(layer.weight, plain.weight) and layer.weight.dtype == torch.bfloat16
    state = layer.state_dict()
    assert state.keys() == plain.state_dict().keys() and torch.equal(state["weight"], plain.weight)
    x = drawn(3, 64).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    expected = plain.weight.detach().float().sum(0).expand(3, -1)
    assert x.grad is not None and off(x.grad, expected.double()) < 0.01
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("change", ["dtype", "device", "training", "loading", "setting"])
def test_an_unpacked_weight_can_be_changed(change: str) -> None:
    layer, plain = packed(64, 48)
    model = nn.ModuleDict({"layer": layer})
    with torch.inference_mode():
        unpack(model)
    if change == "dtype":
        model = model.float()
    elif change == "device":
        model = model.to("cpu")
    elif change == "training":
        model.train()
    elif change == "loading":
        plain = nn.Linear(64, 48).bfloat16()
        model.load_state_dict({f"layer.{name}": tensor for name, tensor in plain.state_dict().items()})
    else:  # as adapters that are merged do
        plain = nn.Linear(64, 48).bfloat16()
        model["layer"].weight, model["layer"].bias = plain.weight, plain.bias
    weight = model["layer"].weight
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and not weight.is_inference()
    assert torch.equal(weight.bfloat16(), plain.weight)
    assert torch.equal(
        model["layer"](torch.eye(64, dtype=weight.dtype)).bfloat16(), plain(torch.eye(64).bfloat16())
    )


def test_what_a_packed_weight_cannot_do_is_an_error() -> None:
    layer, plain = packed(64, 48)
    with pytest.raises(ValueError, match=r"prepack=False.*apply\.unpack\(model\)"):
        layer.train()
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(48, 64))  # type: ignore[misc]
    assert torch.equal(layer.weight, plain.weight)


def test_a_packed_weight_is_loaded_strictly() -> None:
    layer, plain = packed(64, 48)
    before = layer.weight
    for state, message in [
        ({"bias": plain.bias}, "Missing key.*weight"),
        ({"bias": plain.bias, "weight": plain.weight[1:]}, "size mismatch for weight"),
        (plain.state_dict() | {"spare": plain.bias}, "Unexpected key.*spare"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
    layer.load_state_dict({"bias": plain.bias, "weight": 2 * before.float()})
    assert torch.equal(layer.weight, 2 * before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_packed_as_the_original(way: str) -> None:
    layer, plain = packed(64, 48)
    copied = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = drawn(3, 64).bfloat16()
    for one in (layer, copied):
        assert isinstance(one, PackedLinear) and torch.equal(one.weight, plain.weight)
        assert torch.equal(one(x), layer(x))


def test_a_model_is_packed_for_inference_alone(generator_folder: Path, tmp_path: Path) -> None:
    plain, quick = (load_model(generator_folder, dtype="bf16", prepack=prepack) for prepack in (False, True))
    assert isinstance(plain, Blip2) and isinstance(quick, Blip2)
    assert isinstance(quick.language.layers[0].fc1, PackedLinear)
    assert not any(isinstance(part, PackedLinear) for part in plain.modules())
    expected = outputs(plain)
    assert off(outputs(quick), expected.double()) < 0.05
    state = quick.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    other = {name: value + 1 for name, value in state.items()}
    copied = copy.deepcopy(quick)
    copied.load_state_dict(other)
    assert all(torch.equal(copied.state_dict()[name], value) for name, value in other.items())
    again = load_model(save_model(quick, tmp_path / "saved", tokenizer=generator_folder))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    wide = load_model(generator_folder, dtype="fp32", prepack=True)
    assert not any(isinstance(part, PackedLinear) for part in wide.modules())
    with pytest.raises(ValueError, match="prepack=False"):
        quick.train()
    unpack(quick)
    assert {name for name, _ in quick.train().named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert torch.equal(outputs(quick.eval()), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_packed_afterwards_as_while_loading(variants: dict[str, Path], tied: bool) -> None:
    folder = variants["opt" if tied else "opt-untied"]
    loaded, later = (load_model(folder, dtype="bf16", prepack=prepack) for prepack in (True, False))
    assert isinstance(loaded, Blip2) and isinstance(later, Blip2)
    prepack(later)
    kinds = [{name: type(part) for name, part in model.named_modules()} for model in (loaded, later)]
    assert kinds[0] == kinds[1] and (kinds[0]["language.lm_head"] is PackedLinear) == (not tied)
    assert torch.equal(outputs(loaded), outputs(later)) and later.language.tied == tied


def test_training_reaches_every_weight_of_a_model_that_was_packed(generator_folder: Path) -> None:
    model = load_model(generator_folder, dtype="bf16", prepack=True)
    unpack(model)
    assert all(parameter.requires_grad for parameter in model.train().parameters())
