"""The stem: its fold is a linear map of each cell, its convolutions are plain ones, and its tensors are checked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tiny_stem import FINE, HEAD, STAGES, tiny_stem_tensors
from torch import Tensor

from blip2.modeling.config import ConfigError
from blip2.modeling.stem import FAMILIAR_SPREAD, STRIDES, Stem, fold, folded_px


def build(tensors: dict[str, Tensor]) -> Stem:
    with torch.device("meta"):
        stem = Stem({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    stem.load_state_dict(tensors, assign=True)
    return stem.requires_grad_(False)


def plain_maps(tensors: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The maps by functions alone, padded as TensorFlow pads: the odd pixel last."""

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, weight, tensors[f"{name}.bias"], stride, groups=groups)

    x, fine, number = F.relu6(convolve(pixels, "first", 2)), pixels, 0
    for stage, (blocks, *_) in enumerate(STAGES):
        for first in (i == 0 for i in range(blocks)):
            name, y = f"blocks.{number}", x
            if f"{name}.expand.weight" in tensors:
                y = F.relu6(convolve(y, f"{name}.expand"))
            y = F.relu6(convolve(y, f"{name}.depth", STRIDES[stage] if first else 1, y.shape[1]))
            y = convolve(y, f"{name}.project")
            x, number = y if first else x + y, number + 1
        if stage == 4:
            fine = x
    return fine, F.relu6(convolve(x, "head"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tiny_stem_tensors()


@pytest.mark.parametrize("packed", [False, True])
def test_the_maps_are_those_of_plain_convolutions(tensors: dict[str, Tensor], packed: bool) -> None:
    stem, pixels = build(tensors), torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    fine, head = (stem.pack() if packed else stem).maps(pixels)
    plain_fine, plain_head = plain_maps(tensors, pixels)
    assert fine.shape == (2, FINE, 6, 6) and head.shape == (2, HEAD, 3, 3)
    torch.testing.assert_close(fine, plain_fine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head, plain_head, rtol=1e-4, atol=1e-5)
    assert plain_head.std() > 0.1 and (plain_head == 6).any() and (plain_head == 0).any()


def test_a_cell_holds_coarse_then_fine_then_evidence(tensors: dict[str, Tensor]) -> None:
    pixels = torch.randn(2, 3, 64, 96)[..., :64]
    fine, head = plain_maps(tensors, pixels)
    image = build(tensors)(pixels)
    assert image.shape == (2, 3, 32, 32)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"readout.{name}.weight"], tensors.get(f"readout.{name}.bias"))

    logits = linear("classifier", head.mean((2, 3)))
    probabilities = (
        logits.softmax(-1) * (FAMILIAR_SPREAD / logits.std(-1, keepdim=True)).clamp(max=1).square()
    )
    assert probabilities.max() < 0.99
    for i in range(2):
        for j in range(2):
            square = [fine[:, :, 2 * i + y, 2 * j + x] for y in range(2) for x in range(2)]
            parts = [linear("coarse", head[:, :, i, j]), *(linear("fine", at) for at in square)]
            values = torch.cat([*parts, linear("evidence", probabilities)], dim=1)  # [B, 768]
            patch = image[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            torch.testing.assert_close(patch.flatten(1), values, rtol=1e-4, atol=1e-4)


def test_a_patch_convolution_is_a_linear_map_of_the_cells() -> None:
    cells, weight = torch.randn(2, 768, 4, 4), torch.randn(10, 3, 16, 16)
    mapped = torch.einsum("on,bnij->boij", weight.flatten(1), cells)
    torch.testing.assert_close(F.conv2d(fold(cells), weight, stride=16), mapped, rtol=1e-4, atol=1e-4)


def test_value_n_has_its_place() -> None:
    cells = torch.arange(768.0)[:, None, None] * torch.tensor([[1.0, 0.0]])  # [768, 1, 2]
    image = fold(cells[None].transpose(2, 3))[0]  # two cells, one above the other
    assert image.shape == (3, 32, 16)
    for n in (0, 1, 16, 255, 256, 700, 767):
        assert image[n // 256, n % 256 // 16, n % 16] == n
    assert not image[:, 16:].any()


def test_without_evidence_there_is_no_classifier() -> None:
    tensors = tiny_stem_tensors(detail=64, evidence=0)
    assert not any("classifier" in name for name in tensors)
    assert build(tensors)(torch.randn(1, 3, 64, 64)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_does_not_depend_on_its_batch(tensors: dict[str, Tensor], packed: bool) -> None:
    stem, pixels = build(tensors), torch.randn(11, 3, 64, 64)
    if packed:
        stem.pack()
    together = stem(pixels)
    alone = torch.cat([stem(row[None]) for row in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_threads_do_not_disturb_each_other(tensors: dict[str, Tensor]) -> None:
    stem, batches = build(tensors).pack(), torch.randn(24, 2, 3, 64, 64).unbind()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(stem, batches))
    for folded, pixels in zip(together, batches, strict=True):
        assert torch.equal(folded, stem(pixels))


def test_it_passes_no_gradient(tensors: dict[str, Tensor]) -> None:
    stem, pixels = build(tensors), torch.randn(1, 3, 64, 64, requires_grad=True)
    assert not stem(pixels).requires_grad and not any(p.requires_grad for p in stem.parameters())
    assert not stem.training


def test_sizes() -> None:
    assert folded_px(256) == 128
    with pytest.raises(ConfigError, match="a multiple of 32 px, not 260"):
        folded_px(260)


def test_tensors_that_are_no_stem(tensors: dict[str, Tensor]) -> None:
    def refused(says: str, changed: dict[str, Tensor]) -> None:
        with pytest.raises(ConfigError, match=says):
            build(changed)

    def without(name: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    for name in tensors:
        refused("stem", without(name))
    refused("lacks the tensor first.weight", {})
    refused("lacks blocks.3.depth.bias", without("blocks.3.depth.bias"))
    refused("has no place for 'spare'", tensors | {"spare": torch.zeros(1)})
    refused("has no place for 'blocks.20", tensors | {"blocks.20.depth.bias": torch.zeros(1)})
    refused("head.bias of the shape", tensors | {"head.bias": torch.zeros(HEAD + 1)})
    refused("first.weight of the shape", tensors | {"first.weight": torch.zeros(8, 4, 3, 3)})
    refused("has the shape", tensors | {"first.weight": torch.zeros(8)})
    refused("not 4", tensors | {"blocks.0.depth.weight": torch.zeros(8, 1, 4, 4)})
    refused("768 values a cell", tensors | {"readout.fine.weight": torch.zeros(33, FINE)})
    narrow = {n: t for n, t in tensors.items() if not n.startswith("blocks.8")}
    refused("7 stages of blocks, each of a width; got 6", narrow)
