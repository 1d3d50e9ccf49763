"""From a model and a task to a report: everything goes through `caption`, `ask`, `rank` and the matcher."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blip2.data import DataError
from blip2.evaluate.answers import exact_match, gqa_accuracy, vqa_accuracy
from blip2.evaluate.captions import caption_scores
from blip2.evaluate.protocols import PAPER_TASKS, PROTOCOLS, Protocol, published
from blip2.evaluate.retrieval import match_tables, ranks, recalls
from blip2.evaluate.scenes import Scenes, counts_right, names_all, read_scenes
from blip2.evaluate.tasks import Item, Task, read_task
from blip2.matching import Matcher
from blip2.predict import Predictor
from blip2.results import Ranked

BATCH = 64
T = TypeVar("T")
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Outcome:
    """What a model said about an item, and how right it was; worst: what the pages are sorted by."""

    item: Item
    said: str
    scores: dict[str, float]
    worst: float
    ranked: tuple[Ranked, ...] = ()


@dataclass(frozen=True)
class Report:
    """The figures of a task (0..1; CIDEr 0..10; counts as they are), the published ones, and all that was said."""

    task: str
    about: str
    model: str
    metrics: dict[str, float]
    published: dict[str, float]
    protocol: Protocol
    outcomes: list[Outcome]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate. answers: rank these in place of writing; below `abstain` the best one is not given."""

    protocol: str = "default"
    limit: int | None = None
    batch_size: int = BATCH
    java: bool = True
    answers: tuple[str, ...] = ()
    abstain: float = 0.0
    images: Path | None = None
    annotations: Path | None = None
    progress: Progress = silent


def evaluate(
    load: Callable[[], Predictor], name: str, data: Path | None, settings: Settings, *, called: str
) -> list[Report]:
    """Evaluate a model on a task, or on both parts of "default".

    Args:
        load: gives the model; called once the data are found.
        name: one of `tasks.NAMES`.
        called: the model's name, for the report and the published figures.

    Raises:
        DataError: data are missing; the message says which, and where they belong.
        ValueError: a protocol the task does not have, or a model that cannot do it.
    """
    for what, number in (("limit", settings.limit), ("batch size", settings.batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"the {what} must be 1 or more, got {number}")
    parts = ("easyvqa", "scenes") if name == "default" else (name,)
    for part in parts:
        if settings.protocol == "paper" and part not in PAPER_TASKS:
            raise ValueError(f"protocol paper is that of {', '.join(PAPER_TASKS)}; there is none for {part}")
    read = [_read(part, data, settings) for part in parts]
    for each in read:
        if settings.answers and (isinstance(each, Scenes) or each.kind != "questions"):
            raise ValueError("--answers is for tasks that are questions alone, such as easyvqa and vqav2")
        _need_images(
            [item for part in each.sets for item in part] if isinstance(each, Scenes) else each.items
        )
    model = load()
    return [
        scenes_report(model, each, settings, called=called)
        if isinstance(each, Scenes)
        else task_report(model, each, settings, called=called)
        for each in read
    ]


def _read(name: str, data: Path | None, settings: Settings) -> Task | Scenes:
    """The first items of a part; raises DataError, also where a file is not of the published form."""
    try:
        if name == "scenes":
            return read_scenes(data).first(settings.limit)
        task = read_task(name, data, images=settings.images, annotations=settings.annotations)
        return task.first(settings.limit)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"eval {name}: a file of {data} has not the form it was published in ({told})"
        ) from error


def _need_images(items: Sequence[Item]) -> None:
    """Raises DataError where files are missing: at the beginning, and not after hours."""
    missing = [
        item.image for item in items if isinstance(item.image, str | Path) and not Path(item.image).is_file()
    ]
    if missing:
        raise DataError(f"{len(missing):,} of {len(items):,} images are missing, such as {missing[0]}")


def task_report(model: Predictor, task: Task, settings: Settings, *, called: str) -> Report:
    """Evaluate a model on a set; raises ValueError where the model cannot do it."""
    protocol = PROTOCOLS[settings.protocol][task.kind]
    if task.kind == "retrieval":
        metrics, outcomes, notes = _retrieval(model.matcher, task.items, protocol, settings)
        pixels = model.matcher.image_processor.size
    else:
        work = _captions if task.kind == "captions" else _questions
        metrics, outcomes, notes = work(model, task, protocol, settings)
        pixels = model.generator.image_processor.size
    if protocol.image_px not in (None, pixels):
        notes.append(
            f"the published figures are of images of {protocol.image_px} px; this model reads {pixels}"
        )
    if settings.limit is not None:
        notes.append(f"the first {len(task.items)} of the set alone")
    told = published(task.name, called) if settings.protocol == "paper" else {}
    return Report(task.name, task.about, called, metrics, told, protocol, outcomes, notes)


