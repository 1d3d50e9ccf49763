"""Model folders with int8 and int4 weights that were written before go on loading: see fixtures/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from blip2.checkpoint import convert, load_model, stored_as
from blip2.modeling.blip2 import Blip2, Blip2Matcher

FIXTURES = Path(__file__).parent / "fixtures"


def outputs(model: Blip2 | Blip2Matcher) -> Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        if isinstance(model, Blip2Matcher):
            return model.image_embeddings(model.vision(pixels))
        ids = torch.tensor([[2, 9, 12, 20], [2, 8, 30, 41]])
        decoder_ids = torch.tensor([[0, 5, 6], [0, 7, 8]])
        return model(pixels, ids, None, decoder_ids if model.config.language.is_encoder_decoder else None)


@pytest.mark.parametrize("name", ["matcher-int8", "opt-int4", "opt-int8", "t5-int4", "t5-int8"])
def test_a_folder_written_before_loads(name: str, tmp_path: Path) -> None:
    (expected,) = load_file(FIXTURES / f"{name}.expected.safetensors").values()
    assert stored_as(FIXTURES / name) == name.rpartition("-")[2]
    convert(FIXTURES / name, tmp_path / "floats", to="hf")  # the stored weights widened
    widened = outputs(load_model(tmp_path / "floats", dtype="fp32"))
    assert (widened - expected).norm() / expected.norm() < 1e-4
    quantized = outputs(load_model(FIXTURES / name))
    # models of random weights are rough: every layer doubles the errors of the one before
    assert (quantized - expected).norm() / expected.norm() < 0.3
