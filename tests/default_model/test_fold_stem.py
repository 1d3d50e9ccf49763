"""The default model's stem: folded batch norms change no map, and the file that is written is read as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_stem import FINE, FIRST, HEAD, STAGES, tiny_processor, tiny_stem_tensors, with_stem
from torch import Tensor, nn

from blip2.loading import load_components
from blip2.modeling.config import ConfigError
from blip2.modeling.stem import STRIDES
from blip2.stemfiles import STEM_FILE, STEM_LICENSE
from default_model.stem import (
    IMAGE_PX,
    ORIGIN,
    blank_readout,
    build_stem,
    fold_batch_norms,
    share_stem,
    stem_tensors,
    write_stem,
)


class Same(nn.Conv2d):
    """A convolution padded as TensorFlow's "same"."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, self.weight, None, self.stride, groups=self.groups)


class Published(nn.Module):
    """The network with its batch norms, its tensors named as they are published."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, FIRST, 3, 2, bias=False), _norm(FIRST)
        self._blocks, self.ends, width = nn.ModuleList(), [], FIRST
        for stage, (blocks, kernel, expansion, outputs) in enumerate(STAGES):
            for first in (i == 0 for i in range(blocks)):
                block, middle = nn.Module(), width * expansion
                if expansion > 1:
                    block._expand_conv, block._bn0 = Same(width, middle, 1, bias=False), _norm(middle)
                stride = STRIDES[stage] if first else 1
                block._depthwise_conv = Same(middle, middle, kernel, stride, groups=middle, bias=False)
                block._bn1 = _norm(middle)
                block._project_conv, block._bn2 = Same(middle, outputs, 1, bias=False), _norm(outputs)
                self._blocks.append(block)
                width = outputs
            self.ends.append(len(self._blocks) - 1)
        self._conv_head, self._bn1 = Same(width, HEAD, 1, bias=False), _norm(HEAD)
        self._fc = nn.Linear(HEAD, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = fine = F.relu6(self._bn0(self._conv_stem(x)))
        for number, block in enumerate(self._blocks):
            layers = dict(block.named_children())
            y = x
            if "_expand_conv" in layers:
                y = F.relu6(layers["_bn0"](layers["_expand_conv"](y)))
            y = F.relu6(layers["_bn1"](layers["_depthwise_conv"](y)))
            y = layers["_bn2"](layers["_project_conv"](y))
            x = x + y if x.shape == y.shape else y
            fine = x if number == self.ends[4] else fine
        return fine, F.relu6(self._bn1(self._conv_head(x)))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


@pytest.fixture(scope="module")
def published() -> Published:
    torch.manual_seed(5)
    network = Published()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and "bn" in name:
            tensor.uniform_(0.3, 1.7) if name.endswith(("weight", "var")) else tensor.normal_(0, 0.4)
    return network.eval()


def test_folding_changes_no_map(published: Published) -> None:
    stem = build_stem(stem_tensors(fold_batch_norms(published.state_dict()), blank_readout(HEAD, FINE)))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = published(pixels)
    for ours, theirs in zip(stem.maps(pixels), expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_tensor_has_a_place(published: Published) -> None:
    with pytest.raises(ValueError, match=r"of no place in the network: _blocks\.0\._se\.weight"):
        fold_batch_norms(published.state_dict() | {"_blocks.0._se.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"lacks the tensor readout\.fine\.weight"):
        build_stem(fold_batch_norms(published.state_dict()) | {"readout.coarse.weight": torch.zeros(1, 1)})


def test_what_is_written_is_what_was_given(tmp_path: Path) -> None:
    tensors = tiny_stem_tensors()
    processor = write_stem(tmp_path / "new", tensors)
    assert processor.stem is not None and processor.stem.origin == ORIGIN
    assert processor.size == IMAGE_PX and processor.pixels_size == IMAGE_PX // 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == [STEM_FILE]
    pixels = torch.randn(1, 3, 64, 64)
    rounded = build_stem({name: tensor.half() for name, tensor in tensors.items()})
    torch.testing.assert_close(processor.fold(pixels), rounded(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        write_stem(tmp_path / "wide", tensors | {"head.bias": torch.full((HEAD,), 1e6)})


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_all_files_of_a_saved_model_have_the_usual_mode(generator_folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        processor = write_stem(tmp_path / "stem", tiny_stem_tensors())
        with_stem(generator_folder, tmp_path / "default", processor)
        shutil.copytree(tmp_path / "default", tmp_path / "other")
        share_stem(tmp_path / "other", "default")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "default" / STEM_FILE) in modes and set(modes.values()) == {0o640}, modes


def test_two_models_share_a_stem(generator_folder: Path, matcher_folder: Path, tmp_path: Path) -> None:
    processor = tiny_processor(tmp_path / "made")
    with_stem(generator_folder, tmp_path / "default", processor)
    matcher = with_stem(matcher_folder, tmp_path / "matcher", processor)
    shutil.copytree(matcher, tmp_path / "other")
    share_stem(matcher, "default")
    assert not (matcher / STEM_FILE).exists() and not (matcher / STEM_LICENSE).exists()
    raw = json.loads((matcher / "preprocessor_config.json").read_text())
    assert raw["stem"]["file"] == "../default/stem.safetensors" and raw["stem"]["origin"]
    shared = load_components(matcher, torch.device("cpu"), None, None).image_processor
    assert shared == processor

    shutil.copy(tiny_processor(tmp_path / "changed", seed=1).stem.path, tmp_path / "other")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="another stem"):
        share_stem(tmp_path / "other", "default")
