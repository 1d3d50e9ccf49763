"""What can be evaluated, and its data: files as they were published, or one of the common forms."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blip2.data import DataError, read_samples
from blip2.images import ImageSource

Kind = Literal["captions", "questions", "retrieval"]


@dataclass(frozen=True)
class Item:
    """An image, what is said about it or asked, and what is right.

    id: as the official prediction files have it. kind: a part of the set that has a figure of its own.
    things: what a scene shows, each with its number.
    """

    id: int | str
    image: ImageSource
    captions: tuple[str, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    things: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A set to evaluate on. rule: how answers are scored: "vqa", "gqa" or "exact"."""

    name: str
    kind: Kind
    items: list[Item]
    rule: str = "exact"
    about: str = ""

    def first(self, limit: int | None) -> Task:
        """The first so many of it."""
        return replace(self, items=self.items[:limit])


# Task -> the files it needs under the data folder, and what they are.
NEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    "coco": (
        ("dataset_coco.json", "Karpathy's split (caption_datasets.zip)"),
        ("val2014/", "COCO's 2014 validation images, COCO_val2014_*.jpg"),
    ),
    "nocaps": (
        ("nocaps_val_4500_captions.json", "NoCaps' validation captions with their domains"),
        ("images/", "NoCaps' validation images, by the file_name the captions' file gives"),
    ),
    "flickr30k": (
        ("dataset_flickr30k.json", "Karpathy's split (caption_datasets.zip)"),
        ("flickr30k-images/", "Flickr30k's images, 1000092795.jpg and on"),
    ),
    "vqav2": (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "VQAv2's validation questions"),
        ("v2_mscoco_val2014_annotations.json", "their answers, ten to a question"),
        ("val2014/", "COCO's 2014 validation images, COCO_val2014_*.jpg"),
    ),
    "okvqa": (
        ("OpenEnded_mscoco_val2014_questions.json", "OK-VQA's validation questions"),
        ("mscoco_val2014_annotations.json", "their answers, ten to a question"),
        ("val2014/", "COCO's 2014 validation images, COCO_val2014_*.jpg"),
    ),
    "gqa": (
        ("testdev_balanced_questions.json", "GQA's balanced test-dev questions"),
        ("images/", "GQA's images, by their ids: n161313.jpg"),
    ),
    "easyvqa": (
        (
            "easy_vqa/data/test/questions.json",
            "easy-VQA's test questions: `pip install easy-vqa` alone will do",
        ),
        ("easy_vqa/data/test/images/", "its images, 0.png and on"),
    ),
    "scenes": (
        ("scenes/scenes.json", "composed scenes with captions and questions: `make eval-data` writes them"),
        ("scenes/images/", "their images"),
    ),
}
NEEDS["retrieval-coco"], NEEDS["retrieval-flickr30k"] = NEEDS["coco"], NEEDS["flickr30k"]
NAMES = (*(name for name in NEEDS), "default", "captions", "questions")


def read_task(
    name: str,
    data: Path | None,
    *,
    images: Path | None = None,
    annotations: Path | None = None,
) -> Task:
    """The set of a task.

    Args:
        name: one of `NAMES` but "scenes" and "default", which `scenes.read_scenes` reads.
        data: the folder that holds what `NEEDS` lists; for "captions" and "questions" a file or folder of any common
            form: COCO's captions, Karpathy's split, VQA's questions, JSON, JSONL or CSV rows, images with text files.
        images: the folder of the images, where it is not the usual one.
        annotations: the answers to VQA's questions.

    Raises:
        DataError: data that are missing or cannot be understood; the message says what is needed.
    """
    if name == "easyvqa":
        return _easy_vqa(data)
    if data is None:
        raise DataError(needed(name, Path("DIR")))
    if name in ("captions", "questions"):
        return _common(name, data, images, annotations)
    if not all((data / file).exists() for file, _ in NEEDS[name] if images is None or not file.endswith("/")):
        raise DataError(needed(name, data))
    if name in ("coco", "retrieval-coco"):
        items = list(_karpathy(data / "dataset_coco.json", images or data))
        return Task(
            name, "captions" if name == "coco" else "retrieval", items, about="COCO, Karpathy's test split"
        )
    if name in ("flickr30k", "retrieval-flickr30k"):
        items = list(_karpathy(data / "dataset_flickr30k.json", images or data / "flickr30k-images"))
        return Task(
            name, "captions" if name == "flickr30k" else "retrieval", items, about="Flickr30k's test split"
        )
    if name == "nocaps":
        items = list(_coco(load_json(data / NEEDS[name][0][0]), images or data / "images"))
        return Task(name, "captions", items, about="NoCaps' validation set")
    if name == "gqa":
        return Task(
            name, "questions", list(_gqa(data, images or data / "images")), "gqa", "GQA's balanced test-dev"
        )
    asked, answered = data / NEEDS[name][0][0], annotations or data / NEEDS[name][1][0]
    items = list(_vqa(asked, answered, images or data / "val2014"))
    return Task(name, "questions", items, "vqa", "the validation questions")


