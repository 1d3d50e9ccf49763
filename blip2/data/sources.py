"""Training and evaluation data: annotation files and folders -> `Sample`s. Needs only the standard library.

The forms are COCO's annotation files, JSON lists, JSONL and CSV with a row for an image or a caption, and folders of
images with a text file beside each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2.storage import TextFileError, read_json_text, read_rows, read_text

log = logging.getLogger(__name__)


class DataError(ValueError):
    """A data file that cannot be understood."""


@dataclass(frozen=True)
class Sample:
    """An image with its captions, or with a question and its answers.

    Samples of one image share its path; one holds all captions, and each question has its own.
    """

    id: str
    image: Path
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()


def read_samples(path: str | Path, images: str | Path | None = None) -> list[Sample]:
    """Read all samples of a file or folder.

    Rows name their image as `image` (or `file_name`), relative to `images`, and hold `caption` (or `captions`, `text`),
    or `question` with `answer` (or `answers`); texts alone or in lists. Rows with captions of the same image become one
    sample. `id` (`image_id`, `question_id`) is optional.

    Args:
        path: a .json, .jsonl or .csv file, or a folder of images with the captions of `x.jpg` in `x.txt`, one a line.
        images: the folder of the images; absent: that of the file.

    Raises:
        DataError: no such data, or a row without an image or text; the message names the row.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent
    if path.is_dir():
        rows: Iterable[Mapping[str, Any]] = _folder_rows(path)
        root = path
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    elif path.suffix == ".csv":
        rows = [{key: value for key, value in row.items() if value} for row in read_annotations(path)]
    elif path.suffix in (".json", ".jsonl"):
        rows = _json_rows(read_annotations(path), path)
    else:
        raise DataError(f"{path}: expected .json, .jsonl, .csv or a folder of images with .txt files")
    samples = _merge(_sample(row, root, f"{path}, row {i}") for i, row in enumerate(rows, 1))
    if not samples:
        raise DataError(f"{path} holds no samples")
    return samples


def read_annotations(path: Path) -> Any:
    """The content of a JSON file, or the rows of CSV or JSONL. DataError: it cannot be read."""
    try:
        if path.suffix in (".csv", ".jsonl"):
            return list(read_rows(path))
        return read_json_text(read_text(path), str(path))
    except TextFileError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _folder_rows(path: Path) -> list[dict[str, Any]]:
    from blip2.images import is_image_name  # here, as it imports torch

    rows = []
    for image in sorted(p for p in path.rglob("*") if is_image_name(str(p.relative_to(path)))):
        text = image.with_suffix(".txt")
        if text.is_file():
            try:
                lines = map(str.strip, read_text(text).split("\n"))
            except TextFileError as error:  # as a damaged image is
                log.warning("left out: %s: %s", image, error)
                continue
            rows.append({"image": str(image.relative_to(path)), "captions": list(filter(None, lines))})
    return rows


def _json_rows(content: Any, path: Path) -> list[Mapping[str, Any]]:
    """A list of rows, or COCO's object with `images` and `annotations`."""
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list) and "images" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = content["annotations"]
        try:
            return [{"image": names[row["image_id"]], **row, "id": row["image_id"]} for row in rows]
        except KeyError as error:
            raise DataError(f"{path}: an annotation belongs to image {error}, which is not listed") from error
    if isinstance(content, list):
        return content
    raise DataError(f"{path}: expected a list of rows, or an object with COCO's `images` and `annotations`")


def _sample(row: Any, root: Path, source: str) -> Sample:
    if not isinstance(row, Mapping):
        raise DataError(f"{source} is a {type(row).__name__}, expected an object with `image` and `caption`")
    image = _first(row, "image", "file_name")
    if not isinstance(image, str):
        raise DataError(f"{source} names no image; expected `image`, got {sorted(map(str, row))}")
    captions = _texts(_first(row, "caption", "captions", "text"), source)
    question = row.get("question")
    answers = _texts(_first(row, "answer", "answers"), source)
    if question is not None and not isinstance(question, str):
        raise DataError(f"{source}: the question is a {type(question).__name__}, expected text")
    if not captions and question is None:
        raise DataError(
            f"{source} ({image}) has neither a caption nor a question; got {sorted(map(str, row))}"
        )
    identity = _first(row, "question_id", "id", "image_id") if question else _first(row, "id", "image_id")
    return Sample(str(image if identity is None else identity), root / image, captions, question, answers)


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _texts(value: Any, source: str) -> tuple[str, ...]:
    """One text, or a list of texts or of VQA's {"answer": text}."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = []
    for item in values:
        text = item.get("answer") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise DataError(f"{source}: expected a text, got {text!r}")
        texts.append(text)
    return tuple(texts)


def _merge(samples: Iterable[Sample]) -> list[Sample]:
    """Join the samples with captions of one image; questions stay apart. In the order of their first appearance."""
    merged: dict[Any, Sample] = {}
    for sample in samples:
        key: Any = sample.image if sample.question is None else (sample.image, sample.question, sample.id)
        if first := merged.get(key):
            captions, answers = first.captions + sample.captions, first.answers + sample.answers
            sample = replace(first, captions=captions, answers=answers)
        merged[key] = sample
    return list(merged.values())
