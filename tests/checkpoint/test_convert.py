"""The table of docs/formats.md: every layout with every variant converts, is verified, inspected and loaded."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import blip2.checkpoint
from blip2.checkpoint import CheckpointError, convert, inspect, load_model, load_processors, open_tensors
from blip2.checkpoint.convert import Format
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import T5Config
from blip2.tensorfiles.writers import write_pdparams

convert_module = importlib.import_module("blip2.checkpoint.convert")  # `convert` names the function

VARIANTS = ("opt", "opt-untied", "t5", "clip", "matcher", "matcher-itg")
FORMATS: tuple[Format, ...] = ("hf", "paddle", "lavis")
LAYOUT = {"hf": "Hugging Face", "paddle": "PaddleNLP", "lavis": "LAVIS"}


@torch.inference_mode()
def outputs(model: Blip2 | Blip2Matcher) -> list[torch.Tensor]:
    """What a model makes of two images and texts."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    ids, mask = torch.randint(3, 60, (2, 5), generator=generator), torch.ones(2, 5, dtype=torch.int64)
    if isinstance(model, Blip2):
        return [model(pixels, ids, mask, ids if isinstance(model.config.language, T5Config) else None)]
    features = model.vision(pixels)
    results = [
        model.image_embeddings(features),
        model.text_embeddings(ids, mask),
        model.itm_logits(features, ids, mask),
    ]
    return results if model.itg_head is None else [*results, model.text_logits(features, ids, mask)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with open_tensors(folder) as tensors:
        return {name: tensors.copy(name) for name in tensors}


def assert_same_bytes(one: Path, other: Path) -> None:
    """Two folders hold the same tensors under the same names."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, to: Format, variants: dict[str, Path], tmp_path: Path) -> None:
    source = variants[variant]
    conversion = convert(source, tmp_path / "there", to=to, verify=True)
    assert "bit by bit" in conversion.verified
    assert "outputs for a probe image equal" in conversion.verified

    inspection = inspect(tmp_path / "there")
    matcher = variant.startswith("matcher")
    assert inspection.problems == ()
    assert inspection.layout == ("PaddleMIX" if matcher and to == "paddle" else LAYOUT[to])
    assert inspection.variant.startswith("matcher" if matcher else "generator")
    assert inspection.tokenizer
    # Paddle stores the tied head too
    heads = 304 * 32 if to == "paddle" and variant in ("opt", "clip") else 0
    assert inspection.parameters == inspect(source).parameters + heads

    ours, theirs = load_model(tmp_path / "there"), load_model(source)
    assert ours.config == theirs.config
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    image_processor, words = load_processors(tmp_path / "there")
    assert image_processor == load_processors(source)[0]
    assert words.encode("a photo of the red cat") == load_processors(source)[1].encode(
        "a photo of the red cat"
    )

    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert_same_bytes(tmp_path / "back", source)
    back = load_model(tmp_path / "back")
    assert back.config == theirs.config


@pytest.mark.parametrize("variant", ["opt", "t5", "matcher-itg"])
def test_between_the_others(variant: str, variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants[variant], tmp_path / "lavis", to="lavis")
    convert(tmp_path / "lavis", tmp_path / "paddle", to="paddle", verify=True)
    convert(tmp_path / "paddle", tmp_path / "lavis-again", to="lavis", verify=True)
    assert_same_bytes(tmp_path / "lavis", tmp_path / "lavis-again")


def test_paddle_stores_linear_weights_turned_round(variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants["opt"], tmp_path / "paddle", to="paddle")
    hf, paddle = tensors_of(variants["opt"]), tensors_of(tmp_path / "paddle")
    layer, theirs = "language_model.model.decoder.layers.1", "language_model.opt.decoder.layers.1"
    words = "language_model.model.decoder.embed_tokens.weight"
    assert torch.equal(paddle[f"{theirs}.linear1.weight"], hf[f"{layer}.fc1.weight"].t())
    assert torch.equal(
        paddle[f"{theirs}.self_attn.q_proj.weight"], hf[f"{layer}.self_attn.q_proj.weight"].t()
    )
    assert torch.equal(paddle[f"{theirs}.norm2.bias"], hf[f"{layer}.final_layer_norm.bias"])
    assert torch.equal(paddle["language_model.opt.embeddings.word_embeddings.weight"], hf[words])
    assert torch.equal(paddle["language_model.lm_head.decoder_weight"], hf[words])
    patches = "vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(paddle[patches], hf[patches])
    text = json.loads((tmp_path / "paddle" / "config.json").read_text())["text_config"]
    assert (text["intermediate_size"], text["hidden_act"]) == (64, "relu")
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "paddle").iterdir()}


def test_lavis_stores_no_key_bias(variants: dict[str, Path], tmp_path: Path) -> None:
    for variant, keys in (("opt", False), ("t5", True)):
        convert(variants[variant], tmp_path / variant, to="lavis")
        hf, lavis = tensors_of(variants[variant]), tensors_of(tmp_path / variant)
        bias = hf["vision_model.encoder.layers.1.self_attn.qkv.bias"].chunk(3)
        prefix = "visual_encoder.blocks.1.attn"
        assert torch.equal(lavis[f"{prefix}.q_bias"], bias[0])
        assert torch.equal(lavis[f"{prefix}.v_bias"], bias[2])
        assert (f"{prefix}.k_bias" in lavis) == keys  # one that is not zero changes nothing, but is not lost
        assert f"{prefix}.qkv.bias" not in lavis
        assert ("opt_proj.weight" in lavis) != ("t5_proj.weight" in lavis)


def test_paddlenlps_safetensors(variants: dict[str, Path], tmp_path: Path) -> None:
    """The name that Hugging Face uses, Paddle's names and layout inside."""
    for variant in ("opt", "opt-untied", "t5"):
        convert(variants[variant], tmp_path / variant, to="paddle")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors_of(tmp_path / variant).items()},
            tmp_path / variant / "model.safetensors",
            metadata={"format": "np"},
        )
        (tmp_path / variant / "model_state.pdparams").unlink()
        assert inspect(tmp_path / variant).layout == "PaddleNLP"
        convert(tmp_path / variant, tmp_path / f"{variant}-back", to="hf", verify=True)
        assert_same_bytes(tmp_path / f"{variant}-back", variants[variant])


