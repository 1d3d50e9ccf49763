"""The layout that docs/layout.toml describes: who may import whom; and that the core needs no more than it declares."""

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

LAYOUT = tomllib.loads((ROOT / "docs" / "layout.toml").read_text(encoding="utf-8"))
MAY_IMPORT = {room: set(entry["may_import"].split()) for room, entry in LAYOUT["rooms"].items()}
# What stands on an extra is imported by the command that needs it.
NEED_EXTRA = {
    f"serve.{name}"
    for name in (
        "app",
        "bodies",
        "connections",
        "context",
        "errors",
        "fetch",
        "metrics",
        "middleware",
        "native_api",
        "on_ray",
        "openai_api",
        "openapi",
        "run",
        "schemas",
        "streaming",
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
    """Modules of this package that a file imports, wherever in the file: 'modeling.config', 'text', ..."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("blip2.") for name in names if name.startswith("blip2.")):
            # "images.ImageError" names something in a module, "modeling.config" a module
            parts = name.split(".")
            starts = (".".join(parts[:count]) for count in (3, 2, 1))
            modules |= {next(start for start in starts if start in MODULES)} if parts[0] in ROOMS else set()
    return modules


def _room(module: str) -> str:
    return module.split(".")[0]


ROOMS = {_room(module) for module in MODULES}
IMPORTS = {module: _imports(path) - {module} for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_what_the_layout_allows(module: str) -> None:
    room = _room(module)
    assert room in MAY_IMPORT, f"{module} is new: give it a place in docs/layout.toml"
    imported = {_room(name) for name in IMPORTS[module]} - {room}
    assert imported <= MAY_IMPORT[room], f"{module} may not import {sorted(imported - MAY_IMPORT[room])}"
    if module in LAYOUT["apart"]:
        assert not IMPORTS[module] & set(LAYOUT["apart"])


def test_every_folder_is_a_package_that_gets_installed() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_layout_has_no_stale_entries() -> None:
    assert set(MAY_IMPORT) == ROOMS
    arrows = {(_room(module), _room(name)) for module, names in IMPORTS.items() for name in names}
    arrows = {(one, other) for one, other in arrows if one != other}
    print(f"{len(arrows)} import arrows between {len(ROOMS)} rooms")
    assert arrows == {(room, other) for room, others in MAY_IMPORT.items() for other in others}


def test_the_architecture_page_shows_the_layout() -> None:
    program = ROOT / "docs" / "make_architecture.py"
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_imports_itself_by_way_of_others() -> None:
    left = {module: set(names) for module, names in IMPORTS.items()}
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, f"these import each other in a circle: {sorted(left)}"


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines"


def test_a_public_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                command = _room(module) == "commands" and node.name in ("configure", "run")
                if not node.name.startswith("_") and not command:
                    places.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


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
        if not core & {_name(package) for package in distributions} and name != "blip2"
    )
    assert "pytest" in blocked
    program = f"""
import importlib.util, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is no core dependency")

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {blocked!r} else find_spec(name)
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


def _pinned(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_pinned_requirements_name_every_dependency() -> None:
    pinned = _pinned("base.txt")
    assert {*_dependencies()} <= {_name(line) for line in pinned}
    assert all("==" in line for line in pinned)
    assert pinned[0].startswith("torch=="), "torch comes first: what follows must not choose its build"


def test_the_lowest_requirements_are_the_lowest_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    allowed = [*project["dependencies"], *(line for name in extras if name != "ray" for line in extras[name])]
    floors = {line.split(">=")[0]: line.split(">=")[1].split(",")[0] for line in allowed if ">=" in line}
    tools = {_name(line) for line in (*extras["test"], *extras["dev"])} - {"openai", "openvino"}
    lowest = dict(line.split("==") for line in _pinned("lowest.txt"))
    for name, version in floors.items():
        if name != "torch" and _name(name) not in tools:  # an older torch brings CUDA's libraries
            padded = version + ".0" * (lowest[name].count(".") - version.count("."))
            assert lowest[name] == padded, name
