"""From a model and a task to a report; all computing is done by `caption`, `ask`, `rank` and the matcher."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from blip2.data.sources import DataError, summary
from blip2.evaluate.answers import exact_match, gqa_accuracy, normalised_match, vqa_accuracy
from blip2.evaluate.captions import caption_scores
from blip2.evaluate.photos import flagged, names_one, photo_metrics, read_photos
from blip2.evaluate.protocols import PAPER_TASKS, PROTOCOLS, Protocol, published
from blip2.evaluate.retrieval import match_tables, ranks, recalls
from blip2.evaluate.scenes import LETTER_CASES, Scenes, counts_right, in_case, names_all, read_scenes
from blip2.evaluate.tasks import EvalItem, EvalTask, ImageFile, read_task, sound_items
from blip2.generation.options import GenerateKwargs
from blip2.imagefiles.decode import ImageError, load_image
from blip2.inputs import in_batches
from blip2.matching import Matcher
from blip2.predict import Predictor
from blip2.results import Caption, Ranked

_DAMAGED = "images that cannot be read, left out of the scores"

log = logging.getLogger(__name__)

T = TypeVar("T")
Metrics = dict[str, float | None]  # None: not defined for these items
Progress = Callable[[str, int, int], None]  # a label, how many are done, of how many


@dataclass(frozen=True)
class Outcome:
    """A model's text about an item and its scores. quality: the page shows the lowest first."""

    item: EvalItem
    text: str
    scores: Metrics
    quality: float
    ranked: tuple[Ranked, ...] = ()


Scored = tuple[Metrics, list[Outcome], list[str]]  # the parts of a report: metrics, outcomes, notes


