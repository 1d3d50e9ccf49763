"""Which files are the user's pictures, by their names."""

from __future__ import annotations

import importlib.util
import os
import re

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # the extra "heif"
# Files that are taken for images when a folder is given; what they really are is read from their content.
_ENDINGS = "jpg jpeg jpe jif jfif jfi mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm avif avifs"
_ENDINGS += " heic heics heif heifs hif" if HAS_HEIF else ""
SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
# What Windows, macOS and network storage put beside pictures; whatever begins with a dot is theirs too.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin")


_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # a drive's name has one letter


def is_url(source: str) -> bool:
    """Whether this is written as a URL, and is no path of something that exists."""
    return _URL.match(source) is not None and not os.path.lexists(source)


def is_image_name(path: str) -> bool:
    """Whether a file is one of the user's pictures, by its path within a folder or an archive."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a file or folder, by its path within a folder or an archive, is hidden or the system's own."""
    parts = set(path.replace(os.sep, "/").split("/")) - {".", ".."}
    return any(part.startswith(".") or part.lower() in _SYSTEM_FOLDERS for part in parts)
