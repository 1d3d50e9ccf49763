"""Fetches the pictures the default model is trained on, and cuts them out: `python -m default_model.materials DIR`.

Which pictures are used, and what they are called, is in tables beside this file: objects.csv, the cut-outs that scenes
are composed of; pictures.csv, renders and cut-out photographs of the same nouns and of others; photographs.csv,
photographs without names. Each package comes through its ordinary client; `--scenes` fetches only what objects.csv
needs. It needs `pip install resvg_py zstandard`. Existing files are kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from default_model import packages, photographs

STAMPS = "tuxpaint-stamps-default"
OPENMOJI = "openmoji@17.0.0"
EASY_VQA = "easy-vqa==1.0"
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"
SCRATCH = "scratch"
SWEETHOME = "sweethome3d-furniture"
TABLE = Path(__file__).with_name("objects.csv")
PICTURES = TABLE.with_name("pictures.csv")
CUTOUT_PX = 96  # longest side of a cut-out, as many pixels as most objects get in a 128 px image
PICTURE_PX = 224  # longest side of a picture of pictures.csv, at most twice what its file has
ROOTS = {  # where the files of each source are, beneath the folder of materials
    "stamps": "stamps/usr/share/tuxpaint/stamps",
    "openmoji": "openmoji/package/color/svg",
    "fluent": "fluent-emoji-3d/package/assets",
    "scratch": f"{SCRATCH}/usr/share/scratch/Media/Costumes",
    "sweethome": f"{SWEETHOME}/usr/share/sweethome3d/furniture",
}


@dataclass(frozen=True)
class ObjectRow:
    """One line of objects.csv or pictures.csv.

    `article` goes before the noun ("a", "an", "a pair of"); `colour` is "" where no colour dominates.
    """

    id: str
    source: str  # one of ROOTS
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
        partial = path.with_name(path.name + ".part")
        with partial.open("wb") as file:
            np.savez_compressed(file, ids=ids, shapes=shapes, pixels=pixels)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path | str, table: Path = TABLE) -> Cutouts:
        """Reads DIR/cutouts.npz (or the folder it lies in), for pictures.npz with PICTURES as `table`.

        ValueError when it does not fit the table.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "cutouts.npz"
        stored = np.load(path, allow_pickle=False)
        rows = {row.id: row for row in read_table(table)}
        if sorted(rows) != sorted(str(i) for i in stored["ids"]):
            raise ValueError(
                f"{path} was built from another {table.name}: delete it and run default_model.materials"
            )
        images, at, pixels = [], 0, stored["pixels"]
        for height, width in stored["shapes"].tolist():
            images.append(pixels[at : at + height * width * 4].reshape(height, width, 4))
            at += height * width * 4
        return cls(tuple(rows[str(i)] for i in stored["ids"]), tuple(images))


def read_table(path: Path = TABLE) -> list[ObjectRow]:
    """The rows of objects.csv, or of pictures.csv, in order."""
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
    return _fit(_trim(image.convert("RGBA"), path), side)


def _trim(image: Image.Image, path: Path) -> Image.Image:
    box = image.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        raise ValueError(f"{path} is empty: take it out of its table")
    return image.crop(box)


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # "RGBa" is premultiplied: the colour hidden under transparent pixels must not bleed into the edge.
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def soften(image: Image.Image) -> Image.Image:
    """A GIF's transparency is all or nothing: its edge becomes gradual, inwards, where the colours are known."""
    alpha = image.getchannel("A")
    if set(alpha.tobytes()) <= {0, 255}:
        blurred = alpha.filter(ImageFilter.GaussianBlur(0.8))
        image.putalpha(blurred.point([max(0, 2 * value - 255) for value in range(256)]))
    return image


def _open_picture(folder: Path, row: ObjectRow) -> Image.Image:
    """A picture of pictures.csv, RGBA. Sweet Home 3D's lie in zip files, named by the first part of `row.file`."""
    path = folder / ROOTS[row.source] / row.file
    if row.source != "sweethome":
        return Image.open(path).convert("RGBA")
    archive, name = row.file.split("/", 1)
    with zipfile.ZipFile(folder / ROOTS[row.source] / f"{archive}.sh3f") as furniture:
        return Image.open(io.BytesIO(furniture.read(name))).convert("RGBA")


def fetch(folder: Path) -> None:
    """Downloads and unpacks what objects.csv and easy-VQA need into `folder`: stamps/, openmoji/, easy_vqa/."""
    folder.mkdir(parents=True, exist_ok=True)
    packages.debian(STAMPS, folder, "stamps")
    packages.npm(OPENMOJI, folder, "openmoji")
    packages.pypi(EASY_VQA, folder, "easy_vqa")


def fetch_pictures(folder: Path) -> None:
    """Downloads and unpacks what pictures.csv and photographs.csv need, about 400 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    packages.npm(FLUENT, folder, "fluent-emoji-3d")
    for package in sorted({SCRATCH, SWEETHOME} | {row.package for row in photographs.read_photographs()}):
        packages.debian(package, folder, package)


def build(folder: Path, side: int = CUTOUT_PX) -> Cutouts:
    """Cuts out every picture of objects.csv from the unpacked packages in `folder`."""
    rows = read_table()
    images = tuple(np.asarray(rasterise(folder / ROOTS[row.source] / row.file, side)) for row in rows)
    return Cutouts(tuple(rows), images)


def build_pictures(folder: Path, side: int = PICTURE_PX) -> Cutouts:
    """Cuts out every picture of pictures.csv: longest side `side` px, but enlarged 2 times at most."""
    rows, images = read_table(PICTURES), []
    for row in rows:
        image = _trim(soften(_open_picture(folder, row)), Path(row.file))
        images.append(np.asarray(_fit(image, min(side, 2 * max(image.size)))))
    return Cutouts(tuple(rows), tuple(images))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="fetch and cut out the pictures the default model is trained on"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=CUTOUT_PX, help="longest side of a cut-out in px")
    parser.add_argument(
        "--scenes",
        action="store_true",
        help="only what scenes are composed of: no pictures.npz, no photographs",
    )
    args = parser.parse_args()
    fetch(args.folder)
    name = "cutouts.npz" if args.side == CUTOUT_PX else f"cutouts-{args.side}.npz"
    if not (args.folder / name).exists():
        build(args.folder, args.side).save(args.folder / name)
    _report(args.folder / name, Cutouts.load(args.folder / name))
    if args.scenes:
        return
    fetch_pictures(args.folder)
    pictures = args.folder / "pictures.npz"
    if not pictures.exists():
        build_pictures(args.folder).save(pictures)
    _report(pictures, Cutouts.load(pictures, PICTURES))
    count = photographs.build_photographs(args.folder)
    print(f"{args.folder / 'photographs'}: {count} photographs", file=sys.stderr)


def _report(path: Path, cutouts: Cutouts) -> None:
    nouns = {row.noun for row in cutouts.rows}
    print(f"{path}: {len(cutouts.rows)} cut-outs, {len(nouns)} nouns", file=sys.stderr)


if __name__ == "__main__":
    main()
