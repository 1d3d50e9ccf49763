"""Weights that are not finite are refused by name, in every format; a digest knows all of them, and is made once."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import blip2
from blip2.bulk.describe import fingerprint
from blip2.checkpoint import (
    CheckpointError,
    convert,
    load_model,
    open_tensors,
    quantize_checkpoint,
    save_model,
    weights,
)
from blip2.cli import main
from blip2.tensorfiles.scan import Scan, digest_tensors, scan_file
from blip2.tensorfiles.tensors import TensorFile, TensorInfo, blocks
from blip2.tensorfiles.writers import write_pdparams

State = dict[str, Tensor]
NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _write_shards(folder: Path, state: State) -> None:
    names = sorted(state)
    shards = {
        f"model-0000{i}-of-00003.safetensors": {n: state[n] for n in names[i - 1 :: 3]} for i in (1, 2, 3)
    }
    for file, part in shards.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_paddle(folder: Path, state: State) -> None:
    info = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    with (folder / "model_state.pdparams").open("wb") as file:
        write_pdparams(file, info, lambda name: blocks(state[name]))


FORMATS: dict[str, Callable[[Path, State], object]] = {
    "safetensors": lambda folder, state: save_file(state, folder / "model.safetensors"),
    "shards": _write_shards,
    "torch": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "legacy": lambda folder, state: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "pdparams": _write_paddle,
    "parameters": lambda folder, state: torch.save(
        {name: torch.nn.Parameter(t) for name, t in state.items()}, folder / "pytorch_model.bin"
    ),
    "strided": lambda folder, state: torch.save(
        {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in state.items()},
        folder / "pytorch_model.bin",
    ),
}


def bare_copy(model: Path, folder: Path) -> State:
    """A model's folder without its weights; gives these."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_not_finite(
    form: str, dtype: torch.dtype, bad: float, variants: dict[str, Path], tmp_path: Path
) -> None:
    number = [*FORMATS].index(form) + 5 * DTYPES.index(dtype) + 11 * [str(bad)].count("nan")
    state = bare_copy(variants[("opt", "t5", "matcher")[number % 3]], tmp_path / "model")
    state = {name: t.to(dtype) for name, t in state.items()}
    floats = sorted(state)
    name = floats[(7 * number) % len(floats)]
    flat = state[name].view(-1)
    flat[(0, len(flat) // 2, len(flat) - 1)[number % 3]] = bad
    FORMATS[form](tmp_path / "model", state)
    with pytest.raises(CheckpointError, match=rf"'{name}' holds values that are not finite"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("to", ["lavis", "paddle"])
@pytest.mark.parametrize("variant", ["opt", "t5", "matcher"])
def test_other_layouts_name_their_own_tensor(
    variant: str, to: str, variants: dict[str, Path], tmp_path: Path
) -> None:
    convert(variants[variant], tmp_path / "other", to=to)  # type: ignore[arg-type]
    with open_tensors(tmp_path / "other") as tensors:
        state = {name: tensors.copy(name) for name in tensors}
        (file,) = {tensors.file(name).path for name in tensors}  # type: ignore[attr-defined]
    load_model(tmp_path / "other")
    for name in sorted(state)[::9]:
        good = state[name].clone()
        state[name].view(-1)[-1] = NAN
        if to == "lavis":
            torch.save({"model": state}, file)
        else:
            _write_paddle(file.parent, state)
        with pytest.raises(CheckpointError, match=f"{file.name}: tensor '{name}' holds"):
            load_model(tmp_path / "other")
        state[name] = good


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_scales(mode: str, bad: float, variants: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(variants["opt"], tmp_path / "model", mode)  # type: ignore[arg-type]
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    scales = [name for name in state if name.endswith(("_scale", "_scales"))]
    for name in (scales[0], scales[-1], "language_projection.bias"):
        damaged = {n: t.clone() for n, t in state.items()}
        damaged[name].view(-1)[0] = bad
        save_file(damaged, file)
        with pytest.raises(CheckpointError, match=rf"'{name}' holds values that are not finite"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("large", [3e38, -1e37, 2.7e36])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_scales_of_weights_that_no_float_holds(
    mode: str, large: float, variants: dict[str, Path], tmp_path: Path
) -> None:
    quantize_checkpoint(variants["opt"], tmp_path / "model", mode)  # type: ignore[arg-type]
    file = tmp_path / "model" / "model.safetensors"
    honest = load_file(file)
    scales = [name for name in honest if name.endswith(("_scale", "_scales"))]
    for name in (scales[0], scales[-1]):
        state = honest | {name: honest[name].clone()}
        state[name].view(-1)[-1] = large
        save_file(state, file)
        with pytest.raises(CheckpointError, match=rf"'{name}' makes quantized weights up to .* quantize"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("position", [0, 1, 7, 8, 15, 31, 63, 64, 1000, 2048, 4094, 4095])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2, torch.complex64], ids=str)
def test_no_place_is_passed_over(position: int, dtype: torch.dtype) -> None:
    values = torch.randn(4096).to(dtype)
    honest = _scan(values)
    values[position] = (NAN, INF, -INF)[position % 3]
    assert not honest.large and _scan(values).large == {"x": math.inf}


class _InMemory(TensorFile):
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.info = tensor, {"x": TensorInfo(tuple(tensor.shape), tensor.dtype)}

    def copied(self, name: str) -> Tensor:
        return self.tensor


def _scan(tensor: Tensor) -> Scan:
    return scan_file(_InMemory(tensor))


@pytest.mark.parametrize("door", ["caption", "quantize", "load int8", "verify"])
def test_other_doors(door: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    state = bare_copy(variants["t5"], folder)
    state["qformer.layernorm.weight"][0] = NAN
    save_file(state, folder / "model.safetensors")
    doors: dict[str, Callable[[], object]] = {
        "caption": lambda: blip2.load(folder, device="cpu"),
        "quantize": lambda: quantize_checkpoint(folder, tmp_path / "new", "int8"),
        "load int8": lambda: load_model(folder, quantize="int8"),
        "verify": lambda: convert(folder, tmp_path / "new", to="hf", verify=True),
    }
    with pytest.raises(CheckpointError, match=r"'qformer.layernorm.weight' holds values that are not finite"):
        doors[door]()
    assert not (tmp_path / "new").exists()


def test_words_stored_twice(variants: dict[str, Path], tmp_path: Path) -> None:
    """They must be equal, and a NaN equals itself: what is wrong with them is that they hold it."""
    state = bare_copy(variants["t5"], tmp_path / "model")
    state["language_model.shared.weight"][3, 3] = NAN
    state["language_model.encoder.embed_tokens.weight"] = state["language_model.shared.weight"].clone()
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(tmp_path / "model")


def test_a_part_from_another_file(variants: dict[str, Path], tmp_path: Path) -> None:
    state = bare_copy(variants["t5"], tmp_path / "model")
    language = {name: state.pop(name) for name in [*state] if name.startswith("language_model.")}
    save_file(state, tmp_path / "model" / "model.safetensors")
    part = tmp_path / "part.safetensors"
    save_file(language, part)
    load_model(tmp_path / "model", language=part)
    language["language_model.shared.weight"][-1, -1] = NAN
    save_file(language, part)
    with pytest.raises(CheckpointError, match=r"part.safetensors: .* not finite"):
        load_model(tmp_path / "model", language=part)
    load_model(variants["t5"], language=part)  # which has its own: those of the part are not used


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [
        (torch.float32, "fp16", 1e5),
        (torch.float32, "fp16", -65520.0),
        (torch.float64, "fp32", 1e39),
        (torch.float64, "bf16", -1e300),
        (torch.bfloat16, "fp16", 7e4),
        (torch.float32, "bf16", 3.4e38),
    ],
)
def test_values_that_the_dtype_cannot_hold(
    stored: torch.dtype, dtype: str, value: float, variants: dict[str, Path], tmp_path: Path
) -> None:
    state = bare_copy(variants["opt"], tmp_path / "model")
    state = {name: t.to(stored) for name, t in state.items()}
    state["query_tokens"].view(-1)[5] = value
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'query_tokens' holds values up to .* wider dtype"):
        load_model(tmp_path / "model", dtype=dtype)
    load_model(tmp_path / "model", dtype="fp64")


# --- the digest ------------------------------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    return blip2.load(folder, device="cpu").digest()


@pytest.mark.parametrize("number", range(12))
def test_one_value_changed_anywhere(number: int, variants: dict[str, Path], tmp_path: Path) -> None:
    state = bare_copy(variants["opt"], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(state, file)
    before = digest(tmp_path / "model")
    name = sorted(state)[number * len(state) // 12]
    flat = state[name].view(-1)
    place = len(flat) * (number % 4) // 4
    flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))  # one bit
    save_file(state, file)
    assert digest(tmp_path / "model") != before
    flat[place] = torch.nextafter(flat[place], torch.tensor(-9.0))
    save_file(dict(reversed(state.items())), file)
    assert digest(tmp_path / "model") == before


def test_files_do_not_matter(variants: dict[str, Path], tmp_path: Path) -> None:
    state = bare_copy(variants["opt"], tmp_path / "one")
    save_file(state, tmp_path / "one" / "weights of mine.safetensors")
    bare_copy(variants["opt"], tmp_path / "three")
    _write_shards(tmp_path / "three", state)
    assert digest(tmp_path / "one") == digest(tmp_path / "three") == digest(variants["opt"])
    state["query_tokens"].view(-1)[0] += 1e-4
    _write_shards(tmp_path / "three", state)
    assert digest(tmp_path / "three") != digest(variants["opt"])


def test_models_in_memory(variants: dict[str, Path]) -> None:
    model = load_model(variants["opt"])
    before = weights.model_digest(model)
    assert before == weights.model_digest(load_model(variants["opt"]))
    with torch.no_grad():
        model.qformer.layernorm.weight[-1] += 1e-6
    assert before != weights.model_digest(model)
    assert digest_tensors([("a", torch.ones(2))]) != digest_tensors([("b", torch.ones(2))])
    assert digest_tensors([("a", torch.ones(2))]) != digest_tensors([("a", torch.ones(1, 2))])


def _change_one_bit(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    flat = state[sorted(state)[len(state) // 2]].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0, dtype=flat.dtype))
    save_file(state, folder / "model.safetensors")


def test_a_run_of_other_weights_is_not_gone_on_with(
    generator_folder: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = Path(shutil.copytree(generator_folder, tmp_path / "model")), tmp_path / "out.jsonl"
    run = ["caption", *map(str, pictures[:2]), "--model", str(folder), "--max-new-tokens", "3"]
    run += ["--quiet", "--out", str(out)]
    assert main(run) == 0 and main(run) == 0
    _change_one_bit(folder)
    written = out.read_bytes()
    capsys.readouterr()
    assert main(run) != 0
    assert "weights" in capsys.readouterr().err and out.read_bytes() == written


def test_a_run_that_matches_knows_its_matcher(
    generator_folder: Path, matcher_folder: Path, tmp_path: Path
) -> None:
    matcher = Path(shutil.copytree(matcher_folder, tmp_path / "matcher"))
    before = blip2.load(generator_folder, matcher=matcher, device="cpu")
    expected = [fingerprint(before), fingerprint(before, matcher=True)]
    _change_one_bit(matcher)
    after = blip2.load(generator_folder, matcher=matcher, device="cpu")
    assert [fingerprint(after) == expected[0], fingerprint(after, matcher=True) == expected[1]] == [
        True,
        False,
    ]


# --- what is remembered ----------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that were read for their digest, by a process that has read none."""
    read: list[str] = []

    def counted(file: TensorFile) -> Scan:
        read.append(file.path.name)  # type: ignore[attr-defined]
        return scan_file(file)

    monkeypatch.setattr(weights, "scan_file", counted)
    monkeypatch.setattr(weights, "_scans", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def load_anew(folder: Path) -> None:
    """Load as another process would."""
    weights._scans.clear()
    load_model(folder)


def test_a_second_load_reads_nothing(passes: list[str], variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["opt"], tmp_path / "model"))
    file = folder / "model.safetensors"
    for _ in range(3):
        load_anew(folder)
    link = tmp_path / "link"
    link.mkdir()
    for path in folder.iterdir():
        (link / path.name).symlink_to(path)
    load_anew(link)
    assert passes == ["model.safetensors"]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    load_anew(folder)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    load_anew(folder)
    assert len(passes) == 3


def test_an_edit_that_keeps_size_and_time(
    passes: list[str], variants: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(variants["opt"], tmp_path / "model"))
    file = folder / "model.safetensors"
    load_anew(folder)
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(torch.tensor(NAN).numpy().tobytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="not finite"):
        load_anew(folder)


CACHES: dict[str, Callable[[Path], object]] = {
    "empty": lambda entry: entry.write_bytes(b""),
    "torn": lambda entry: entry.write_bytes(entry.read_bytes()[:30]),
    "no JSON": lambda entry: entry.write_bytes(b"\x00\xff" * 50),
    "a list": lambda entry: entry.write_bytes(b"[]"),
    "nothing known": lambda entry: entry.write_bytes(b'{"digest": 7, "file": null}'),
    "no digest": lambda entry: entry.write_text(
        json.dumps(json.loads(entry.read_text()) | {"digest": "z" * 64})
    ),
    "a wrong table": lambda entry: entry.write_text(
        json.dumps(json.loads(entry.read_text()) | {"large": {"x": "y"}})
    ),
    "huge": lambda entry: entry.open("r+b").truncate(1 << 33),
    "a folder": lambda entry: (entry.unlink(), entry.mkdir()),
    "a pipe": lambda entry: (entry.unlink(), os.mkfifo(entry)),
    "a loop": lambda entry: (entry.unlink(), entry.symlink_to(entry)),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
@pytest.mark.parametrize("damage", CACHES)
def test_a_damaged_cache_is_no_error(
    damage: str, passes: list[str], variants: dict[str, Path], tmp_path: Path
) -> None:
    load_anew(variants["opt"])
    (entry,) = (tmp_path / "cache" / "blip2" / "digests").iterdir()
    CACHES[damage](entry)
    load_anew(variants["opt"])
    assert len(passes) == 2


@pytest.mark.parametrize("where", ["file", "/proc/nothing", "relative", "long"])
def test_a_cache_that_cannot_be_written_is_no_error(
    where: str, passes: list[str], variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    places = {"file": tmp_path / "file", "long": tmp_path / ("x" * 300)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(places.get(where, where)))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_anew(variants["opt"])
    load_model(variants["opt"])
    assert len(passes) == 1  # within a process it is known all the same
    assert not (tmp_path / "relative").exists()


def test_many_at_once(passes: list[str], variants: dict[str, Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(load_anew, variants["opt"]) for _ in range(24)]:
            future.result()
    done = len(passes)
    load_anew(variants["opt"])
    assert len(passes) == done
    assert [path.suffix for path in (tmp_path / "cache" / "blip2" / "digests").iterdir()] == [".json"]


def test_a_file_that_changes_while_it_is_read(
    variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(variants["opt"], tmp_path / "model"))

    def changing(file: TensorFile) -> Scan:
        scan = scan_file(file)
        with (folder / "model.safetensors").open("ab") as opened:
            opened.write(b"x")
        return scan

    monkeypatch.setattr(weights, "scan_file", changing)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        load_model(folder)


def test_saved_anew_is_known_anew(variants: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(variants["opt"])
    save_model(model, tmp_path / "one", tokenizer=variants["opt"])
    save_model(model, tmp_path / "two", tokenizer=variants["opt"])
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
