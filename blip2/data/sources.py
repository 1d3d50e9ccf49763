"""Training and evaluation data: annotation files and folders -> `Sample`s. Needs only the standard library.

The forms are COCO's annotation files, JSON lists, JSONL, CSV, TSV and parquet with a row for an image or a caption, and
folders and tar shards of images with a text file beside each. What cannot be used is passed over and said.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2.imagefiles.advice import FAILED_ROWS, left_out_text
from blip2.imagefiles.listing import PATH_COLUMNS, ImageItem, is_failed_row, path_in, tar_images, walk_images
from blip2.storage import (
    TextFileError,
    read_json_text,
    read_parquet,
    read_rows,
    read_text,
    read_text_lines,
    stream_lines,
)

SHOWN = 3  # of what was passed over, in a message
_TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
_CAPTIONS, _ANSWERS = ("caption", "captions", "text"), ("answer", "answers")
_COLUMNS = (*PATH_COLUMNS, *_CAPTIONS, *_ANSWERS, "question", "id", "image_id", "question_id", "error")

log = logging.getLogger(__name__)


class DataError(ValueError):
    """A data file that cannot be understood."""


@dataclass(frozen=True)
class Sample:
    """An image with its captions, or with a question and its answers.

    Samples of one image share its path; one holds all captions, and each question has its own. In a tar shard an image
    is an `ImageItem`.
    """

    id: str
    image: Path | ImageItem
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()

    @property
    def image_name(self) -> str:
        """What the image is called in messages."""
        return self.image.name if isinstance(self.image, ImageItem) else str(self.image)


@dataclass(frozen=True)
class SampleSet:
    """The samples of a file or folder, and what was passed over.

    problems: rows and images that cannot be used, each with where it is and why.
    left_out: files of kinds that are not read and rows that hold an error of the run that wrote them, as
        `imagefiles.advice.left_out_text` takes them.
    """

    samples: list[Sample]
    problems: list[str]
    left_out: Counter[str]

    def notes(self) -> list[str]:
        """What was passed over, in lines; none where there is nothing."""
        unusable = summary("rows and images that cannot be used", self.problems)
        return [line for line in (unusable, left_out_text(self.left_out)) if line]


def summary(what: str, problems: Sequence[str]) -> str:
    """A line about what was passed over: how many and the first; empty where there is none."""
    more = f"; and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
    return f"{what}: {len(problems):,} ({'; '.join(problems[:SHOWN])}{more})" if problems else ""


def read_samples(path: str | Path, images: str | Path | None = None) -> list[Sample]:
    """The samples of `read_sample_set`."""
    return read_sample_set(path, images).samples


def read_sample_set(path: str | Path, images: str | Path | None = None) -> SampleSet:
    """Read all samples of a file or folder. What was passed over goes to the log too.

    Rows name their image as `image` (or `file_name`), relative to `images`, and hold `caption` (or `captions`, `text`),
    or `question` with `answer` (or `answers`); texts alone or in lists. Rows with captions of the same image become one
    sample. `id` (`image_id`, `question_id`) is optional.

    Args:
        path: a .json, .jsonl, .csv, .tsv or .parquet file, or a folder or .tar of images with the captions of `x.jpg`
            in `x.txt`, one a line. Of the folders in a folder, links to folders too, all are searched.
        images: the folder of the images; absent: that of the file.

    Raises:
        DataError: no such data, or no row that can be used; the message names the first.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent
    suffix, left_out = path.suffix.lower(), Counter[str]()
    rows: Iterable[Any]
    if path.is_dir():
        rows, root = _folder_rows(path, left_out), path
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    elif suffix == ".tar":
        rows = _tar_rows(path, left_out)
    elif suffix in (*_TABLES, ".json"):
        rows = _annotation_rows(read_annotations(path), path)
    else:
        raise DataError(
            f"{path}: expected .json, .jsonl, .csv, .tsv, .parquet, or a folder or .tar of images with .txt files"
        )
    return _samples(rows, path, root, left_out)


def _samples(rows: Iterable[Any], path: Path, root: Path, left_out: Counter[str]) -> SampleSet:
    samples, problems = [], []
    for i, row in enumerate(rows, 1):
        try:
            if is_failed_row(row):
                left_out[FAILED_ROWS] += 1
            else:
                samples.append(_sample(row, root, f"{path}, row {i}"))
        except DataError as error:
            problems.append(str(error))
    content = SampleSet(_merge(samples), problems, left_out)
    for line in content.notes():
        log.warning("%s: %s", path, line)
    if not samples:
        reasons = "; ".join(content.notes())
        raise DataError(f"{path} holds no samples" + (f": {reasons}" if reasons else ""))
    return content


