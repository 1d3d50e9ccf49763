"""Loading is strict, takes the memory of the weights once, and reports what is wrong with a file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2.checkpoint import CheckpointError, load_model, load_processors, open_tensors
from blip2.checkpoint.key_mapping import from_hugging_face, to_hugging_face
from blip2.checkpoint.load import DROPPED
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import ConfigError


@pytest.fixture
def folder(generator_folder: Path, tmp_path: Path) -> Path:
    """A folder of its own for a test that breaks it."""
    return Path(shutil.copytree(generator_folder, tmp_path / "model"))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Change, add or (None) remove tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_a_folder_or_the_file_in_it(generator_folder: Path) -> None:
    for path in (generator_folder, str(generator_folder), generator_folder / "model.safetensors"):
        model = load_model(path)
        assert isinstance(model, Blip2)
        assert not model.training
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_every_tensor_arrives_bit_for_bit(generator_folder: Path, matcher_folder: Path) -> None:
    for folder in (generator_folder, matcher_folder):
        state = load_model(folder).state_dict()
        with open_tensors(folder) as tensors:
            for name in tensors:
                ours = from_hugging_face(name)
                assert ours is not None
                assert to_hugging_face(ours) == name
                assert torch.equal(state[ours], tensors[name])


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mapped files")
def test_weights_are_mapped_not_copied(generator_folder: Path) -> None:
    model = load_model(generator_folder)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(generator_folder / "model.safetensors")):
            start, end = line.split()[0].split("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in part for part in mapped), name


def test_mapped_weights_can_be_trained(generator_folder: Path) -> None:
    before = (generator_folder / "model.safetensors").read_bytes()
    model = load_model(generator_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (generator_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.float16), ("fp64", torch.float64)],
)
def test_dtypes(name: str, dtype: torch.dtype, generator_folder: Path) -> None:
    for wanted in (name, dtype):
        model = load_model(generator_folder, dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert isinstance(model, Blip2)
        assert model.language.lm_head.weight is model.language.embed_tokens.weight
    with pytest.raises(CheckpointError, match="dtype 'int8' is not known; choose one of fp32"):
        load_model(generator_folder, dtype="int8")
    with pytest.raises(CheckpointError, match=r"dtype torch.int8 is not known"):
        load_model(generator_folder, dtype=torch.int8)


def test_mixed_dtypes_are_settled_within_each_part(folder: Path) -> None:
    """fp16 matrices beside fp32 norms, as LAVIS keeps them: the part runs in what most of its values are."""
    tensors = load_file(folder / "model.safetensors")
    rewrite(
        folder,
        {name: tensor.float() for name, tensor in tensors.items() if "norm" in name.lower()},
    )
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    rewrite(folder, {name: tensor.float() for name, tensor in tensors.items() if name.startswith("qformer.")})
    model = load_model(folder)
    assert isinstance(model, Blip2)
    assert {parameter.dtype for parameter in model.qformer.parameters()} == {torch.float32}
    ids = torch.tensor([[2, 5]])
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32), ids).dtype == torch.float16


def test_a_matcher_with_and_without_its_head_for_writing(matcher_folder: Path, tmp_path: Path) -> None:
    model = load_model(matcher_folder)
    assert isinstance(model, Blip2Matcher)
    assert model.itg_head is not None
    folder = Path(shutil.copytree(matcher_folder, tmp_path / "model"))
    with open_tensors(folder) as tensors:
        gone: dict[str, Tensor | None] = {
            n: None for n in tensors if n == "temp" or n.startswith("itg_head.")
        }
    rewrite(folder, gone)
    model = load_model(folder)
    assert isinstance(model, Blip2Matcher)
    assert model.itg_head is None


def test_buffers_of_older_files_are_dropped(folder: Path) -> None:
    rewrite(folder, {name: torch.arange(8)[None] for name in DROPPED})
    load_model(folder)


# --- refused -------------------------------------------------------------------------------------------------------


def test_missing_and_spare_tensors_are_named(folder: Path) -> None:
    rewrite(folder, {"query_tokens": None, "language_model.model.decoder.layers.7.fc1.bias": torch.ones(3)})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensor \(qformer.query_tokens\); holds 1 tensor \(language_model.*7"
    ):
        load_model(folder)
    rewrite(folder, {f"extra.{i:02}": torch.ones(1) for i in range(12)})
    with pytest.raises(
        CheckpointError,
        match=r"holds 12 tensors \(extra.00, .*extra.09 and 2 more\) that belong to no BLIP-2",
    ):
        load_model(folder)


def test_a_part_of_a_model_says_so(folder: Path) -> None:
    with open_tensors(folder) as tensors:
        rewrite(folder, {name: None for name in tensors if name.startswith("language_model.")})
    with pytest.raises(CheckpointError, match="has no language model: it is a part of a model"):
        load_model(folder)


def test_shapes_that_differ_are_named(folder: Path) -> None:
    rewrite(folder, {"query_tokens": torch.ones(1, 9, 24)})
    with pytest.raises(CheckpointError, match=r"query_tokens \[1, 9, 24\] instead of \[1, 4, 24\]\)"):
        load_model(folder)


def test_weights_that_are_no_floats(folder: Path) -> None:
    rewrite(folder, {"query_tokens": torch.ones(1, 4, 24, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"query_tokens \(torch.int8\)\), which are no weights"):
        load_model(folder)


def test_config_and_weights_of_two_models(folder: Path, matcher_folder: Path) -> None:
    shutil.copy(matcher_folder / "config.json", folder)
    with pytest.raises(CheckpointError, match=r"lacks .* holds .* its config.json has no place for"):
        load_model(folder)


def test_broken_configs(folder: Path) -> None:
    change_config(folder, model_type="llava")
    with pytest.raises(ConfigError, match="model_type 'llava'"):
        load_model(folder)
    for content, message in (
        (b"{", "no valid JSON"),
        (b"\xff", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
    ):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(folder)


def test_weights_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*no other tensor file"):
        load_model(folder)


def test_processing(generator_folder: Path) -> None:
    image_processor, tokenizer = load_processors(generator_folder)
    assert image_processor.size == 32
    assert tokenizer.encode("a photo")[0] == tokenizer.special_id("bos_token")