# --- captions ---


def say(
    model: Predictor, items: Sequence[Item], protocol: Protocol, settings: Settings, what: str
) -> list[str]:
    """A caption for each item."""
    said: list[str] = []
    for batch in _batches(items, settings, what):
        said += map(
            str,
            model.caption(
                [item.image for item in batch],
                prompt=protocol.prompt,
                num_beams=protocol.num_beams,
                max_new_tokens=protocol.max_new_tokens,
                min_new_tokens=protocol.min_new_tokens,
                length_penalty=protocol.length_penalty,
                repetition_penalty=protocol.repetition_penalty,
                batch_size=len(batch),
            ),
        )
    return said


def _captions(
    model: Predictor, task: Task, protocol: Protocol, settings: Settings
) -> tuple[dict[str, float], list[Outcome], list[str]]:
    items = task.items
    said = say(model, items, protocol, settings, "captions")
    found = caption_scores([item.captions for item in items], said, java=settings.java)
    metrics = dict(found.total)
    for kind in sorted({item.kind for item in items} - {""}):
        # A domain is a set of its own: its CIDEr weighs words by its own references.
        part = [(item, text) for item, text in zip(items, said, strict=True) if item.kind == kind]
        scores = caption_scores([item.captions for item, _ in part], [text for _, text in part])
        metrics[f"CIDEr {kind}"] = scores.total["CIDEr"]
    outcomes = [
        Outcome(item, text, scores, scores["CIDEr"])
        for item, text, scores in zip(items, said, found.each, strict=True)
    ]
    return metrics, outcomes, found.left_out


# --- questions ---

RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": vqa_accuracy,
    "gqa": lambda said, right: gqa_accuracy(said, right[0]),
    "exact": exact_match,
}


def _questions(
    model: Predictor, task: Task, protocol: Protocol, settings: Settings
) -> tuple[dict[str, float], list[Outcome], list[str]]:
    outcomes: list[Outcome] = []
    for batch in _batches(task.items, settings, "questions"):
        images, asked = [item.image for item in batch], [item.question for item in batch]
        ranked: list[tuple[Ranked, ...]] = [()] * len(batch)
        if settings.answers:
            found = model.rank(images, asked, settings.answers, batch_size=min(8, settings.batch_size))
            ranked = [tuple(each) for each in found]
            said = [each[0].answer if each[0].probability >= settings.abstain else "" for each in ranked]
        else:
            said = ask(model, images, asked, protocol)
        for item, text, each in zip(batch, said, ranked, strict=True):
            score = RULES[task.rule](text, item.answers)
            scores = {"accuracy": score} | ({"probability": each[0].probability} if each else {})
            outcomes.append(Outcome(item, text, scores, score, each[:5]))
    notes = [f"each answer is chosen among {len(settings.answers)}"] if settings.answers else []
    metrics = _by_kind("accuracy", [(o.item.kind, o.scores["accuracy"]) for o in outcomes])
    if settings.answers and settings.abstain > 0:
        given = [o.scores["accuracy"] for o in outcomes if o.said]
        metrics["answered"] = len(given) / len(outcomes)
        metrics["accuracy where answered"] = _mean(given)
        notes.append(f"no answer below a probability of {settings.abstain}")
    return metrics, outcomes, notes


def ask(model: Predictor, images: Sequence[Any], questions: Sequence[str], protocol: Protocol) -> list[str]:
    """An answer to each question about its image; an image that is a file is read once, however often it comes."""
    keys = [image if isinstance(image, str | Path) else id(image) for image in images]
    distinct = dict(zip(keys, images, strict=True))
    encoded = dict(
        zip(distinct, model.encode([*distinct.values()], batch_size=max(1, len(distinct))), strict=True)
    )
    answers = model.ask(
        [encoded[key] for key in keys],
        list(questions),
        num_beams=protocol.num_beams,
        max_new_tokens=protocol.max_new_tokens,
        min_new_tokens=protocol.min_new_tokens,
        length_penalty=protocol.length_penalty,
        repetition_penalty=protocol.repetition_penalty,
        batch_size=max(1, len(images)),
    )
    return [str(answer) for answer in answers]


