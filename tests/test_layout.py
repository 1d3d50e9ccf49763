"""The house as docs/architecture.md shows it: who may import whom, and that the core needs no more than it declares."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blip2"

# What a module may import of this package. A folder stands for all of its modules, which may import each other;
# checkpoint/ is written out because its readers must stay free of everything above them.
MAY_IMPORT = {
    "config": "",
    "lock": "",
    "layers": "",
    "openvino_product": "",
    "quantize": "layers openvino_product",
    "images": "config",
    "text": "config",
    "vision": "config layers",
    "qformer": "config layers",
    "opt": "config layers",
    "t5": "config layers",
    "model": "config layers vision qformer opt t5",
    "generate": "config layers model",
    "checkpoint.tensors": "checkpoint.filebytes",
    "checkpoint.filebytes": "checkpoint.tensors",
    "checkpoint.pickles": "checkpoint.filebytes checkpoint.tensors",
    "checkpoint.zips": "checkpoint.filebytes checkpoint.tensors",
    "checkpoint.safetensors_files": "checkpoint.filebytes checkpoint.tensors",
    "checkpoint.torch_files": "checkpoint.filebytes checkpoint.pickles checkpoint.tensors checkpoint.zips",
    "checkpoint.paddle_files": "checkpoint.filebytes checkpoint.pickles checkpoint.tensors",
    "checkpoint.files": "checkpoint.filebytes checkpoint.paddle_files checkpoint.safetensors_files checkpoint.tensors "
    "checkpoint.torch_files",
    "checkpoint.names": "",
    "checkpoint.hub": "checkpoint.tensors",
    "checkpoint.layouts": "",
    "checkpoint.translate": "checkpoint.layouts checkpoint.tensors",
    "checkpoint.dialects": "checkpoint.filebytes checkpoint.tensors config",
    "checkpoint.rounded_files": "checkpoint.tensors quantize",
    "checkpoint.source": "checkpoint.dialects checkpoint.files checkpoint.layouts checkpoint.rounded_files "
    "checkpoint.tensors checkpoint.translate config text",
    "checkpoint.load": "checkpoint.dialects checkpoint.hub checkpoint.names checkpoint.rounded_files "
    "checkpoint.source checkpoint.tensors checkpoint.translate config images layers model quantize text",
    "checkpoint.writers": "checkpoint.safetensors_files checkpoint.tensors",
    "checkpoint.folder": "checkpoint.tensors checkpoint.writers lock",
    "checkpoint.save": "checkpoint.folder checkpoint.load checkpoint.names checkpoint.tensors checkpoint.translate "
    "checkpoint.writers config images model text",
    "checkpoint.verify": "checkpoint.load checkpoint.source checkpoint.tensors checkpoint.translate config model",
    "checkpoint.conversion": "checkpoint.dialects checkpoint.folder checkpoint.hub checkpoint.layouts checkpoint.load "
    "checkpoint.names checkpoint.save checkpoint.source checkpoint.tensors checkpoint.translate checkpoint.verify "
    "checkpoint.writers config images",
    "checkpoint.quantization": "checkpoint.conversion checkpoint.folder checkpoint.hub checkpoint.load "
    "checkpoint.names checkpoint.rounded_files checkpoint.save checkpoint.source checkpoint.tensors "
    "checkpoint.translate checkpoint.writers config model quantize",
    "checkpoint.inspection": "checkpoint.hub checkpoint.layouts checkpoint.load checkpoint.names checkpoint.source "
    "checkpoint.tensors config",
    "checkpoint": "checkpoint.conversion checkpoint.files checkpoint.hub checkpoint.inspection checkpoint.load "
    "checkpoint.quantization checkpoint.save checkpoint.tensors",
    "models": "config",
    "results": "layers",
    "inputs": "images",
    "matching": "images inputs model results text",
    "explain": "config images layers model qformer quantize results t5 text vision",
    "ranking": "layers model",
    "parts": "checkpoint images model models quantize text",
    "predict": "config explain generate images inputs layers matching model models parts quantize ranking results text",
    "evaluate": "data images inputs matching models predict results text",
    "doctor": "checkpoint.inspection models",
    "continuous": "generate layers model",
    "serve": "continuous generate images inputs layers predict results text",
    "data": "images text",
    "bulk": "images inputs lock predict",
    "train": "config layers vision qformer opt t5 model data checkpoint",
    "bench": "checkpoint.inspection checkpoint.load config generate model models quantize text",
    "cli": "commands",
    "commands": "bench bulk checkpoint doctor evaluate generate images inputs models parts predict serve",
}
FOLDERS = {"bulk", "commands", "data", "evaluate", "serve", "train"}
# What stands on an extra is imported by the command that needs it.
NEED_EXTRA = {
    f"serve.{name}"
    for name in (
        "app",
        "events",
        "fetch",
        "guard",
        "house",
        "metrics",
        "on_ray",
        "native",
        "openai_api",
        "run",
        "schemas",
    )
} | {"bulk.on_ray", "evaluate.lmms"}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
            yield name, path


MODULES = dict(_modules())


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file: 'config', 'checkpoint.files', ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("blip2.") for name in names if name.startswith("blip2.")):
            # "config.VisionConfig" names something in a module, "checkpoint.files" a module
            known = [
                ".".join(name.split(".")[:i]) for i in (2, 1) if ".".join(name.split(".")[:i]) in MODULES
            ]
            found |= {known[0]} if known else set()
    return found


def _place(module: str) -> str:
    folder = module.split(".")[0]
    return folder if folder in FOLDERS else module


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_what_the_house_allows(module: str) -> None:
    place = _place(module)
    assert place in MAY_IMPORT, f"{module} is new: give it a place in this table and in docs/architecture.md"
    allowed = {place, *MAY_IMPORT[place].split()}
    imported = {_place(name) for name in _imports(MODULES[module])}
    assert imported <= allowed, f"{module} may not import {sorted(imported - allowed)}"


def test_the_table_has_no_stale_entries() -> None:
    assert set(MAY_IMPORT) == {_place(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 600


def _dependencies() -> list[str]:
    """The names of the package's own dependencies, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [_name(line) for line in project["dependencies"]]


