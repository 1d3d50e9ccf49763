"""What `inspect` reports of checkpoints, good and bad; it reads no value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2.checkpoint import CheckpointError, convert, inspect, load_model, open_tensors
from blip2.tensorfiles.tensors import Tensors


@pytest.fixture
def folder(variants: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of its own for a test that changes it."""
    return Path(shutil.copytree(variants["opt"], tmp_path / "model"))


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, section: str | None = None, **settings: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw if section is None else raw[section]).update(settings)
    (folder / "config.json").write_text(json.dumps(raw))


def test_a_good_folder(variants: dict[str, Path]) -> None:
    inspection = inspect(variants["opt"])
    model = load_model(variants["opt"])
    assert (inspection.layout, inspection.file_format, inspection.head) == (
        "Hugging Face",
        "safetensors",
        "tied",
    )
    assert inspection.variant == "generator, ViT 88 wide, 32 px, OPT 32 wide"
    assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert inspection.stored_bytes == 4 * inspection.parameters
    assert (inspection.problems, inspection.notes) == ((), ())
    assert [*inspection.parts] == ["image encoder", "Q-Former", "projection", "language model"]
    assert sum(part.tensors for part in inspection.parts.values()) == inspection.tensors
    encoder = inspection.parts["image encoder"]
    assert encoder.dtypes == {"float32": sum(parameter.numel() for parameter in model.vision.parameters())}
    json.dumps(inspection.as_json())


def test_heads(variants: dict[str, Path], tmp_path: Path) -> None:
    assert inspect(variants["opt-untied"]).head == "stored"
    assert inspect(variants["matcher"]).head == "none"
    convert(variants["opt"], tmp_path / "paddle", to="paddle")
    inspection = inspect(tmp_path / "paddle")
    assert (inspection.head, inspection.file_format) == ("stored", "paddle")
    assert any("says that the head is tied, but one is stored" in note for note in inspection.notes)
    convert(variants["opt"], tmp_path / "lavis", to="lavis")
    assert inspect(tmp_path / "lavis").file_format == "torch"


def test_no_value_is_read(variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a value was read")

    monkeypatch.setattr(Tensors, "__getitem__", read)
    monkeypatch.setattr(Tensors, "copy", read)
    for variant in variants.values():
        assert inspect(variant).problems == ()


def test_what_looks_wrong(folder: Path) -> None:
    words, head = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    bias = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    rewrite(folder, {bias: None, "odd.name": torch.zeros(2), "query_tokens": torch.zeros(1, 4, 65)})
    problems = inspect(folder).problems
    assert any("belong to no BLIP-2 model: 1 (odd.name)" in problem for problem in problems)
    assert any(f"missing: 1 ({bias})" in problem for problem in problems)
    assert any("query_tokens [1, 4, 65] instead of [1, 4, 64]" in problem for problem in problems)
    assert len(problems) == 3
    with pytest.raises(CheckpointError):
        load_model(folder)

    rewrite(folder, {words: None, head: None})
    inspection = inspect(folder)
    assert inspection.head == "missing"
    assert any(words in problem and head in problem for problem in inspection.problems)


def test_what_is_worth_knowing(folder: Path) -> None:
    change(folder, "vision_config", layer_norm_eps=1e-5)
    change(folder, "text_config", eos_token_id=2, vocab_size=50272)
    words = torch.zeros(50272, 32, dtype=torch.float16)
    rewrite(folder, {"language_model.model.decoder.embed_tokens.weight": words})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    notes = inspect(folder).notes
    assert any("layer_norm_eps is 1e-05; it was trained with 1e-6" in note for note in notes)
    assert any("eos_token_id is 2: captions end with a newline" in note for note in notes)
    assert any("no tokenizer" in note for note in notes)
    assert inspect(folder).problems == ()


def test_a_matcher_that_does_not_say_so(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["matcher"], tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    del raw["architectures"]
    (folder / "config.json").write_text(json.dumps(raw))
    inspection = inspect(folder)
    assert inspection.variant.startswith("matcher")
    assert inspection.problems == ()
    assert any("its tensors do" in note for note in inspection.notes)
    assert load_model(folder).config == load_model(variants["matcher"]).config


def test_a_part_of_a_lavis_file(variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants["opt"], tmp_path / "lavis", to="lavis")
    with open_tensors(tmp_path / "lavis") as tensors:
        kept = {
            name: tensors.copy(name) for name in tensors if not name.startswith(("visual_", "opt_model."))
        }
    (tmp_path / "alone").mkdir()
    save_file(kept, tmp_path / "alone" / "model.safetensors")
    inspection = inspect(tmp_path / "alone" / "model.safetensors")
    (problem,) = inspection.problems
    assert "lacks its image encoder (visual_encoder.*)" in problem
    assert "its language model (opt_model.* or t5_model.*)" in problem
    assert [*inspection.parts] == ["image encoder", "Q-Former", "projection"]  # of the encoder, its last norm