@pytest.mark.parametrize(("to", "pattern"), [("hf", "*.safetensors"), ("paddle", "*.pdparams")])
def test_shards(to: Format, pattern: str, variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants["opt"], tmp_path / "there", to=to, shard_bytes=100_000, verify=True)
    files = sorted((tmp_path / "there").glob(pattern))
    assert len(files) > 3
    index = json.loads(next((tmp_path / "there").glob("*.index.json")).read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert_same_bytes(tmp_path / "back", variants["opt"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dtypes(dtype: str, variants: dict[str, Path], tmp_path: Path) -> None:
    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    for to in FORMATS:
        conversion = convert(variants["opt"], tmp_path / to, to=to, dtype=dtype, verify=True)
        assert f"after rounding to {dtype}" in conversion.verified
        convert(tmp_path / to, tmp_path / f"{to}-back", to="hf")
        source = tensors_of(variants["opt"])
        for name, tensor in tensors_of(tmp_path / f"{to}-back").items():
            assert torch.equal(tensor, source[name].to(target)), name


def test_smallest_exact(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["opt"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    half, brain, neither = "query_tokens", "language_projection.weight", "language_projection.bias"
    tensors[half] = tensors[half].half().float()
    tensors[brain] = tensors[brain].bfloat16().float() * 2.0**30  # beyond fp16
    tensors[neither][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    conversion = convert(folder, tmp_path / "small", to="hf", dtype="smallest-exact", verify=False)
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert conversion.narrowed == 2
    assert conversion.read_bytes - conversion.written_bytes == 2 * (
        small[half].numel() + small[brain].numel()
    )
    assert (small[half].dtype, small[brain].dtype) == (torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        assert torch.equal(
            small[name].to(tensor.dtype).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        )


def test_values_beyond_fp16(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["opt"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["query_tokens"][0, 0, 0] = 70_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="query_tokens holds values beyond the range"):
        convert(folder, tmp_path / "new", to="hf", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_verify_finds_what_is_wrong(
    variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = convert_module._converted

    def wrong(stored: object, name: str, *rest: object) -> Iterator[Tensor]:
        for block in real(stored, name, *rest):  # type: ignore[arg-type]
            yield block + (name == "qformer.layernorm.bias") * 1e-6

    monkeypatch.setattr(convert_module, "_converted", wrong)
    with pytest.raises(CheckpointError, match=r"qformer\.layernorm\.bias differs"):
        convert(variants["opt"], tmp_path / "new", to="paddle", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_compares_settings(
    variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal tensors with another activation are another model."""
    real = convert_module.settings

    def wrong(*arguments: object) -> dict[str, dict[str, object]]:
        files = real(*arguments)  # type: ignore[arg-type]
        files["config.json"]["text_config"]["activation_function"] = "gelu"
        return files

    monkeypatch.setattr(convert_module, "settings", wrong)
    with pytest.raises(CheckpointError, match="other outputs"):
        convert(variants["opt"], tmp_path / "new", to="hf", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_refusals(variants: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'onnx' is not known; choose one of hf, paddle, lavis"):
        convert(variants["opt"], tmp_path / "new", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="dtype 'int8' is not known"):
        convert(variants["opt"], tmp_path / "new", to="hf", dtype="int8")
    with pytest.raises(ValueError, match="LAVIS reads one file"):
        convert(variants["opt"], tmp_path / "new", to="lavis", shard_bytes=10)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(variants["opt"], tmp_path / "taken", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_leaves_nothing(
    variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        (path / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blip2.checkpoint.save, "write_files", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(variants["opt"], tmp_path / "new", to="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process")
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.full)])
def test_kills_leave_all_or_nothing(kills: int, variants: dict[str, Path], tmp_path: Path) -> None:
    """Killed at random moments, each time the target is absent or complete, and the next run takes its place."""
    generator = random.Random(0)
    begun = time.perf_counter()
    convert(variants["opt"], tmp_path / "whole", to="paddle")
    duration = time.perf_counter() - begun
    expected = (tmp_path / "whole" / "model_state.pdparams").read_bytes()
    for i in range(kills):
        target = tmp_path / f"{i // 5}"  # five times the same: what was left behind is in the next one's way
        process = os.fork()
        if process == 0:
            try:
                convert(variants["opt"], target, to="paddle")
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0, 1.2 * duration))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if target.exists():
            assert (target / "model_state.pdparams").read_bytes() == expected
            assert {path.name for path in target.iterdir()} >= {
                path.name for path in (tmp_path / "whole").iterdir()
            }
            shutil.rmtree(target)
        convert(variants["opt"], target, to="paddle")
        assert (target / "model_state.pdparams").read_bytes() == expected
        shutil.rmtree(target)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.skipif(os.name != "posix", reason="locks files")
def test_two_writers(variants: dict[str, Path], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / ".new.part").mkdir()
    with (tmp_path / ".new.part" / ".lock").open("wb") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            convert(variants["opt"], tmp_path / "new", to="hf")
    convert(variants["opt"], tmp_path / "new", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_progress(variants: dict[str, Path], tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    totals: dict[str, int] = {}

    def progress(what: str, done: int, total: int) -> None:
        counts[what] = counts.get(what, 0) + done
        totals[what] = total

    conversion = convert(variants["t5"], tmp_path / "new", to="paddle", verify=True, progress=progress)
    assert counts == totals
    assert counts["write"] == conversion.read_bytes


# --- LAVIS's own files: frozen parts left out, no config.json ------------------------------------------------------


def stored_as(folder: Path, file: Path, keep: tuple[str, ...]) -> dict[str, Tensor]:
    """Write some of a folder's tensors, those whose names begin with `keep`, to another file."""
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if name.startswith(keep)}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, file)
    return kept


@pytest.mark.parametrize("variant", ["opt", "t5", "clip", "matcher-itg"])
def test_parts_from_elsewhere(variant: str, variants: dict[str, Path], tmp_path: Path) -> None:
    """A file as LAVIS's trainer leaves it, an image encoder as EVA-CLIP's, a language model as saved alone."""
    source = variants[variant]
    convert(source, tmp_path / "lavis", to="lavis")
    whole = tensors_of(tmp_path / "lavis")
    bare = {n.removeprefix("visual_encoder."): t for n, t in whole.items() if n.startswith("visual_encoder.")}
    save_file(bare, tmp_path / "eva.safetensors")
    trained = (
        "Qformer.",
        "query_tokens",
        "ln_vision.",
        "opt_proj.",
        "t5_proj.",
        "vision_proj.",
        "text_proj.",
    )
    stored_as(tmp_path / "lavis", tmp_path / "model.safetensors", (*trained, "itm_head.", "temp"))
    parts = {"vision": tmp_path / "eva.safetensors"}
    with pytest.raises(CheckpointError, match=r"lacks its image encoder .*vision=:"):
        load_model(tmp_path / "model.safetensors")
    if not variant.startswith("matcher"):
        (tmp_path / "language").mkdir()
        own = {
            n.removeprefix("language_model."): t
            for n, t in tensors_of(source).items()
            if n.startswith("language_m")
        }
        save_file(own, tmp_path / "language" / "model.safetensors", metadata={"format": "pt"})
        text = json.loads((source / "config.json").read_text())["text_config"]
        (tmp_path / "language" / "config.json").write_text(json.dumps(text | {"eos_token_id": 2}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, tmp_path / "language")
        with pytest.raises(CheckpointError, match=r"lacks its language model .*language=:"):
            load_model(tmp_path / "model.safetensors", **parts)
        parts["language"] = tmp_path / "language"
    ours, theirs = load_model(tmp_path / "model.safetensors", **parts), load_model(source)
    assert ours.vision.post_layernorm.eps == 1e-5  # LAVIS's own, and what it is run with
    theirs.vision.post_layernorm.eps = 1e-5
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    if variant == "opt":
        # the newline, not </s>
        assert ours.config.language.eos_token_id == theirs.config.language.eos_token_id
    convert(tmp_path / "model.safetensors", tmp_path / "hf", to="hf", verify=True, **parts)
    assert_same_bytes(tmp_path / "hf", source)
    assert load_model(tmp_path / "hf").vision.post_layernorm.eps == 1e-5


def test_what_lavis_stores_beside_is_dropped(variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants["matcher-itg"], tmp_path / "lavis", to="lavis")
    tensors = tensors_of(tmp_path / "lavis")
    words = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["Qformer.cls.predictions.decoder.weight"] = words.clone()
    tensors["Qformer.cls.predictions.decoder.bias"] = tensors["Qformer.cls.predictions.bias"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    ours, theirs = load_model(tmp_path / "model.safetensors"), load_model(variants["matcher-itg"])
    theirs.vision.post_layernorm.eps = 1e-5  # LAVIS's own
    for a, b in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_spare_tensor_is_an_error(variants: dict[str, Path], tmp_path: Path) -> None:
    convert(variants["t5"], tmp_path / "paddle", to="paddle")
    tensors = tensors_of(tmp_path / "paddle") | {"language_model.t5.odd": torch.zeros(2)}
    info = {name: blip2.checkpoint.TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with (tmp_path / "paddle" / "model_state.pdparams").open("wb") as file:
        write_pdparams(file, info, lambda name: [tensors[name].reshape(-1)])
    with pytest.raises(CheckpointError, match=r"language_model\.odd"):
        load_model(tmp_path / "paddle")
    assert any("language_model.odd" in problem for problem in inspect(tmp_path / "paddle").problems)
