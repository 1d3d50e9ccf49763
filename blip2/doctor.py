"""What this machine has, what each model would need of it, and what would go wrong."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from blip2.checkpoint.inspect import stored_model
from blip2.registry import (
    DEFAULT,
    MODES,
    PRECISIONS,
    PUBLISHED,
    KnownModel,
    default_dtype,
    default_model,
    describe_stem,
    known_models,
    readable,
    resolve_alias,
)

# Instruction sets that decide how fast a model runs, as /proc/cpuinfo calls them (x86, then ARM).
FAST = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
OPENVINO_MISSING = "not installed; with it 4 bits are quick: pip install 'blip2[openvino]'"
# Variables that change where models come from.
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")


@dataclass(frozen=True)
class Machine:
    """What this machine has. Sizes in bytes."""

    python: str
    torch: str
    openvino: str | None  # None: not installed
    system: str
    processor: str
    instructions: tuple[str, ...]
    cores: int
    threads: int  # that torch computes with
    memory: int | None  # None: cannot be found out here
    memory_free: int | None
    gpu: str | None
    gpu_memory: int | None
    cache: str
    cache_free: int
    offline: bool
    variables: dict[str, str]


@dataclass(frozen=True)
class Checkup:
    """One model on this machine. `problems` keep it from running, `hints` are worth knowing."""

    name: str
    alias: str
    use: str
    parameters: int
    disk_bytes: int
    memory_bytes: dict[str, int]
    here: bool  # its weights are on this machine
    stem: str  # the network that images go through first; empty without one
    problems: tuple[str, ...]
    hints: tuple[str, ...]


def examine_machine() -> Machine:
    """Look at this machine; starts nothing and downloads nothing."""
    memory, memory_free = _memory()
    gpu, gpu_memory = _gpu()
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    processor, instructions = _processor()
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        openvino=next((package.version for package in distributions(name="openvino")), None),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor,
        instructions=instructions,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        memory_free=memory_free,
        gpu=gpu,
        gpu_memory=gpu_memory,
        cache=str(cache),
        cache_free=shutil.disk_usage(existing).free,
        offline=constants.HF_HUB_OFFLINE,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def examine_models(machine: Machine, name: str | None = None) -> list[Checkup]:
    """What each known model would meet on this machine; or the one called `name`, or in that folder or file.

    Raises:
        ValueError: no such model, or a folder that holds none.
    """
    models = known_models() if name is None else (_find(name),)
    return [_examine(model, machine) for model in models]


def _find(name: str) -> KnownModel:
    if name == DEFAULT:
        return default_model()
    full = resolve_alias(name)
    for model in PUBLISHED:
        if model.name == full:
            return model
    path = Path(name)
    if not path.exists():
        try:
            cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
        except HFValidationError:  # no name on the Hub could be written so
            cached = None
        if not isinstance(cached, str):
            raise ValueError(f"{name}: neither a folder nor a model known here or cached; see `blip2 models`")
        path = Path(cached).parent
    config, parameters, disk_bytes, stem = stored_model(path)
    return KnownModel(name, "", "", config, parameters, disk_bytes, stem=stem)


def _examine(model: KnownModel, machine: Machine) -> Checkup:
    needs = {dtype: model.memory_bytes(dtype) for dtype in PRECISIONS}
    here = _is_here(model.name)
    problems, hints = [], []
    if not here:
        if machine.offline:
            problems.append(
                "not in the cache, and offline: unset HF_HUB_OFFLINE, or copy the model's folder here"
            )
        elif machine.cache_free < model.disk_bytes:
            problems.append(
                f"the download is {readable(model.disk_bytes)}, and {machine.cache} has "
                f"{readable(machine.cache_free)} free: point HF_HOME to a larger disk"
            )
        else:
            hints.append(f"downloads {readable(model.disk_bytes)} when first used")
    dtype = default_dtype(model.parameters)
    room = [size for size in (machine.memory, machine.gpu_memory) if size is not None]
    if room and needs[dtype] > max(room):
        fits = next((mode for mode in MODES if needs[mode] <= max(room)), None)
        cure = "" if fits is None else f": --quantize {fits} needs {readable(needs[fits])}"
        problems.append(
            f"needs {readable(needs[dtype])} of memory in {dtype}, this machine has {readable(max(room))}{cure}"
        )
    elif machine.memory_free is not None and machine.gpu is None and needs[dtype] > machine.memory_free:
        hints.append(f"only {readable(machine.memory_free)} of memory are free now: close other programs")
    fast_in_bf16 = machine.gpu or {"avx512_bf16", "amx_bf16", "bf16"} & {*machine.instructions}
    if dtype == "bf16" and not fast_in_bf16:
        hints.append(
            "slow here: this processor has no bf16 arithmetic and there is no GPU; try --quantize int8"
        )
    about = (model.name, model.alias, model.use, model.parameters, model.disk_bytes)
    stem = "" if model.stem is None else describe_stem(model.stem)
    return Checkup(*about, needs, here, stem, tuple(problems), tuple(hints))


def _is_here(name: str) -> bool:
    if name == DEFAULT or Path(name).exists():
        return True
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in weights)


def _facts(path: str) -> dict[str, str]:
    """Names and values in one of Linux's files about the machine; of several processors the last. Raises OSError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _processor() -> tuple[str, tuple[str, ...]]:
    """Name, and those instruction sets of `FAST` it has; (unknown, ()) where the system does not say."""
    try:
        facts = _facts("/proc/cpuinfo")
    except OSError:
        return platform.processor() or platform.machine(), ()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", platform.machine()), tuple(flag for flag in FAST if flag in flags)


