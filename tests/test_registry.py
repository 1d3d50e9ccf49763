"""The table of known models against the models themselves, and what the machine's check makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from blip2 import doctor, registry
from blip2.checkpoint import convert
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, Mode
from blip2.quantization.apply import EXCLUDED, quantized_layers
from blip2.quantization.formats import Int8Weight
from blip2.registry import KnownModel, folder_model, known_models, readable, resolve_alias


@pytest.mark.parametrize("known", registry.PUBLISHED, ids=lambda known: known.alias)
def test_parameters_are_those_of_the_model(known: KnownModel) -> None:
    with torch.device("meta"):
        built = (
            Blip2(known.config)
            if isinstance(known.config, Blip2Config)
            else Blip2Matcher(known.config, itg=False)
        )

    assert sum(parameter.numel() for parameter in built.parameters()) == known.parameters
    assert known.disk_bytes == 4 * known.parameters


def test_the_6_7b_model_is_as_published() -> None:
    (known,) = (known for known in registry.PUBLISHED if known.name == "Salesforce/blip2-opt-6.7b-coco")

    assert known.parameters == 7_753_329_664
    assert known.config.vision.num_positions == 677
    # bf16 was measured at 15.8 GB for transformers, which copies its cache for every beam
    assert known.memory_bytes("bf16") / 1e9 == pytest.approx(15.8, rel=0.05)
    assert known.memory_bytes("fp32") > 1.9 * known.memory_bytes("bf16")


@pytest.mark.parametrize("known", registry.PUBLISHED, ids=lambda known: known.alias)
@pytest.mark.parametrize("mode", registry.MODES)
def test_quantized_weights_take_the_estimated_memory(known: KnownModel, mode: Mode) -> None:
    with torch.device("meta"):
        built = Blip2(known.config) if isinstance(known.config, Blip2Config) else Blip2Matcher(known.config)
        kinds = {name: kind for name, _, kind in quantized_layers(built, mode)}
    stored = 0.0
    for name, values in built.state_dict().items():
        if (kind := kinds.get(name.removesuffix(".weight"))) is not None:
            stored += values.numel() * (1 if kind is Int8Weight else registry.INT4_MEMORY)
        else:
            stored += values.numel() * (2 if name.startswith(EXCLUDED) and name.endswith("weight") else 4)
    assert known._weight_bytes(mode) == pytest.approx(stored, rel=0.03)
    assert known.memory_bytes(mode) < known.memory_bytes("bf16")


def test_aliases() -> None:
    aliases = [known.alias for known in registry.PUBLISHED]
    assert len({*aliases, *(known.name for known in registry.PUBLISHED)}) == 2 * len(aliases)
    assert resolve_alias("itm-coco") == "Salesforce/blip2-itm-vit-g-coco"
    assert resolve_alias("someone/else") == "someone/else"


def test_names_of_lavis() -> None:
    assert len({known.lavis for known in registry.PUBLISHED}) == len(registry.PUBLISHED)
    assert resolve_alias("blip2_opt:caption_coco_opt6.7b") == "Salesforce/blip2-opt-6.7b-coco"
    assert resolve_alias("blip2_t5:pretrain_flant5xxl") == "Salesforce/blip2-flan-t5-xxl"
    assert (
        resolve_alias("blip2:coco")
        == resolve_alias("blip2_image_text_matching:coco")
        == "Salesforce/blip2-itm-vit-g-coco"
    )
    with pytest.raises(ValueError, match=r"blip2_pretrained_flant5xl_vitL\.pth .* vision=.* language="):
        resolve_alias("blip2_t5:pretrain_flant5xl_vitL")


def test_dtype_by_size() -> None:
    chosen = [registry.default_dtype(known.parameters) for known in registry.PUBLISHED]
    assert chosen == ["bf16"] * len(registry.PUBLISHED)
    assert registry.default_dtype(40_000_000) == "fp32"


def test_a_folder_tells_what_it_holds(generator_folder: Path, matcher_folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in Blip2(folder_model(generator_folder, name="x").config).parameters())  # type: ignore[arg-type]
    alone = folder_model(generator_folder, name="tiny")
    both = folder_model(generator_folder, matcher_folder, name="tiny")

    assert alone.parameters == count
    assert alone.disk_bytes == (generator_folder / "model.safetensors").stat().st_size
    assert both.parameters > alone.parameters
    with pytest.raises(ValueError, match="cannot be read as a model's folder"):
        folder_model(tmp_path, name="empty")
    (tmp_path / "config.json").write_text((generator_folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no weights"):
        folder_model(tmp_path, name="bare")


def test_the_default_model_leads_the_list(
    generator_folder: Path, matcher_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "DEFAULT_FOLDER", generator_folder)
    monkeypatch.setattr(registry, "DEFAULT_MATCHER_FOLDER", matcher_folder)
    assert [known.name for known in known_models()] == [
        "default",
        *(known.name for known in registry.PUBLISHED),
    ]
    monkeypatch.setattr(registry, "DEFAULT_FOLDER", tmp_path / "none")
    assert known_models() == registry.PUBLISHED


def test_readable() -> None:
    assert [readable(size) for size in (None, 350 << 20, 15 << 30)] == ["unknown", "350 MiB", "15.0 GiB"]


# --- the machine's check -------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def machine() -> doctor.Machine:
    """A machine that runs everything in bf16."""
    return dataclasses.replace(
        doctor.examine_machine(),
        memory=32 * GIB,
        memory_free=31 * GIB,
        gpu=None,
        gpu_memory=None,
        cache_free=100 * GIB,
        offline=False,
        instructions=("avx2", "avx512_bf16"),
    )


def test_this_machine_is_looked_at() -> None:
    machine = doctor.examine_machine()
    assert machine.torch == torch.__version__
    assert machine.cores >= 1
    assert machine.memory is None or machine.memory > 2**28
    assert machine.offline  # the tests are
    assert "HF_HUB_OFFLINE" in machine.variables


def test_a_good_machine_has_no_problems(machine: doctor.Machine) -> None:
    for checkup in doctor.examine_models(machine):
        assert checkup.problems == ()
        assert checkup.name == "default" or any("downloads" in hint for hint in checkup.hints)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"memory": 8 * GIB}, "needs 14.9 GiB of memory in bf16, this machine has 8.0 GiB"),
        ({"offline": True}, "not in the cache, and offline"),
        ({"cache_free": 10 * GIB}, "the download is 28.9 GiB"),
    ],
)
def test_what_would_go_wrong(machine: doctor.Machine, change: dict[str, object], problem: str) -> None:
    (checkup,) = doctor.examine_models(dataclasses.replace(machine, **change), "opt-6.7b-coco")  # type: ignore[arg-type]
    assert [line for line in checkup.problems if problem in line]


def test_what_is_worth_knowing(machine: doctor.Machine) -> None:
    poor = dataclasses.replace(machine, memory_free=2 * GIB, instructions=("avx2",))
    (checkup,) = doctor.examine_models(poor, "opt-6.7b")
    assert any("close other programs" in hint for hint in checkup.hints)
    assert any("no bf16 arithmetic" in hint for hint in checkup.hints)
    enough = dataclasses.replace(poor, memory=8 * GIB, gpu="NVIDIA", gpu_memory=40 * GIB)
    assert doctor.examine_models(enough, "opt-6.7b")[0].problems == ()


def test_a_folder_or_a_file_can_be_examined(
    machine: doctor.Machine, generator_folder: Path, tmp_path: Path
) -> None:
    (checkup,) = doctor.examine_models(machine, str(generator_folder))
    assert (checkup.here, checkup.problems, checkup.hints) == (True, (), ())
    convert(generator_folder, tmp_path / "paddle", to="paddle", dtype="bf16")
    for path in (tmp_path / "paddle", tmp_path / "paddle" / "model_state.pdparams"):
        (same,) = doctor.examine_models(machine, str(path))
        assert same.parameters == checkup.parameters
        # PaddleNLP stores a tied head twice
        assert 2 * same.parameters < same.disk_bytes < 2.5 * same.parameters
    with pytest.raises(ValueError, match="neither a folder nor a model known"):
        doctor.examine_models(machine, "nonesuch")


def test_the_report(machine: doctor.Machine) -> None:
    checkups = doctor.examine_models(dataclasses.replace(machine, offline=True))
    text = "\n".join(doctor.report_lines(machine, checkups))
    assert "Salesforce/blip2-opt-6.7b-coco: CANNOT RUN" in text
    assert "avx512_bf16" in text
    first, *rest = json.loads(json.dumps(doctor.report_records(machine, checkups)))
    assert first["machine"]["memory"] == 32 * GIB
    assert [model["name"] for model in rest] == [checkup.name for checkup in checkups]