def _by_kind(name: str, scores: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The mean of all, and of each kind where there are several."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for kind, score in scores:
        kinds[kind].append(score)
    parts = {f"  of which {kind}": _mean(each) for kind, each in kinds.items() if len(kinds) > 1}
    return {name: _mean([score for _, score in scores])} | parts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# --- retrieval ---


def _retrieval(
    matcher: Matcher, items: Sequence[Item], protocol: Protocol, settings: Settings
) -> tuple[dict[str, float], list[Outcome], list[str]]:
    texts = [text for item in items for text in item.captions]
    owner = [i for i, item in enumerate(items) for _ in item.captions]
    own: list[list[int]] = [[] for _ in items]
    for text, image in enumerate(owner):
        own[image].append(text)
    cut = Matcher(
        matcher.model,
        matcher.image_processor,
        matcher.tokenizer,
        matcher.device,
        text_length=protocol.text_length,
    )
    tables = match_tables(
        cut,
        [item.image for item in items],
        texts,
        candidates=protocol.candidates,
        logits=protocol.logits,
        batch_size=settings.batch_size,
        progress=settings.progress,
    )
    of_texts = [[image] for image in owner]
    metrics = {f"text {name}": value for name, value in recalls(tables.texts, own).items()}
    metrics |= {f"image {name}": value for name, value in recalls(tables.images, of_texts).items()}
    metrics |= {
        "  text R@1 by contrast alone": recalls(tables.contrast, own, (1,))["R@1"],
        "  image R@1 by contrast alone": recalls(tables.contrast.T, of_texts, (1,))["R@1"],
    }
    outcomes = [
        Outcome(item, texts[int(row.argmax())], {"place": float(place + 1)}, -float(place))
        for item, row, place in zip(items, tables.texts, ranks(tables.texts, own), strict=True)
    ]
    return metrics, outcomes, []


# --- the default model's scenes ---


def scenes_report(model: Predictor, scenes: Scenes, settings: Settings, *, called: str) -> Report:
    """The default model's table but for easy-VQA: things named, questions, retrieval."""
    captions, questions = PROTOCOLS["default"]["captions"], PROTOCOLS["default"]["questions"]
    outcomes: list[Outcome] = []
    metrics: dict[str, float] = {}

    def describe(items: Sequence[Item], what: str) -> list[str]:
        said = say(model, items, captions, settings, what)
        for item, text in zip(items, said, strict=True):
            scores = {
                "named": names_all(text, item.things, scenes.nouns),
                "numbers": counts_right(text, item.things, scenes.nouns),
            }
            outcomes.append(Outcome(item, text, scores, scores["named"] + scores["numbers"]))
        return said

    describe(scenes.singles, "stamps")
    metrics["one stamp on an unseen background, named"] = _mean([o.scores["named"] for o in outcomes])
    said = describe(scenes.multi, "scenes")
    several = outcomes[len(scenes.singles) :]
    metrics["scenes of 2-4 objects, every object named"] = _mean([o.scores["named"] for o in several])
    metrics["scenes of 2-4 objects, names and numbers right"] = _mean([o.scores["numbers"] for o in several])
    notes = []
    try:
        found = caption_scores([item.captions for item in scenes.multi], said)
        metrics["scenes of 2-4 objects, CIDEr"] = found.total["CIDEr"]
    except ValueError as error:
        notes.append(f"CIDEr is left out: {error}")
    longer = dataclasses.replace(questions, max_new_tokens=12)
    right: list[tuple[str, float]] = []
    for batch in _batches(scenes.questions, settings, "questions"):
        answers = ask(model, [item.image for item in batch], [item.question for item in batch], longer)
        for item, text in zip(batch, answers, strict=True):
            score = exact_match(text, item.answers)
            right.append((item.kind, score))
            outcomes.append(Outcome(item, text, {"accuracy": score}, score))
    metrics |= _by_kind("unseen questions, exact match", right)
    retrieval = PROTOCOLS["default"]["retrieval"]
    try:
        table, _, _ = _retrieval(model.matcher, scenes.retrieval, retrieval, settings)
        for kind in ("text", "image"):
            metrics[f"{kind} retrieval among {len(scenes.retrieval):,}, R@1"] = table[f"{kind} R@1"]
        for kind in ("text", "image"):
            metrics[f"  {kind} retrieval by contrast alone"] = table[f"  {kind} R@1 by contrast alone"]
    except ValueError as error:  # a model without a matcher
        notes.append(f"retrieval is left out: {error}")
    if settings.limit is not None:
        notes.append(f"the first {settings.limit} of each set alone")
    return Report("scenes", "composed scenes", called, metrics, {}, captions, outcomes, notes)


def _batches(items: Sequence[T], settings: Settings, what: str) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), settings.batch_size):
        yield items[start : start + settings.batch_size]
        settings.progress(what, min(start + settings.batch_size, len(items)), len(items))