@dataclass(frozen=True)
class Report:
    """The figures of a task (0..1; CIDEr 0..10), the published ones, and the outcome of every item.

    weights: what tells the weights of `model` from all others.
    metrics: None for a figure that is not defined for so few items; a note says why.
    damaged: images that cannot be read, left_out: rows that cannot be used, each with the reason. The figures are those
        of the other items.
    """

    task: str
    about: str
    model: str
    metrics: Metrics
    published: dict[str, float]
    protocol: Protocol
    outcomes: list[Outcome]
    notes: list[str]
    weights: str
    damaged: Sequence[str] = ()
    left_out: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How to evaluate.

    java: METEOR and SPICE too. answers: rank these instead of generating text. abstain: give no answer where the best
    of them is less probable.
    """

    protocol: str = "default"
    limit: int | None = None
    batch_size: int = 64
    java: bool = True
    answers: tuple[str, ...] = ()
    abstain: float = 0.0
    images: Path | None = None
    annotations: Path | None = None
    progress: Progress = lambda label, done, total: None


def evaluate(
    load: Callable[[], Predictor], name: str, data: Path | None, settings: EvalSettings, *, model_name: str
) -> list[Report]:
    """Evaluate a model on a task, or on both parts of "default".

    Args:
        load: returns the model; called after the data have been read.
        name: one of `names.TASK_NAMES`.
        model_name: for the report and the published figures.

    Raises:
        DataError: data are missing; the message says which, and where they belong.
        ValueError: a protocol that does not exist for the task, or a model that cannot do it.
    """
    for option, number in (("limit", settings.limit), ("batch size", settings.batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"the {option} must be 1 or more, got {number}")
    names = ("easyvqa", "scenes") if name == "default" else (name,)
    if settings.protocol == "paper" and (others := set(names) - set(PAPER_TASKS)):
        raise ValueError(f"protocol paper is for {', '.join(PAPER_TASKS)}; there is none for {min(others)}")
    tasks = [_read(task_name, data, settings) for task_name in names]
    for task in tasks:
        if settings.answers and (isinstance(task, Scenes) or task.kind != "questions"):
            raise ValueError("--answers is for tasks that are questions alone, such as easyvqa and vqav2")
        files = [item.image for item in task.items if isinstance(item.image, str | Path)]
        missing = [file for file in files if not Path(file).is_file()]
        if missing and not (isinstance(task, EvalTask) and task.own):  # no figure of a part is comparable
            raise DataError(
                f"{len(missing):,} of {len(task.items):,} images are missing, such as {missing[0]}"
            )
        if not task.items:
            reasons = summary("; left out", task.left_out) if isinstance(task, EvalTask) else ""
            raise DataError(f"eval {name}: the data hold nothing to score{reasons}")
    damaged = [_damaged(task.items, settings) for task in tasks]  # reported now, not after hours
    model = load()
    return [
        _report(model, *pair, settings, model_name=model_name) for pair in zip(tasks, damaged, strict=True)
    ]


def _damaged(items: Sequence[EvalItem], settings: EvalSettings) -> dict[ImageFile, str]:
    """The image files of items that cannot be read, with the reasons. DataError: all of them."""
    files = list(dict.fromkeys(item.image for item in items if isinstance(item.image, ImageFile)))

    def problem(file: ImageFile) -> str:
        try:
            load_image(file)
        except ImageError as error:
            return str(error)
        return ""

    damaged = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, (file, reason) in enumerate(zip(files, pool.map(problem, files), strict=True), 1):
            if reason:
                damaged[file] = reason
            settings.progress("checking images", done, len(files))
    if not sound_items(items, damaged):
        raise DataError(summary("images that cannot be read, and no others", list(damaged.values())))
    if damaged:
        log.warning("%s", summary(_DAMAGED, list(damaged.values())))
    return damaged


def _report(
    model: Predictor,
    task: EvalTask | Scenes,
    damaged: Mapping[ImageFile, str],
    settings: EvalSettings,
    *,
    model_name: str,
) -> Report:
    """The report of a task without the items whose images are damaged."""
    notes = [summary(_DAMAGED, list(damaged.values()))]
    if isinstance(task, Scenes):
        report = scenes_report(model, task.without(damaged), settings, model_name=model_name)
    else:
        report = task_report(model, task.without(damaged), settings, model_name=model_name)
        notes += [summary("rows that cannot be used, left out of the scores", report.left_out), *task.notes]
    notes = [*report.notes, *filter(None, notes)]
    return replace(report, notes=notes, damaged=list(damaged.values()))


def _read(name: str, data: Path | None, settings: EvalSettings) -> EvalTask | Scenes:
    """The first items of a task; raises DataError, also if a file is not in the published form."""
    try:
        if name == "scenes":
            return read_scenes(data).first(settings.limit)
        if name == "photos":
            return read_photos(data, settings.images).first(settings.limit)
        task = read_task(name, data, images=settings.images, annotations=settings.annotations)
        return task.first(settings.limit)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"eval {name}: a file of {data} is not in its published form ({reason})") from error


def task_report(model: Predictor, task: EvalTask, settings: EvalSettings, *, model_name: str) -> Report:
    """Evaluate a model on a task; raises ValueError if the model cannot do it."""
    protocol = PROTOCOLS[settings.protocol][task.kind]
    left_out = list(task.left_out)
    if task.kind == "retrieval":
        metrics, outcomes, notes = _retrieval(model.matcher, task.items, protocol, settings)
        pixels = model.matcher.image_processor.size
    else:
        if task.kind == "captions":
            metrics, outcomes, notes = _captions(model, task, protocol, settings)
        elif task.kind == "photos":
            metrics, outcomes, notes = _photos(model, task.items, protocol, settings)
        else:
            metrics, outcomes, notes = _questions(model, task, protocol, settings, left_out)
        pixels = model.generator.image_processor.size
    if protocol.image_px not in (None, pixels):
        notes.append(
            f"the published figures are of images of {protocol.image_px} px; this model reads {pixels}"
        )
    if settings.limit is not None:
        notes.append(f"the first {len(task.items)} of the set alone")
    figures = published(task.name, model_name) if settings.protocol == "paper" else {}
    weights = model.digest(matcher=task.kind == "retrieval")
    return Report(
        task.name,
        task.about,
        model_name,
        metrics,
        figures,
        protocol,
        outcomes,
        notes,
        weights,
        left_out=tuple(left_out),
    )


# --- captions ---


def write_captions(
    model: Predictor, items: Sequence[EvalItem], protocol: Protocol, settings: EvalSettings, label: str
) -> list[Caption]:
    """A caption for each item."""
    captions: list[Caption] = []
    for batch in _batches(items, settings, label):
        images = [item.image for item in batch]
        captions += model.caption(images, prompt=protocol.prompt, batch_size=len(batch), **protocol.options)
    return captions


def _captions(model: Predictor, task: EvalTask, protocol: Protocol, settings: EvalSettings) -> Scored:
    items = task.items
    captions = write_captions(model, items, protocol, settings, "captions")
    scores = caption_scores([item.captions for item in items], captions, java=settings.java)
    metrics, notes = dict(scores.total), list(scores.left_out)
    for kind in sorted({item.kind for item in items} - {""}):
        # A domain is a set of its own: its CIDEr weighs words by its own references.
        pairs = [(item, text) for item, text in zip(items, captions, strict=True) if item.kind == kind]
        domain = caption_scores([item.captions for item, _ in pairs], [text for _, text in pairs])
        metrics[f"CIDEr {kind}"] = domain.total["CIDEr"]
        notes += [f"{kind}: {note}" for note in domain.left_out if note.startswith("CIDEr")]
    rank_by = "ROUGE-L" if scores.total["CIDEr"] is None else "CIDEr"
    outcomes = [
        Outcome(item, text, row, row[rank_by] or 0.0)
        for item, text, row in zip(items, captions, scores.per_image, strict=True)
    ]
    return metrics, outcomes, notes


# --- photographs ---


def _photos(
    model: Predictor, items: Sequence[EvalItem], protocol: Protocol, settings: EvalSettings
) -> Scored:
    captions = write_captions(model, items, protocol, settings, "photographs")
    named = [names_one(text, item.names) for item, text in zip(items, captions, strict=True)]
    flags = [flagged(text) for text in captions]
    outcomes = []
    for item, text, right, flag in zip(items, captions, named, flags, strict=True):
        scores: Metrics = {"named": float(right)}
        if flag is not None:
            scores["flagged"] = float(flag)
        outcomes.append(Outcome(item, text, scores, float(right)))
    metrics = photo_metrics(items, named, flags)
    some = any(value is None for value in metrics.values())
    return metrics, outcomes, ["a share of no captions is not defined"] if some else []


# --- questions ---

RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": vqa_accuracy,
    "gqa": lambda answer, right: gqa_accuracy(answer, right[0]),
    "normalised": normalised_match,
    "exact": exact_match,
}


def _questions(
    model: Predictor, task: EvalTask, protocol: Protocol, settings: EvalSettings, left_out: list[str]
) -> Scored:
    """Questions that this model cannot be asked, such as one that is too long, are noted in `left_out`."""

    def answer(batch: Sequence[EvalItem]) -> list[tuple[EvalItem, str, Sequence[Ranked]]]:
        try:
            if not settings.answers:
                texts = answer_questions(model, batch, protocol.options)
                return [(item, text, ()) for item, text in zip(batch, texts, strict=True)]
            images, questions = [item.image for item in batch], [item.question for item in batch]
            ranked = model.rank(images, questions, settings.answers, batch_size=min(8, settings.batch_size))
        except ValueError as error:
            if len(batch) > 1:
                return [row for item in batch for row in answer([item])]
            if len(task.items) == 1:
                raise
            left_out.append(f"{batch[0].id}: {error}")
            return []
        texts = [best.answer if best.probability >= settings.abstain else "" for best, *_ in ranked]
        return list(zip(batch, texts, ranked, strict=True))

    outcomes: list[Outcome] = []
    for batch in _batches(task.items, settings, "questions"):
        for item, text, ranked in answer(batch):
            score = RULES[task.rule](text, item.answers)
            scores: Metrics = {"accuracy": score}
            if ranked:
                scores["probability"] = ranked[0].probability
            outcomes.append(Outcome(item, text, scores, score, tuple(ranked[:5])))
    if task.items and not outcomes:
        raise DataError(summary("questions that cannot be asked, and no others", left_out))
    notes = [f"each answer is chosen among {len(settings.answers)}"] if settings.answers else []
    metrics = _by_kind("accuracy", outcomes)
    if settings.answers and settings.abstain > 0:
        answered = [o.quality for o in outcomes if o.text]
        metrics["answered"] = len(answered) / len(outcomes)
        metrics["accuracy where answered"] = _mean(answered)
        notes.append(f"no answer below a probability of {settings.abstain}")
    return metrics, outcomes, notes


def answer_questions(model: Predictor, items: Sequence[EvalItem], options: GenerateKwargs) -> list[str]:
    """An answer to the question of each item; an image file in several items is encoded once."""
    keys = [item.image if isinstance(item.image, ImageFile) else id(item.image) for item in items]
    images = {key: item.image for key, item in zip(keys, items, strict=True)}
    encoded = dict(zip(images, model.encode(list(images.values()), batch_size=len(images)), strict=True))
    questions = [item.question for item in items]
    answers = model.ask([encoded[key] for key in keys], questions, batch_size=len(items), **options)
    return [str(answer) for answer in answers]


def _by_kind(name: str, outcomes: Sequence[Outcome], part: str = "  of which") -> Metrics:
    """The mean accuracy of all outcomes, and of each kind if there are several."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.item.kind].append(outcome.quality)
    parts = {f"{part} {kind}": _mean(scores) for kind, scores in kinds.items() if len(kinds) > 1}
    return {name: _mean([outcome.quality for outcome in outcomes])} | parts


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- retrieval ---


