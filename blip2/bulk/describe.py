"""What a model says about a batch of images in a bulk run: captions or answers, scored and matched as asked."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from blip2.bulk.journal import Row
from blip2.bulk.run import Describe, Prepare

if TYPE_CHECKING:
    from blip2.predict import Predictor


SMALL = 10**8  # weights of linear layers


def describer(
    load: Callable[[], Predictor],
    options: dict[str, Any],
    *,
    questions: Sequence[str] = (),
    prefix: str = "",
    suffix: str = "",
    score: bool = False,
    match: bool = False,
    keep_best: bool = False,
) -> Describe:
    """A function from images to the rows of their texts.

    Args:
        load: gives the model; called when the first images are there, so that the function can travel without it.
        options: as `Predictor.caption` takes them, or `.ask` where there are questions.
        questions: all are asked about each image, which is read once.
        prefix, suffix: stand around each text.
        score: the rows hold the log-probability of the whole text too.
        match: the rows hold the probability that text and image fit (ITM), by the model's matcher.
        keep_best: of an image's texts only the one that fits best is kept.
    """

    loaded: list[Predictor] = []

    def describe(images: Sequence[Image.Image]) -> list[list[Row]]:
        if not loaded:
            loaded.append(load())
        model, size = loaded[0], len(images)
        if questions:
            encoded = model.encode(list(images), batch_size=size)
            answers = [(q, model.ask(encoded, q, batch_size=size, **options)) for q in questions]
            said = [
                [("answer", q, text) for q, found in answers for text in _listed(found[i])]
                for i in range(size)
            ]
        else:
            captions = model.caption(list(images), batch_size=size, **options)
            said = [[("caption", "", text) for text in _listed(found)] for found in captions]
        return [rows(model, image, texts) for image, texts in zip(images, said, strict=True)]

    def rows(model: Predictor, image: Image.Image, said: list[tuple[str, str, Any]]) -> list[Row]:
        out: list[Row] = []
        fits = model.match(image, [str(text) for _, _, text in said]) if match or keep_best else []
        for i, (kind, question, text) in enumerate(said):
            row: Row = {"question": question} if question else {}
            row |= {kind: f"{prefix}{text}{suffix}", "score": text.score}
            if score:
                row["logprob"] = sum(text.token_logprobs)
            if fits:
                row["match"] = fits[i].probability
            out.append(row)
        return [max(out, key=lambda row: float(row["match"]))] if keep_best else out

    return describe


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def shrinker(model: Predictor, *, match: bool) -> Prepare:
    """Makes waiting images as small as the model takes them; resizing to the same size again changes nothing."""
    image_processor = model.generator.image_processor
    if match and (model.matcher.image_processor.size, model.matcher.image_processor.resample) != (
        image_processor.size,
        image_processor.resample,
    ):
        return lambda image: image
    size, resample = (image_processor.size, image_processor.size), Image.Resampling(image_processor.resample)
    return lambda image: image.resize(size, resample)


@contextlib.contextmanager
def side_by_side(model: Predictor) -> Iterator[int]:
    """How many batches to describe at once: two where a small model leaves a CPU's cores idle, each with half of them.

    One at a time, most of a small model's steps are too short to be shared between cores.
    """
    threads = torch.get_num_threads()
    # by their shapes: weights that are rounded or laid out are no parameters
    linear = [held for part in model.model.modules() if "in_features" in (held := vars(part))]
    small = sum(held["in_features"] * held["out_features"] for held in linear) < SMALL
    if model.device.type != "cpu" or threads < 2 or not small:
        yield 1
        return
    torch.set_num_threads(threads // 2)
    try:
        yield 2
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def fingerprint(model: Predictor) -> str:
    """Tells models apart that go by one name: a digest of every tensor's name, shape and first values."""
    digest = hashlib.sha256()
    lines: dict[str, str] = {}
    # module by module: of a weight that is laid out this makes a copy
    for above, part in model.model.named_modules():
        own: dict[str, Tensor] = {}
        part._save_to_state_dict(own, f"{above}." if above else "", keep_vars=False)
        for name, tensor in own.items():
            lines[name] = f"{name} {tuple(tensor.shape)} {tensor.flatten()[:16].tolist()}\n"
    for _, line in sorted(lines.items()):
        digest.update(line.encode())
    return digest.hexdigest()[:16]