def _memory() -> tuple[int | None, int | None]:
    """Total and free memory in bytes, the container's limit respected."""
    total = free = None
    try:
        facts = _facts("/proc/meminfo")
        total, free = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        if limit.isdigit() and int(limit) < total:
            used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
            total, free = int(limit), min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):
        if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, free


def _gpu() -> tuple[str | None, int | None]:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    if torch.backends.mps.is_available():
        return "Apple GPU (mps), shares the memory", None
    return None, None


# --- the report ----------------------------------------------------------------------------


def report_records(machine: Machine, checkups: list[Checkup]) -> list[dict[str, Any]]:
    """One object for the machine, one for each model."""
    return [{"machine": asdict(machine)}, *(asdict(checkup) for checkup in checkups)]


def report_lines(machine: Machine, checkups: list[Checkup]) -> list[str]:
    """The report's lines."""
    free = "" if machine.memory_free is None else f", {readable(machine.memory_free)} free"
    gpu = machine.gpu or "none that torch can use"
    lines = [
        "This machine",
        f"  python     {machine.python} on {machine.system}",
        f"  torch      {machine.torch}, {machine.threads} threads",
        f"  openvino   {machine.openvino or OPENVINO_MISSING}",
        f"  processor  {machine.processor}, {machine.cores} cores; {' '.join(machine.instructions) or 'unknown'}",
        f"  memory     {readable(machine.memory)}{free}",
        f"  GPU        {gpu}" + (f", {readable(machine.gpu_memory)}" if machine.gpu_memory else ""),
        f"  cache      {machine.cache}, {readable(machine.cache_free)} free on its disk",
        f"  offline    {'yes' if machine.offline else 'no'}",
        *(f"  {name}={value}" for name, value in machine.variables.items()),
        "",
        "Models",
    ]
    for checkup in checkups:
        memory = ", ".join(f"{readable(size)} in {dtype}" for dtype, size in checkup.memory_bytes.items())
        lines.append(f"  {checkup.name}: {'CANNOT RUN' if checkup.problems else 'ok'}; memory {memory}")
        if checkup.stem:
            lines.append(f"    images go through {checkup.stem} first")
        lines += [f"    {note}" for note in (*checkup.problems, *checkup.hints)]
    return lines
