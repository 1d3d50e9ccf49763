"""A folder as users have it: pictures from Windows, macOS and a NAS, some captioned, some edited, some damaged."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

CAPTIONS = ("a red kite", "zwei Äpfel\r\nauf dem Tisch", "café noir", "犬", "one\u2028line", "last \n")
ENCODINGS: tuple[Callable[[str], bytes], ...] = (
    str.encode,
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("utf-16"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.encode("latin-1", "replace"),
)
BLANK = (b"", b"\n", b"\xef\xbb\xbf", b"  \r\n", b"\xff\xfe")
DAMAGED = (b"", b"\0" * 400, b"<html>404</html>")
FORMATS = {
    ".jpg": "JPEG", ".JPG": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".gif": "GIF", ".tif": "TIFF", ".pgm": "PPM", ".avif": "AVIF",
}  # fmt: skip
UNREADABLE = (".svg", ".cr2", ".jxl", ".nef", ".PSD", ".Jp2")
FOLDERS = (
    "", "DCIM/100APPLE", "Neuer Ordner (2)", "été", "e\u0301te\u0301", "写真", "a'b \"c\"", "new\nline", "x" * 100,
)  # fmt: skip
NOT_THEIRS = (
    ".DS_Store", "Thumbs.db", "desktop.ini", ".Trash-1000/files/old.jpg", "__MACOSX/._a.jpg", "notes.docx",
    ".ipynb_checkpoints/a-checkpoint.png", "$RECYCLE.BIN/$R1.jpg", "#recycle/b.png", ".Spotlight-V100/c.png",
)  # fmt: skip


@dataclass
class MixedFolder:
    """What was put into the folder.

    sound: pictures that can be read. wanted: those without a caption, and their text files.
    kept: text files and their bytes, to stay as they are. damaged: pictures that cannot be read.
    unreadable: suffixes of pictures of kinds that are not read, with their number.
    """

    root: Path
    sound: list[Path] = field(default_factory=list)
    wanted: dict[Path, Path] = field(default_factory=dict)
    kept: dict[Path, bytes] = field(default_factory=dict)
    damaged: set[Path] = field(default_factory=set)
    unreadable: Counter[str] = field(default_factory=Counter)


def picture(rng: random.Random, format: str) -> bytes:
    image = Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), tuple(rng.randbytes(3)))
    for _ in range(3):
        image.putpixel((rng.randint(0, 19), rng.randint(0, 19)), tuple(rng.randbytes(3)))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def make(root: Path, number: int, seed: int = 0) -> MixedFolder:
    """Fill `root` with about `number` files."""
    rng, mixed = random.Random(seed), MixedFolder(root)
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(number // 2):
        folder = root / rng.choice(FOLDERS)
        suffix = rng.choice(list(FORMATS))
        path = folder / f"IMG_{i:05d}{suffix}"
        content, kind = picture(rng, FORMATS[suffix]), rng.random()
        path.write_bytes(content)
        if kind < 0.04:
            path.write_bytes(rng.choice([*DAMAGED, content[: len(content) // 2]]))
            mixed.damaged.add(path)
        else:
            mixed.sound.append(path)
        if 0.04 <= kind < 0.5:
            mixed.kept[path.with_suffix(".txt")] = text = rng.choice(ENCODINGS)(rng.choice(CAPTIONS))
            path.with_suffix(".txt").write_bytes(text)
        elif kind >= 0.5:
            mixed.wanted[path] = path.with_suffix(".txt")
            if kind < 0.55:
                path.with_suffix(".txt").write_bytes(rng.choice(BLANK))
        if rng.random() < 0.2:
            (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(100))
        if rng.random() < 0.1:
            thumbnail = folder / "@eaDir" / path.name / "SYNOPHOTO_THUMB_M.jpg"
            thumbnail.parent.mkdir(parents=True, exist_ok=True)
            thumbnail.write_bytes(content)
        if rng.random() < 0.1:
            suffix = rng.choice(UNREADABLE)
            (folder / f"RAW_{i:05d}{suffix}").write_bytes(bytes(50))
            mixed.unreadable[suffix.lower()] += 1
    for name in NOT_THEIRS:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(rng, "PNG"))
    os.symlink(root / "DCIM", root / "DCIM" / "loop")
    os.symlink(root, root / "写真" / "up")
    return mixed
