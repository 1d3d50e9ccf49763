"""Fetches the pictures the default model is trained on, and cuts them out: `python -m default_model.materials DIR`.

Three packages, each through its ordinary client: Debian's tuxpaint-stamps-default, npm's openmoji, PyPI's easy-vqa.
Which of their pictures are used, and what they are called, is the table objects.csv beside this file.
Rasterising SVG needs `pip install resvg_py`. Existing files are kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STAMPS = "tuxpaint-stamps-default"
OPENMOJI = "openmoji@17.0.0"
EASY_VQA = "easy-vqa==1.0"
TABLE = Path(__file__).with_name("objects.csv")
PICTURES = Path(__file__).with_name("pictures.csv")
CUTOUT_PX = 96  # longest side of a cut-out, as many pixels as most objects get in a 128 px image


@dataclass(frozen=True)
class ObjectRow:
    """One line of objects.csv.

    `article` goes before the noun ("a", "an", "a pair of"); `colour` is "" where no colour dominates.
    """

    id: str
    source: str  # "stamps" or "openmoji"
    file: str
    noun: str
    plural: str
    article: str
    colour: str
    category: str


@dataclass(frozen=True)
class Cutouts:
    """The cut-outs in memory: images[i] is [H, W, 4] uint8, not premultiplied, trimmed, and shows rows[i]."""

    rows: tuple[ObjectRow, ...]
    images: tuple[NDArray[np.uint8], ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.images):
            raise ValueError(f"{len(self.rows)} rows for {len(self.images)} images: give one image a row")

    def save(self, path: Path) -> None:
        """Writes an npz: ids, shapes [n, 2], and the pixels of all one after the other."""
        ids = np.array([row.id for row in self.rows])
        shapes = np.array([image.shape[:2] for image in self.images], np.int32)
        pixels = np.concatenate([image.reshape(-1) for image in self.images])
        np.savez_compressed(path, ids=ids, shapes=shapes, pixels=pixels)

    @classmethod
    def load(cls, path: Path | str) -> Cutouts:
        """Reads DIR/cutouts.npz (or the folder it lies in). ValueError when it does not fit objects.csv."""
        path = Path(path)
        if path.is_dir():
            path = path / "cutouts.npz"
        stored = np.load(path, allow_pickle=False)
        rows = {row.id: row for row in read_table()}
        if sorted(rows) != sorted(str(i) for i in stored["ids"]):
            raise ValueError(
                f"{path} was built from another objects.csv: delete it and run default_model.materials"
            )
        images, at, pixels = [], 0, stored["pixels"]
        for height, width in stored["shapes"].tolist():
            images.append(pixels[at : at + height * width * 4].reshape(height, width, 4))
            at += height * width * 4
        return cls(tuple(rows[str(i)] for i in stored["ids"]), tuple(images))


def read_table(path: Path = TABLE) -> list[ObjectRow]:
    """The rows of objects.csv, in order."""
    with path.open(encoding="utf-8", newline="") as file:
        return [ObjectRow(**row) for row in csv.DictReader(file)]


def rasterise(path: Path, side: int) -> Image.Image:
    """PNG or SVG file -> RGBA, trimmed to its alpha box, longest side `side` px."""
    image: Image.Image
    if path.suffix == ".svg":
        import resvg_py

        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), zoom=1, dpi=96))))
        zoom = max(1.0, 3 * side / max(image.size))
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), zoom=zoom, dpi=96))))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        raise ValueError(f"{path} is empty: take it out of objects.csv")
    image = image.crop(box)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # "RGBa" is premultiplied: the colour hidden under transparent pixels must not bleed into the edge.
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def _run(command: Sequence[str], folder: Path) -> None:
    print(" ".join(command), file=sys.stderr)
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def fetch(folder: Path) -> None:
    """Downloads and unpacks the three packages into `folder`: stamps/, openmoji/, easy_vqa/."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "stamps").exists():
        if not list(folder.glob(f"{STAMPS}_*.deb")):
            _run(["apt-get", "download", STAMPS], folder)
        _run(["dpkg-deb", "-x", next(folder.glob(f"{STAMPS}_*.deb")).name, "stamps"], folder)
    if not (folder / "openmoji").exists():
        if not list(folder.glob("openmoji-*.tgz")):
            _run(["npm", "pack", OPENMOJI], folder)
        with tarfile.open(next(folder.glob("openmoji-*.tgz"))) as archive:
            archive.extractall(folder / "openmoji", filter="data")
    if not (folder / "easy_vqa").exists():
        if not list(folder.glob("easy_vqa-*.whl")):
            _run([sys.executable, "-m", "pip", "download", "--no-deps", EASY_VQA], folder)
        with zipfile.ZipFile(next(folder.glob("easy_vqa-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("easy_vqa/")])


def build(folder: Path, side: int = CUTOUT_PX) -> Cutouts:
    """Cuts out every picture of objects.csv from the unpacked packages in `folder`."""
    roots = {
        "stamps": folder / "stamps/usr/share/tuxpaint/stamps",
        "openmoji": folder / "openmoji/package/color/svg",
    }
    rows = read_table()
    images = tuple(np.asarray(rasterise(roots[row.source] / row.file, side)) for row in rows)
    return Cutouts(tuple(rows), images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="fetch and cut out the pictures the default model is trained on"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=CUTOUT_PX, help="longest side of a cut-out in px")
    args = parser.parse_args()
    fetch(args.folder)
    name = "cutouts.npz" if args.side == CUTOUT_PX else f"cutouts-{args.side}.npz"
    if not (args.folder / name).exists():
        build(args.folder, args.side).save(args.folder / name)
    cutouts = Cutouts.load(args.folder / name)
    nouns = {row.noun for row in cutouts.rows}
    print(f"{args.folder / name}: {len(cutouts.rows)} cut-outs, {len(nouns)} nouns", file=sys.stderr)


if __name__ == "__main__":
    main()