def _name(requirement: str) -> str:
    """The name in 'Some_Package>=1; marker', as packages are compared."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]).lower()


def _core_distributions() -> set[str]:
    """The distributions that the dependencies bring, by their metadata."""
    todo, core = _dependencies(), set()
    while todo:
        name = todo.pop()
        if name in core:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        core.add(name)
        todo += [_name(line) for line in required if "extra ==" not in line]
    return core


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    core = _core_distributions()
    assert {"torch", "tokenizers", "tqdm"} <= core
    blocked = sorted(
        name
        for name, distributions in metadata.packages_distributions().items()
        if not core & {_name(each) for each in distributions} and name != "blip2"
    )
    assert {"transformers", "pytest"} <= set(blocked)
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is no core dependency")

sys.meta_path.insert(0, Refuse())
for module in {sorted(set(MODULES) - NEED_EXTRA)!r}:
    importlib.import_module("blip2." + module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_costs_nothing() -> None:
    program = (
        "import sys, blip2\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy'\n"
        "assert blip2.load and blip2.Caption and blip2.GenerationOptions and blip2.ImageError\n"
        "assert set(blip2.__all__) <= set(dir(blip2))\n"
        "for name in blip2.__all__: getattr(blip2, name)\n"
        "try: blip2.nonesuch\n"
        "except AttributeError: pass\n"
        "else: raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pinned_requirements_name_every_dependency() -> None:
    lines = (ROOT / "requirements" / "base.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert {*_dependencies()} <= {_name(line) for line in pinned}
    assert all("==" in line for line in pinned)
    assert pinned[0].startswith("torch=="), "torch comes first: what follows must not choose its build"
