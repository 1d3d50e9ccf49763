"""photographs.csv: sources and licences, nothing that is measured on or an example; how they are shrunk."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from default_model import photographs
from default_model.photographs import PhotographRow, build_photographs, read_photographs

LICENCES = re.compile(r"public domain|CC0-1\.0|CC-BY(-SA)?-[34]\.0|L?GPL-[0-9.]+\+?|GFDL")
# Packages whose photographs are kept for measuring or are in examples/, and the folders of GCompris that are.
KEPT_PACKAGES = {"plasma-workspace-data", "dde-account-faces", "gnome-control-center-data", "tuxtype-data"}
KEPT_FOLDERS = (
    "/images/tools/",
    "/images/others/",
    "/activities/erase/",
    "/explore_world_",
    "/explore_farm_",
)


def test_each_photograph_has_its_package_and_licence() -> None:
    rows = read_photographs()
    assert len(rows) == len({row.id for row in rows}) == len({(row.package, row.path) for row in rows}) > 200
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.id), row
        assert LICENCES.fullmatch(row.licence), row
        assert row.package and not row.path.startswith("/") and ".." not in row.path, row


def test_none_is_kept_for_measuring_or_an_example() -> None:
    for row in read_photographs():
        assert row.package not in KEPT_PACKAGES, row
        assert not any(folder in row.path for folder in KEPT_FOLDERS), row


def test_photographs_are_shrunk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        PhotographRow("wide", "p", "usr/wide.png", "CC0-1.0", ""),
        PhotographRow("small", "p", "usr/small.jpg", "CC0-1.0", ""),
    ]
    monkeypatch.setattr(photographs, "read_photographs", lambda: rows)
    (tmp_path / "p/usr").mkdir(parents=True)
    Image.new("RGBA", (1024, 256), (9, 200, 9, 255)).save(tmp_path / "p/usr/wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (64, 32)).save(tmp_path / "p/usr/small.jpg", exif=exif)
    assert build_photographs(tmp_path) == 2
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "photographs").iterdir()}
    assert sizes == {"wide.jpg": (512, 128), "small.jpg": (32, 64)}
    (tmp_path / "photographs/wide.jpg").write_bytes(b"kept")
    build_photographs(tmp_path)
    assert (tmp_path / "photographs/wide.jpg").read_bytes() == b"kept"


def test_photographs_come_out_of_resource_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = io.BytesIO()
    Image.new("RGB", (20, 10)).save(image, "WEBP")
    monkeypatch.setattr(
        photographs,
        "read_resource",
        lambda content, path: {(b"rcc", "a/b.webp"): image.getvalue()}[content, path],
    )
    rows = [PhotographRow("b", "p", "x.rcc:/a/b.webp", "CC0-1.0", "")]
    monkeypatch.setattr(photographs, "read_photographs", lambda: rows)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.rcc").write_bytes(b"rcc")
    build_photographs(tmp_path)
    assert Image.open(tmp_path / "photographs/b.jpg").size == (20, 10)