def read_annotations(path: Path) -> Any:
    """The content of a JSON file, or the rows of a table. DataError: it cannot be read."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return list(read_parquet(path, _COLUMNS))
        if suffix in _TABLES:
            rows = read_rows(path)
            return list(rows) if suffix == ".jsonl" else [_filled(row) for row in rows]
        return read_json_text(read_text(path), str(path))
    except TextFileError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its empty fields."""
    return {key: value for key, value in row.items() if value}


def _folder_rows(path: Path, left_out: Counter[str]) -> Iterator[Any]:
    for image in sorted(map(Path, walk_images(str(path), left_out))):
        text = image.with_suffix(".txt")
        try:
            captions = [line for _, line in read_text_lines(text)]
        except FileNotFoundError:
            yield DataError(f"{image}: there is no {text.name} with its captions")
        except (TextFileError, OSError) as error:  # as a damaged image is
            yield DataError(f"{image}: {error}")
        else:
            yield _row(str(image.relative_to(path)), captions)


def _tar_rows(path: Path, left_out: Counter[str]) -> Iterator[Any]:
    texts: dict[str, list[str] | DataError] = {}
    try:
        images = list(tar_images(str(path), left_out))
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, ending = os.path.splitext(f"{path}/{member.name}")
                if ending == ".txt" and (file := archive.extractfile(member)) is not None:
                    try:
                        lines = stream_lines(io.BytesIO(file.read()), stem + ending)
                        texts[stem] = [line for _, line in lines]
                    except TextFileError as error:
                        texts[stem] = DataError(f"{stem}{ending}: {error}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); repair it") from error
    for image in images:
        stem = os.path.splitext(image.name)[0]
        captions = texts.get(
            stem, DataError(f"{image.name}: there is no {os.path.basename(stem)}.txt with its captions")
        )
        yield captions if isinstance(captions, DataError) else _row(image, captions)


def _row(image: str | ImageItem, lines: list[str]) -> dict[str, Any]:
    return {"image": image, "captions": [line.strip() for line in lines if line.strip()]}


def _annotation_rows(content: Any, path: Path) -> Iterable[Any]:
    """A list of rows, or COCO's object with `images` and `annotations`."""
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list) and "images" in content:
        return _coco_rows(content["annotations"], content["images"], path)
    if isinstance(content, list):
        return content
    raise DataError(f"{path}: expected a list of rows, or an object with COCO's `images` and `annotations`")


def _coco_rows(annotations: list[Any], images: Any, path: Path) -> Iterator[Any]:
    listed = [image for image in images if isinstance(image, Mapping)] if isinstance(images, list) else []
    names = {str(image["id"]): image.get("file_name") for image in listed if "id" in image}
    for row in annotations:
        number = row.get("image_id") if isinstance(row, Mapping) else None
        if number is not None and names.get(str(number)) is None:
            yield DataError(
                f"{path}: an annotation belongs to image {number}, which is not listed with its file"
            )
        else:
            yield row if number is None else {"image": names[str(number)], **row, "id": number}


def _sample(row: Any, root: Path, source: str) -> Sample:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"{source} is a {type(row).__name__}, expected an object with `image` and `caption`")
    image = _first(row, *PATH_COLUMNS)
    if not isinstance(image, str | ImageItem) or not image:
        raise DataError(f"{source} names no image; expected `image`, got {sorted(map(str, row))}")
    name = image.name if isinstance(image, ImageItem) else image
    captions, answers = (_texts(_first(row, *names), source) for names in (_CAPTIONS, _ANSWERS))
    question = row.get("question")
    if question is not None and not isinstance(question, str):
        raise DataError(f"{source}: the question is a {type(question).__name__}, expected text")
    question = next(iter(_texts(question, source)), None)
    if not captions and question is None:
        raise DataError(
            f"{source} ({name}) has neither a caption nor a question; got {sorted(map(str, row))}"
        )
    identity = _first(row, "question_id", "id", "image_id") if question else _first(row, "id", "image_id")
    place = image if isinstance(image, ImageItem) else Path(path_in(str(root), image))
    return Sample(str(name if identity is None else identity), place, captions, question, answers)


def is_text(value: object) -> bool:
    """Whether a value is text; one with surrogates, which are no Unicode characters, is none."""
    return isinstance(value, str) and (value.isprintable() or not re.search("[\ud800-\udfff]", value))


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _texts(value: Any, source: str) -> tuple[str, ...]:
    """One text, or a list of texts or of VQA's {"answer": text}."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = []
    for item in values:
        text = item.get("answer") if isinstance(item, Mapping) else item
        if not is_text(text):
            raise DataError(f"{source}: expected a text, got {repr(text)[:80]}")
        if text and not text.isspace():
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
