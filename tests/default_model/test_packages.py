"""Unpacking packages that are there already, so that nothing is downloaded."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from default_model import packages


def test_a_package_is_unpacked_whole_and_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "easy_x-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("easy_x/data/1.txt", "1")
        wheel.writestr("easy_x-1.0.dist-info/METADATA", "")
    (tmp_path / "easy_x.part").mkdir()
    (tmp_path / "easy_x.part/left").write_text("by a run that was killed")
    packages.pypi("easy-x==1.0", tmp_path, "easy_x")
    assert [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "easy_x").rglob("*.*")] == [
        "easy_x/data/1.txt"
    ]
    assert not (tmp_path / "easy_x.part").exists()
    (tmp_path / "easy_x/data/1.txt").unlink()
    packages.pypi("easy-x==1.0", tmp_path, "easy_x")
    assert not (tmp_path / "easy_x/data/1.txt").exists()


def test_npm_names_files_of_scopes_its_own_way(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "scope-name-2.0.0.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("package/a.webp")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    packages.npm("@scope/name@2.0.0", tmp_path, "name")
    assert (tmp_path / "name/package/a.webp").read_bytes() == b"abc"


def test_a_client_that_leaves_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_run", lambda command, folder: None)
    with pytest.raises(FileNotFoundError, match="apt-get download scratch left no scratch_"):
        packages.debian("scratch", tmp_path, "scratch")
    assert not (tmp_path / "scratch").exists()