def needed(name: str, data: Path) -> str:
    """What a task needs, where, and what is not there."""
    if name in ("captions", "questions"):
        return f"eval {name}: give the file or folder with --data"
    lines = [f"eval {name} needs in {data}"]
    for file, about in NEEDS[name]:
        state = "" if data == Path("DIR") else "here   " if (data / file).exists() else "MISSING"
        lines.append(f"{state} {data / file} - {about}".strip())
    return "; ".join(lines) if data != Path("DIR") else "; ".join([*lines, "name the folder with --data DIR"])


def load_json(path: Path) -> Any:
    """What a JSON file holds. DataError: it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON ({error})") from error


def _karpathy(path: Path, images: Path) -> Iterator[Item]:
    for row in load_json(path)["images"]:
        if row["split"] == "test":
            file = images / row.get("filepath", "") / row["filename"]
            if not file.exists() and (images / row["filename"]).exists():
                file = images / row["filename"]
            texts = tuple(" ".join(sentence["raw"].split()) for sentence in row["sentences"])
            yield Item(row.get("cocoid", Path(row["filename"]).stem), file, texts)


def _coco(content: Mapping[str, Any], images: Path) -> Iterator[Item]:
    """COCO's captions file; NoCaps' has a domain for each image besides."""
    texts: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        texts.setdefault(row["image_id"], []).append(row["caption"])
    for row in content["images"]:
        if row["id"] in texts:
            kind = str(row.get("domain", ""))
            yield Item(row["id"], images / row["file_name"], tuple(texts[row["id"]]), kind=kind)


def _vqa(questions: Path, annotations: Path, images: Path) -> Iterator[Item]:
    asked = load_json(questions)
    subtype = asked.get("data_subtype", "val2014")
    answered = {row["question_id"]: row for row in load_json(annotations)["annotations"]}
    for row in asked["questions"]:
        found = answered.get(row["question_id"])
        if found is None:
            raise DataError(f"{annotations} has no answers to question {row['question_id']} of {questions}")
        file = row.get("image") or f"COCO_{subtype}_{row['image_id']:012d}.jpg"
        yield Item(
            row["question_id"],
            images / file,
            question=row["question"],
            answers=tuple(each["answer"] for each in found["answers"]),
            kind=found.get("answer_type", ""),
        )


def _gqa(data: Path, images: Path) -> Iterator[Item]:
    for identity, row in load_json(data / NEEDS["gqa"][0][0]).items():
        yield Item(
            identity, images / f"{row['imageId']}.jpg", question=row["question"], answers=(row["answer"],)
        )


def _easy_vqa(data: Path | None) -> Task:
    """The official test split: from DIR/easy_vqa, or from the installed package."""
    root = None if data is None else data / "easy_vqa"
    if root is None:
        spec = importlib.util.find_spec("easy_vqa")
        root = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if root is None or not (root / "data/test/questions.json").is_file():
        raise DataError(needed("easyvqa", Path("DIR") if data is None else data))
    test = root / "data/test"
    items = [
        Item(i, test / "images" / f"{image}.png", question=question, answers=(answer,))
        for i, (question, answer, image) in enumerate(load_json(test / "questions.json"))
    ]
    items.sort(key=lambda item: int(Path(str(item.image)).stem))
    return Task("easyvqa", "questions", items, about="easy-VQA's test split")


def _common(name: str, data: Path, images: Path | None, annotations: Path | None) -> Task:
    content = load_json(data) if data.suffix == ".json" else None
    root = images or data.parent
    if isinstance(content, Mapping) and "questions" in content:
        if annotations is None:
            raise DataError(
                f"{data} holds questions alone: name the file of their answers with --annotations"
            )
        items = list(_vqa(data, annotations, root))
    elif isinstance(content, Mapping) and content.get("images") and "sentences" in content["images"][0]:
        items = list(_karpathy(data, root))
    elif isinstance(content, Mapping) and "annotations" in content and "images" in content:
        items = list(_coco(content, root))
    else:
        items = [
            Item(sample.id, sample.image, sample.captions, sample.question or "", sample.answers)
            for sample in read_samples(data, images)
        ]
    items = [item for item in items if (item.captions if name == "captions" else item.answers)]
    if not items:
        raise DataError(f"{data} holds no {'captions' if name == 'captions' else 'questions with answers'}")
    rule = "vqa" if all(len(item.answers) >= 10 for item in items) else "exact"
    return Task(name, "captions" if name == "captions" else "questions", items, rule, str(data))
