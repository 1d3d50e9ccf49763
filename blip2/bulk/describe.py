"""What a model makes of a batch of images: captions or answers, with log-probabilities and matches where requested."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from blip2.bulk.database import Row
from blip2.bulk.run import DecodeImage, Describe
from blip2.imagefiles.workers import ImageWorkers
from blip2.images import MAX_PIXELS, ImageProcessor, ProcessedImage, load_image, process

if TYPE_CHECKING:
    from blip2.predict import Predictor

SMALL_MODEL = 10**8  # weights of linear layers


def make_captioner(
    load: Callable[[], Predictor],
    options: dict[str, Any],
    *,
    questions: Sequence[str] = (),
    score: bool = False,
    match: bool = False,
    keep_best: bool = False,
    abstain: float | None = None,
) -> Describe:
    """A function from images to the rows of their texts.

    Args:
        load: gives the model; called with the first images, so that the function can be sent to another machine.
        options: as `Predictor.caption` takes them, or `.ask` where there are questions.
        questions: all of them are answered about each image, which is encoded once.
        score: the rows hold the log-probability of the whole text too.
        match: the rows hold the probability that text and image fit (ITM), by the model's matcher.
        keep_best: of an image's texts only the one that fits best is kept.
        abstain: a caption whose probability of being right is below this is left out: its row has `abstained` instead.
            For calibrated models, whose captions' rows have that probability in any case.
    """
    options = {"num_return_sequences": 1} | options  # of each image a list of texts
    loaded: list[Predictor] = []

    def describe(decoded: Sequence[Image.Image]) -> list[list[Row]]:
        if not loaded:
            loaded.append(load())
        model, keywords = loaded[0], options | {"batch_size": len(decoded)}
        images = process(decoded, model.generator.image_processor)  # once, for the matcher too
        texts: list[tuple[str, list[Any]]]
        if questions:
            encoded = model.encode(images, batch_size=len(images))
            texts = [(question, model.ask(encoded, question, **keywords)) for question in questions]
        else:
            texts = [("", model.caption(images, **keywords))]
        return [
            rows(model, image, [(question, text) for question, lists in texts for text in lists[i]])
            for i, image in enumerate(images)
        ]

    def rows(model: Predictor, image: ProcessedImage, texts: list[tuple[str, Any]]) -> list[Row]:
        result: list[Row] = []
        written = [str(text) for _, text in texts]  # by the model: an empty one is compared too
        fits = model.matcher.match([image], written)[0] if match or keep_best else []
        for i, (question, text) in enumerate(texts):
            row: Row = {"question": question} if question else {}
            row |= {"answer" if questions else "caption": str(text), "score": text.score}
            if score:
                row["logprob"] = sum(text.token_logprobs)
            if fits:
                row["match"] = fits[i].probability
            if not questions and text.probability_right is not None:
                row["probability_right"] = text.probability_right
            result.append(row)
        if keep_best:
            result = [max(result, key=lambda row: float(row["match"]))]
        return result if abstain is None else [_without_doubtful(row, abstain) for row in result]

    return describe


def _without_doubtful(row: Row, least: float) -> Row:
    """A caption's row, without the caption where that is less likely to be right."""
    if row["probability_right"] >= least:
        return row
    return {name: value for name, value in row.items() if name != "caption"} | {"abstained": True}


@contextlib.contextmanager
def decoding(
    *image_processors: ImageProcessor, workers: int, max_pixels: int | None = None
) -> Iterator[DecodeImage]:
    """What decodes images and makes them as small as the models take them, which resize them to the same then.

    Args:
        image_processors: of all models that see the images; where they differ, images are left as they are.
        workers: processes that do it, bounded in time and memory, one image each at a time. They take a tenth of a
            second to start. 0: it is done in the threads of this process.
        max_pixels: as `load_image`.
    """
    sizes = {(processor.size, processor.resample) for processor in image_processors}
    resize = sizes.pop() if len(sizes) == 1 else None
    if not workers:
        yield partial(_decode_here, resize=resize, max_pixels=max_pixels or MAX_PIXELS)
        return
    with ImageWorkers(workers) as pool:
        yield partial(pool.load_image, resize=resize, max_pixels=max_pixels or MAX_PIXELS)


def _decode_here(content: bytes, resize: tuple[int, int] | None, max_pixels: int) -> Image.Image:
    image = load_image(content, max_pixels=max_pixels)
    return image if resize is None else image.resize((resize[0], resize[0]), Image.Resampling(resize[1]))


@contextlib.contextmanager
def parallel_batches(model: Predictor | None) -> Iterator[int]:
    """How many batches to compute at once: two where a small model leaves a CPU's cores idle, each with half of them.

    Most steps of a small model are too short to be shared between cores. None: one at a time.
    """
    threads = torch.get_num_threads()
    # Counted by the layers' shapes: quantized or packed weights are no parameters.
    modules = [] if model is None else [vars(module) for module in model.model.modules()]
    size = sum(layer["in_features"] * layer["out_features"] for layer in modules if "in_features" in layer)
    if model is None or model.device.type != "cpu" or threads < 2 or size >= SMALL_MODEL:
        yield 1
        return
    torch.set_num_threads(threads // 2)
    try:
        yield 2
    finally:
        torch.set_num_threads(threads)


def fingerprint(model: Predictor, *, matcher: bool = False) -> str:
    """What tells a model's weights from all others, as they were loaded; with `matcher`, those of its matcher too."""
    digests = [model.digest(), *([model.digest(matcher=True)] if matcher else [])]
    return " ".join(digest[:16] for digest in digests)
