"""What helps with image files that are not read: kinds that no decoder here knows, and paths that lead nowhere."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping

from blip2.imagefiles.names import SUFFIXES

NOT_FETCHED = "URLs are not fetched here; download the image, and give its file"
FAILED_ROWS = "rows that hold an error"  # of the run that wrote the file
_CONVERT = "convert them to JPEG or PNG"
_DRAWN, _RAW = "export them as PNG", "export them as JPEG, or use the JPEG beside each"
_KINDS = {
    "heic heif hif heics heifs": "pip install 'blip2[heif]', or convert them to JPEG",
    "jxl jp2 j2k j2c jpc jpf jpx jpm jxr wdp hdp psd psb xcf kra": _CONVERT,
    "ico icns cur tga exr hdr dds pcx xbm xpm sgi qoi dcm fits": _CONVERT,
    "svg svgz eps ai wmf emf cdr": _DRAWN,
    "cr2 cr3 crw nef nrw arw srf sr2 dng orf rw2 rwl raf pef srw raw 3fr iiq x3f kdc dcr erf mef mos mrw": _RAW,
}
# Suffixes of what a user would call an image and is not read here -> what helps.
UNREADABLE = {
    f".{ending}": advice
    for endings, advice in _KINDS.items()
    for ending in endings.split()
    if f".{ending}" not in SUFFIXES
}
_BEGINNINGS = (
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", "convert it to JPEG"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000", "convert it to JPEG"),
    (rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype )?html", "a web page", "download the image itself"),
    (
        rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml|!doctype svg)|%!PS",
        "a drawing (SVG, EPS)",
        "export it as PNG",
    ),
    (rb"%PDF", "PDF", "export its pages as PNG"),
    (rb"8BPS|gimp xcf", "a file of Photoshop or GIMP", "export it as PNG"),
    (rb"v/1\x01|#\?RADIANCE", "an image of high dynamic range", "convert it to PNG"),
    (rb"(?s)FUJIFILMCCD-RAW|.{4}ftypcrx|IIRO|\0MRM", "a camera's raw file", "export it as JPEG"),
)


def unreadable_kind(content: bytes) -> str:
    """What a file is that no decoder here reads, and what helps, to be put after the message; empty where not known."""
    kinds = (
        f"; this is {kind}: {advice}" for start, kind, advice in _BEGINNINGS if re.match(start, content[:64])
    )
    return next(kinds, "")


def unreadable_suffix(name: str, message: str) -> str:
    """What helps where a file's name says a kind that is not read, to be put after an error's message; else empty."""
    suffix = os.path.splitext(name)[1].lower()
    known = suffix not in UNREADABLE or "this is " in message  # the content told
    return "" if known else f"; {suffix} files are not read here: {UNREADABLE[suffix]}"


def left_out_text(left_out: Mapping[str, int]) -> str:
    """A line about the files and rows that a listing passed over, most first, with what helps; empty without any.

    left_out: how many of each suffix in `UNREADABLE`, and of `FAILED_ROWS`.
    """
    counts: dict[str, list[str]] = {}
    for what, count in sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0])):
        if count:
            counts.setdefault(UNREADABLE.get(what, ""), []).append(f"{count:,} {what}")
    groups = (", ".join(some) + (f" ({advice})" if advice else "") for advice, some in counts.items())
    return f"left out: {'; '.join(groups)}" if counts else ""


def missing_hint(path: str, root: str = "") -> str:
    """What to do about a path that leads to no file, to be put after the message; empty where nothing is known.

    root: the folder of the list or table that holds the path.
    """
    if re.search(r"(?:^|[/\\])file:/", path, re.IGNORECASE):
        return "; write the path alone, without file://"
    if re.search(r"(?:^|[/\\])[a-zA-Z][a-zA-Z0-9+.-]+:/", path):
        return f"; {NOT_FETCHED}"
    home = re.search(r"(?:^|/)(~[^/]*/.*)", path)
    if home and (full := os.path.expanduser(home[1])) != home[1]:
        return f"; ~ means the home folder to shells alone, write {full}"
    trimmed = "/".join(part.strip(" \t'\"") or part for part in path.split("/"))
    forward = trimmed.replace("\\", "/")
    for other in (trimmed, forward, *(unicodedata.normalize(form, forward) for form in ("NFC", "NFD"))):
        if other != path and os.path.isfile(other):
            return f"; there is {other!r}, write its name so"
    if root and os.path.isfile(here := os.path.relpath(path, root)):
        return f"; paths in a file are relative to its own folder, and {here} is in the current folder"
    if os.name == "posix" and re.search(r"(?:^|/)['\" ]*[a-zA-Z]:[\\/]", path):
        return "; Windows' drives are not known here, write the path that the file has on this machine"
    return ""