def _retrieval(
    matcher: Matcher, items: Sequence[EvalItem], protocol: Protocol, settings: EvalSettings
) -> Scored:
    pairs = [(image, text) for image, item in enumerate(items) for text in item.captions]
    if not pairs:
        raise ValueError("there are no images with captions")
    texts, image_of_text = [text for _, text in pairs], [[image] for image, _ in pairs]
    texts_of_image: list[list[int]] = [[] for _ in items]
    for text, (image, _) in enumerate(pairs):
        texts_of_image[image].append(text)
    parts = (matcher.model, matcher.image_processor, matcher.tokenizer, matcher.device)
    contrast, ranked_texts, ranked_images = match_tables(
        Matcher(*parts, text_length=protocol.text_length),
        [item.image for item in items],
        texts,
        candidates=protocol.candidates,
        logits=protocol.logits,
        batch_size=settings.batch_size,
        progress=settings.progress,
    )
    metrics: Metrics = {
        f"text {name}": value for name, value in recalls(ranked_texts, texts_of_image).items()
    }
    metrics |= {f"image {name}": value for name, value in recalls(ranked_images, image_of_text).items()}
    metrics |= {
        "  text R@1 by contrast alone": recalls(contrast, texts_of_image, (1,))["R@1"],
        "  image R@1 by contrast alone": recalls(contrast.T, image_of_text, (1,))["R@1"],
    }
    outcomes = [
        Outcome(item, texts[int(row.argmax())], {"rank": float(rank + 1)}, -float(rank))
        for item, row, rank in zip(items, ranked_texts, ranks(ranked_texts, texts_of_image), strict=True)
    ]
    some = any(value is None for value in metrics.values())
    about = f"R@k is not defined where there are no more than k to choose from: {len(texts)} texts, {len(items)} images"
    return metrics, outcomes, [about] if some else []


