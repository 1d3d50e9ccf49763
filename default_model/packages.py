"""Downloads packages of pictures through their ordinary clients, and unpacks them: apt-get, npm, pip.

What is there already is kept, and a folder appears only when all of the package is in it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path


def debian(package: str, folder: Path, name: str) -> None:
    """Debian's `package`, unpacked as FOLDER/NAME."""

    def unpack(into: Path) -> None:
        archive = _download(["apt-get", "download", package], f"{package}_*.deb", folder)
        _run(["dpkg-deb", "-x", archive.name, into.name], folder)

    _once(folder / name, unpack)


def npm(package: str, folder: Path, name: str) -> None:
    """npm's `package` ("openmoji@17.0.0", "@scope/name@1.0.0"), unpacked as FOLDER/NAME."""

    def unpack(into: Path) -> None:
        pattern = package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
        with tarfile.open(_download(["npm", "pack", package], pattern, folder)) as archive:
            archive.extractall(into, filter="data")

    _once(folder / name, unpack)


def pypi(package: str, folder: Path, name: str) -> None:
    """The import package `name` of PyPI's `package` ("easy-vqa==1.0"), unpacked as FOLDER/NAME."""

    def unpack(into: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", package]
        with zipfile.ZipFile(_download(command, f"{name}-*.whl", folder)) as wheel:
            wheel.extractall(into, [member for member in wheel.namelist() if member.startswith(f"{name}/")])
        for part in (into / name).iterdir():
            part.rename(into / part.name)
        (into / name).rmdir()

    _once(folder / name, unpack)


def _once(target: Path, unpack: Callable[[Path], None]) -> None:
    if target.exists():
        return
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    unpack(partial)
    partial.rename(target)


def _download(command: Sequence[str], pattern: str, folder: Path) -> Path:
    """Runs `command` in `folder`, which has to leave a file like `pattern` there, unless one is there."""
    if not list(folder.glob(pattern)):
        _run(command, folder)
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{' '.join(command)} left no {pattern} in {folder}")
    return found[-1]


def _run(command: Sequence[str], folder: Path) -> None:
    print(" ".join(command), file=sys.stderr)
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
