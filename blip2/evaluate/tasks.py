"""What can be evaluated, and its data: files as they were published, or in one of the common forms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blip2.data.sources import DataError, is_text, read_annotations, read_sample_set, summary
from blip2.evaluate.names import TASK_FILES
from blip2.imagefiles.advice import left_out_text
from blip2.imagefiles.listing import ImageItem

if TYPE_CHECKING:
    from blip2.images import ImageSource

Kind = Literal["captions", "questions", "retrieval", "photos"]
ImageFile = str | Path | ImageItem  # an image that is read when it is its turn


@dataclass(frozen=True)
class EvalItem:
    """An image with its reference captions, with a question and the right answers, or with the nouns that name it.

    id: as in the official prediction files. kind: a subset that is scored separately too, such as a domain.
    things: the objects of a scene, each with its number. names: nouns, of which a right caption holds one.
    """

    id: int | str
    image: ImageSource
    captions: tuple[str, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    things: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalTask:
    """A set to evaluate on.

    rule: how answers are scored. own: a set of the user's, no published one. left_out: rows that cannot be used, each
    with the reason. notes: what else the report says about the set.
    """

    name: str
    kind: Kind
    items: list[EvalItem]
    rule: Literal["vqa", "gqa", "normalised", "exact"] = "exact"
    about: str = ""
    own: bool = False
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def first(self, limit: int | None) -> EvalTask:
        """The task with its first `limit` items alone."""
        return replace(self, items=self.items[:limit])

    def without(self, images: Container[ImageFile]) -> EvalTask:
        """The task without the items of these images."""
        return replace(self, items=sound_items(self.items, images))


def sound_items(items: Iterable[EvalItem], damaged: Container[ImageFile]) -> list[EvalItem]:
    """The items but those whose images are damaged."""
    return [item for item in items if not (isinstance(item.image, ImageFile) and item.image in damaged)]


def read_task(
    name: str, data: Path | None, *, images: Path | None = None, annotations: Path | None = None
) -> EvalTask:
    """The items of a task.

    Args:
        name: one of `names.TASK_NAMES` except "scenes" and "default", which `scenes.read_scenes` reads, and "photos",
            which `photos.read_photos` reads.
        data: the folder with the files of `TASK_FILES`; for "captions" and "questions" a file or folder of any common
            form: COCO's captions, Karpathy's split, VQA's questions, JSON, JSONL or CSV rows, images with text files.
        images: the folder of the images, if it is not the usual one.
        annotations: the answers to VQA's questions.

    Raises:
        DataError: data that are missing or cannot be understood; the message says what is needed.
    """
    if name == "easyvqa":
        return _easy_vqa(data)
    if data is None:
        raise DataError(files_needed(name, None))
    if name in ("captions", "questions"):
        return _common_form(name, data, images, annotations)
    first, second = (data / file for file, _ in TASK_FILES[name][:2])
    if not all(
        (data / file).exists() for file, _ in TASK_FILES[name] if images is None or not file.endswith("/")
    ):
        raise DataError(files_needed(name, data))
    kind: Kind = "captions"
    rule: Literal["vqa", "gqa", "exact"] = "exact"
    left_out: list[str] = []
    if name == "gqa":
        items, about, kind, rule = (
            _gqa(first, images or second, left_out),
            "GQA's balanced test-dev",
            "questions",
            "gqa",
        )
    elif name in ("vqav2", "okvqa"):
        items = _vqa(first, annotations or second, images or data / "val2014", left_out)
        about, kind, rule = "the validation questions", "questions", "vqa"
    elif name == "nocaps":
        items, about = _coco(read_annotations(first), images or second, left_out), "NoCaps' validation set"
    elif name.endswith("coco"):
        items, about = _karpathy(first, images or data, left_out), "COCO, Karpathy's test split"
    else:
        items, about = _karpathy(first, images or second, left_out), "Flickr30k's test split"
    if "retrieval" in name:
        kind = "retrieval"
    usable = _with_references(items, kind, left_out, least=4 if rule == "vqa" else 1)
    return EvalTask(name, kind, usable, rule, about, left_out=tuple(left_out))


def _with_references(
    items: Iterable[EvalItem], kind: Kind, left_out: list[str], least: int = 1
) -> list[EvalItem]:
    """The items of a kind that can be scored; those without texts, or with less than `least` answers, are noted."""
    usable = []
    for item in items:
        texts, what = (item.answers, "answers") if kind == "questions" else (item.captions, "captions")
        if odd := [text for text in (item.question, *texts) if not is_text(text)]:
            left_out.append(f"{item.id} holds {repr(odd[0])[:80]}, which is no text")
        elif bool(item.question) != (kind == "questions") and (item.question or item.captions):
            continue  # of a set with both kinds
        elif kind == "questions" and not item.question:
            left_out.append(f"{item.id} has no question")
        elif len(texts) < (least if kind == "questions" else 1):
            fewer = f", fewer than {least}" if least > 1 else ""
            left_out.append(f"{item.id} has {len(texts)} {what}{fewer}")
        else:
            # as predictions have it: a number that JSON knows, or a text
            usable.append(item if type(item.id) is int else replace(item, id=str(item.id)))
    return usable


def files_needed(name: str, data: Path | None) -> str:
    """An error message: the files a task needs under the data folder, and which of them are there."""
    if name in ("captions", "questions"):
        return f"eval {name}: give the file or folder with --data"
    folder = data or Path("DIR")
    lines = [f"eval {name} needs in {folder}"]
    for file, about in TASK_FILES[name]:
        state = "" if data is None else "here    " if (folder / file).exists() else "MISSING "
        lines.append(f"{state}{folder / file} - {about}")
    return "; ".join(lines if data else [*lines, "name the folder with --data DIR"])


def _read_each(
    rows: Iterable[Any], what: str, read: Callable[[Any], EvalItem | None], left_out: list[str]
) -> Iterator[EvalItem]:
    """The items that `read` makes of rows; a row that is not in its published form is noted."""
    for place, row in enumerate(rows, 1):
        try:
            item = read(row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            left_out.append(f"{what} {place} is not in its published form ({reason})")
        else:
            if item is not None:
                yield item


def _karpathy(path: Path, images: Path, left_out: list[str]) -> Iterator[EvalItem]:
    def read(row: Any) -> EvalItem | None:
        if row["split"] != "test":
            return None
        file = images / row.get("filepath", "") / row["filename"]
        if not file.exists() and (images / row["filename"]).exists():
            file = images / row["filename"]
        texts = tuple(" ".join(sentence["raw"].split()) for sentence in row["sentences"])
        return EvalItem(row.get("cocoid", Path(row["filename"]).stem), file, texts)

    yield from _read_each(read_annotations(path)["images"], "image", read, left_out)


def _coco(content: Mapping[str, Any], images: Path, left_out: list[str]) -> Iterator[EvalItem]:
    """COCO's captions file; NoCaps' also has a domain for each image."""
    texts: dict[Any, list[str]] = {}

    def collect(row: Any) -> None:
        number, caption = row["image_id"], row["caption"]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("no caption")
        texts.setdefault(number, []).append(caption)

    def read(row: Any) -> EvalItem | None:
        file = images / row["file_name"]
        if row["id"] not in texts:
            return None
        kind = str(row.get("domain") or "")
        return EvalItem(row["id"], file, tuple(texts.pop(row["id"])), kind=kind)

    list(_read_each(content["annotations"], "annotation", collect, left_out))
    yield from _read_each(content["images"], "image", read, left_out)
    left_out += [f"an annotation belongs to image {number}, which is not listed" for number in texts]


def _vqa(questions: Path, annotations: Path, images: Path, left_out: list[str]) -> Iterator[EvalItem]:
    content = read_annotations(questions)
    subtype = content.get("data_subtype", "val2014")
    annotation_of: dict[Any, Any] = {}

    def collect(row: Any) -> None:
        annotation_of[row["question_id"]] = row

    def read(row: Any) -> EvalItem | None:
        annotation = annotation_of.get(row["question_id"])
        if annotation is None:
            left_out.append(f"{annotations} has no answers to question {row['question_id']}")
            return None
        return EvalItem(
            row["question_id"],
            images / (row.get("image") or f"COCO_{subtype}_{row['image_id']:012d}.jpg"),
            question=row["question"],
            answers=tuple(answer["answer"] for answer in annotation["answers"]),
            kind=str(annotation.get("answer_type") or ""),
        )

    list(_read_each(read_annotations(annotations)["annotations"], "annotation", collect, left_out))
    yield from _read_each(content["questions"], "question", read, left_out)


def _gqa(questions: Path, images: Path, left_out: list[str]) -> Iterator[EvalItem]:
    def read(entry: tuple[str, Any]) -> EvalItem:
        name, row = entry
        return EvalItem(
            name, images / f"{row['imageId']}.jpg", question=row["question"], answers=(row["answer"],)
        )

    yield from _read_each(read_annotations(questions).items(), "question", read, left_out)


def _easy_vqa(data: Path | None) -> EvalTask:
    """The official test split: from DIR/easy_vqa, or from the installed package."""
    root = None if data is None else data / "easy_vqa"
    if root is None:
        spec = importlib.util.find_spec("easy_vqa")
        root = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if root is None or not (root / "data/test/questions.json").is_file():
        raise DataError(files_needed("easyvqa", data))
    test = root / "data/test"
    rows = sorted(enumerate(read_annotations(test / "questions.json")), key=lambda row: int(row[1][2]))
    items = [
        EvalItem(i, test / "images" / f"{image}.png", question=question, answers=(answer,))
        for i, (question, answer, image) in rows
    ]
    return EvalTask("easyvqa", "questions", items, about="easy-VQA's test split")


def _common_form(name: str, data: Path, images: Path | None, annotations: Path | None) -> EvalTask:
    """A file or folder of the user's, in whichever form it is."""
    content = read_annotations(data) if data.suffix == ".json" else None
    content = content if isinstance(content, Mapping) else {}
    root = images or data.parent
    items: Iterable[EvalItem]
    left_out: list[str] = []
    notes: list[str] = []
    if "questions" in content:
        if annotations is None:
            raise DataError(
                f"{data} holds questions alone: name the file of their answers with --annotations"
            )
        items = _vqa(data, annotations, root, left_out)
    elif "images" in content and "annotations" not in content:
        items = _karpathy(data, root, left_out)
    elif "images" in content:
        items = _coco(content, root, left_out)
    else:
        samples = read_sample_set(data, images)
        left_out, notes = samples.problems, list(filter(None, [left_out_text(samples.left_out)]))
        items = (
            EvalItem(sample.id, sample.image, sample.captions, sample.question or "", sample.answers)
            for sample in samples.samples
        )
    kind: Kind = "captions" if name == "captions" else "questions"
    usable = _with_references(items, kind, left_out)
    if not usable:
        what = "captions" if kind == "captions" else "questions with answers"
        raise DataError(f"{data} holds no {what}{summary('; left out', left_out)}")
    rule: Literal["vqa", "normalised"] = (
        "vqa" if all(len(item.answers) >= 10 for item in usable) else "normalised"
    )
    return EvalTask(name, kind, usable, rule, str(data), True, tuple(left_out), tuple(notes))