# --- the default model's scenes ---


def scenes_report(model: Predictor, scenes: Scenes, settings: EvalSettings, *, model_name: str) -> Report:
    """The default model's table except easy-VQA: things named, questions, retrieval."""
    protocols = PROTOCOLS["default"]
    notes: list[str] = []

    def describe(items: Sequence[EvalItem], label: str) -> list[Outcome]:
        captions = write_captions(model, items, protocols["captions"], settings, label)
        outcomes: list[Outcome] = []
        for item, text in zip(items, captions, strict=True):
            named = names_all(text, item.things, scenes.nouns)
            counted = counts_right(text, item.things, scenes.nouns)
            outcomes.append(Outcome(item, text, {"named": named, "numbers": counted}, named + counted))
        return outcomes

    singles, multi = describe(scenes.singles, "stamps"), describe(scenes.multi, "scenes")
    metrics: Metrics = {
        "one stamp on an unseen background, named": _mean([o.scores["named"] or 0.0 for o in singles]),
        "scenes of 2-4 objects, every object named": _mean([o.scores["named"] or 0.0 for o in multi]),
        "scenes of 2-4 objects, names and numbers right": _mean([o.scores["numbers"] or 0.0 for o in multi]),
    }
    try:
        scores = caption_scores([item.captions for item in scenes.multi], [o.text for o in multi])
        metrics["scenes of 2-4 objects, CIDEr"] = scores.total["CIDEr"]
        notes += [note for note in scores.left_out if note.startswith("CIDEr")]
    except ValueError as error:
        notes.append(f"CIDEr is left out: {error}")
    questions = EvalTask("scenes", "questions", scenes.questions)
    longer = replace(protocols["questions"], options={**protocols["questions"].options, "max_new_tokens": 12})
    _, answers, _ = _questions(model, questions, longer, settings, [])
    metrics |= _by_kind("unseen questions, exact match", answers)
    if scenes.natural:
        natural, answered = _natural_questions(model, scenes, longer, settings)
        metrics |= natural
        answers += answered
    try:
        table, _, few = _retrieval(model.matcher, scenes.retrieval, protocols["retrieval"], settings)
        notes += few
        for kind in ("text", "image"):
            metrics[f"{kind} retrieval among {len(scenes.retrieval):,}, R@1"] = table[f"{kind} R@1"]
        for kind in ("text", "image"):
            metrics[f"  {kind} retrieval by contrast alone"] = table[f"  {kind} R@1 by contrast alone"]
    except ValueError as error:  # a model without a matcher
        notes.append(f"retrieval is left out: {error}")
    if settings.limit is not None:
        notes.append(f"the first {settings.limit} of each set alone")
    protocol, outcomes = protocols["captions"], singles + multi + answers
    about = "composed scenes"
    return Report("scenes", about, model_name, metrics, {}, protocol, outcomes, notes, model.digest())


