"""Samples -> training batches, each a pure function of (seed, position), so that a killed run can be resumed.

Every epoch goes through all texts in an order of its own; an incomplete last batch is left out.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2.data.sources import DataError, Sample
from blip2.imagefiles.listing import ImageItem
from blip2.images import ImageError, ImageProcessor, load_image, normalized_pixels, random_resized_crop
from blip2.text import Tokenizer, clean_caption, clean_question, question_prompt

IGNORE_INDEX = -100  # label of a position that is no target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingExample:
    """An image and the texts (captions or answers) that are learned with it in one row of a batch."""

    sample: Sample
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ExampleBatch:
    """The examples of a batch and their pixels [B, 3, S, S]. damaged: images that were passed over for others."""

    examples: list[TrainingExample]
    pixels: Tensor
    damaged: list[str]

    def with_damaged(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """A batch for the model; with "damaged" where images were passed over, which `fit` counts."""
        return tensors | ({"damaged": self.damaged} if self.damaged else {})


class ExampleBatches:
    """Batches of examples with their images' pixels; the classes below add the token ids of each kind of model."""

    def __init__(
        self,
        samples: Sequence[Sample],
        image_processor: ImageProcessor,
        *,
        batch_size: int,
        seed: int,
        texts_per_image: int = 1,
        augment: bool = True,
    ) -> None:
        """
        Args:
            batch_size: images in a batch.
            texts_per_image: how many texts of an image share a row; 1, as published, gives each text a row.
            augment: random crop and flip; False: images as for evaluation.

        Raises:
            DataError: not enough texts for one batch.
        """
        self.image_processor, self.batch_size, self.seed = image_processor, batch_size, seed
        self.texts_per_image, self.augment = texts_per_image, augment
        self.examples = [
            TrainingExample(sample, texts[start : start + texts_per_image])
            for sample in samples
            for texts in (sample.captions if sample.question is None else sample.answers,)
            for start in range(0, len(texts), texts_per_image)
        ]
        if len(self.examples) < batch_size:
            raise DataError(
                f"{len(self.examples)} rows of texts do not fill a batch of {batch_size}; lower the batch size"
            )
        paths = dict.fromkeys(sample.image for sample in samples)
        self.image_ids = {path: number for number, path in enumerate(paths)}
        self._order: tuple[int, Any] = (-1, None)  # the current epoch and its permutation
        self._damaged: dict[Any, str] = {}  # images that could not be read, with the reason

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over all texts."""
        return len(self.examples) // self.batch_size

    def _row(self, position: int, row: int, damaged: list[str]) -> tuple[TrainingExample, Tensor]:
        """An example of a batch and its pixels [3, S, S], before any stem.

        An image that cannot be read is replaced by the next example's and noted in `damaged`.
        """
        epoch, batch = divmod(position, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.examples)))
        first = batch * self.batch_size + row
        for skipped in range(len(self.examples)):
            example = self.examples[self._order[1][(first + skipped) % len(self.examples)]]
            image = self._load(example.sample.image)
            if image is None:
                damaged.append(example.sample.image_name)
                continue
            if self.augment:
                rng = np.random.default_rng((self.seed, 1, position, row))
                image = random_resized_crop(image, self.image_processor.size, rng)
            return example, normalized_pixels([image], self.image_processor)[0]
        reason = self._damaged[example.sample.image]
        raise DataError(
            f"{len(self._damaged)} images in a row cannot be read, which are all; the last: {reason}"
        )

    def _load(self, source: Path | ImageItem) -> Image.Image | None:
        """An image, None where it cannot be read; that is reported and found out once."""
        if source in self._damaged:
            return None
        try:
            return load_image(source)
        except ImageError as error:
            log.warning("left out: %s", error)
            self._damaged[source] = str(error)
            return None

    def __getitem__(self, position: int) -> ExampleBatch:
        damaged: list[str] = []
        rows = [self._row(position, row, damaged) for row in range(self.batch_size)]
        # Where there are data processes, a stem runs there, beside training: forks share its weights, which nobody
        # writes to, and what comes back is a quarter of the size.
        pixels = self.image_processor.fold(torch.stack([pixels for _, pixels in rows])).cpu()
        return ExampleBatch([example for example, _ in rows], pixels, damaged)


class MatcherBatches:
    """Batches of stage 1: an image and one caption a row. The tokenizer is the Q-Former's (BERT's)."""

    def __init__(self, examples: ExampleBatches, tokenizer: Tokenizer, *, max_tokens: int = 32) -> None:
        """`max_tokens`: captions are cut to this many token ids, [CLS] and [SEP] included."""
        if (texts := examples.texts_per_image) != 1:
            raise DataError(f"matching takes one text a row, not {texts}; set texts_per_image to 1")
        self.examples, self.tokenizer, self.max_tokens = examples, tokenizer, max_tokens

    def __getitem__(self, position: int) -> dict[str, Any]:
        """pixels [B, 3, S, S]; ids and mask [B, T]; image_ids [B]; damaged as in `ExampleBatch`, if any."""
        batch = self.examples[position]
        captions = [clean_caption(example.texts[0]) for example in batch.examples]
        ids, mask = self.tokenizer.encode_batch(captions, pad="right", max_length=self.max_tokens)
        numbers = [self.examples.image_ids[example.sample.image] for example in batch.examples]
        tensors = {"pixels": batch.pixels, "ids": ids, "mask": mask, "image_ids": torch.tensor(numbers)}
        return batch.with_damaged(tensors)


class TextBatches(ABC):
    """Batches of captions and answers for a language model, one row a text, padded on the right."""

    def __init__(
        self, examples: ExampleBatches, tokenizer: Tokenizer, *, prompt: str = "", max_tokens: int = 32
    ) -> None:
        """
        Args:
            tokenizer: the language model's.
            prompt: what the language model reads with every image, before a caption.
            max_tokens: token ids after which inputs are cut off, and targets; OPT's are one sequence.
        """
        self.examples, self.tokenizer, self.prompt, self.max_tokens = examples, tokenizer, prompt, max_tokens

    def __getitem__(self, position: int) -> dict[str, Any]:
        """pixels [B, 3, S, S]; input_ids, attention_mask [R, T]; labels [R, L]; image_index [R]: each text's image;
        damaged as in `ExampleBatch`, if any."""
        batch = self.examples[position]
        rng = np.random.default_rng((self.examples.seed, 2, position))
        rows = [
            self.encode(example.sample, text, rng) for example in batch.examples for text in example.texts
        ]
        tensors = {
            "pixels": batch.pixels,
            "input_ids": _padded([ids for ids, _ in rows], self.tokenizer.pad_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": _padded([labels for _, labels in rows], IGNORE_INDEX),
            "image_index": torch.tensor(
                [i for i, example in enumerate(batch.examples) for _ in example.texts]
            ),
        }
        return batch.with_damaged(tensors)

    @abstractmethod
    def encode(self, sample: Sample, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """The input ids and the labels of a row."""


class DecoderBatches(TextBatches):
    """Batches of stage 2 and fine-tuning with OPT: captions after a prompt, answers after their question.

    Targets are the text and the newline that ends it, but not `</s>`, prompt and padding: labels are [R, T]. The space
    between prompt and text is added here.
    """

    def encode(self, sample: Sample, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        question = sample.question
        prompt = self.prompt.rstrip() if question is None else question_prompt(clean_question(question))
        prompt_ids = self.tokenizer.encode(prompt)  # with `</s>`
        target = f"{clean_caption(text)}\n"
        target_ids = self.tokenizer.encode(f" {target}" if prompt else target, frame=False)
        labels = [IGNORE_INDEX] * len(prompt_ids) + target_ids
        return (prompt_ids + target_ids)[: self.max_tokens], labels[: self.max_tokens]


class EncoderDecoderBatches(TextBatches):
    """The same with T5, whose encoder reads a prompt or a question; the decoder writes the caption or the answer.

    Targets are the text and the `</s>` that ends it.
    """

    def __init__(
        self,
        examples: ExampleBatches,
        tokenizer: Tokenizer,
        *,
        prompt: str = "",
        max_tokens: int = 32,
        split: bool = False,
    ) -> None:
        """`split`: split every caption at a random word: the words before it are read after the prompt, the rest is
        the target. This is how T5 is trained in stage 2 (section 3.2 of the paper). Others: see `TextBatches`.
        """
        super().__init__(examples, tokenizer, prompt=prompt, max_tokens=max_tokens)
        self.split = split

    def encode(self, sample: Sample, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        prompt, target = self.prompt, clean_caption(text)
        if sample.question is not None:
            prompt = question_prompt(clean_question(sample.question), short=True)
        elif self.split:
            words = target.split(" ")
            cut = int(rng.integers(len(words)))
            prompt, target = " ".join([self.prompt, *words[:cut]]).strip(), " ".join(words[cut:])
        input_ids, labels = (self.tokenizer.encode(t, max_length=self.max_tokens) for t in (prompt, target))
        return input_ids, labels


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """[R, T], T that of the longest row."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)