def _natural_questions(
    model: Predictor, scenes: Scenes, protocol: Protocol, settings: EvalSettings
) -> tuple[Metrics, list[Outcome]]:
    """Questions as people ask them; and whether the letter case changes the answer.

    A description is right if it names everything. Each question is also asked in the other letter cases: the answers
    that differ from that in lower case are counted.
    """
    asked = [
        replace(item, question=in_case(item.question.lower(), case))
        for item in scenes.natural
        for case in LETTER_CASES
    ]
    options: GenerateKwargs = {**protocol.options, "max_new_tokens": 30}  # for descriptions
    texts: list[str] = []
    for batch in _batches(asked, settings, "natural questions"):
        texts += answer_questions(model, batch, options)
    answers = {(item.id, item.question): text for item, text in zip(asked, texts, strict=True)}
    outcomes, changed = [], []
    for i, item in enumerate(scenes.natural):
        text = answers[item.id, item.question]
        right = (
            normalised_match(text, item.answers)
            if item.answers
            else names_all(text, item.things, scenes.nouns)
        )
        outcomes.append(Outcome(item, text, {"accuracy": right}, right))
        lower, *others = texts[i * len(LETTER_CASES) : (i + 1) * len(LETTER_CASES)]
        changed += [float(other != lower) for other in others]
    kinds = _by_kind("questions, natural wordings", outcomes, "  of which natural")
    return kinds | {"answers that change with letter case": _mean(changed)}, outcomes


def _batches(items: Sequence[T], settings: EvalSettings, label: str) -> Iterator[Sequence[T]]:
    for start, batch in in_batches(items, settings.batch_size):
        yield batch
        settings.progress(label, start + len(batch), len(items))
