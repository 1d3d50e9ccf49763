"""Samples -> training batches, each a pure function of (seed, position): what lets training go on after a kill.

Every epoch goes through all texts in an order of its own; what does not fill a batch at its end is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.data.sources import DataError, Sample
from blip2.images import ImageError, ImageProcessor, load_image, random_resized_crop, to_pixels
from blip2.text import Tokenizer, clean_caption, clean_question, question_prompt

IGNORE_INDEX = -100  # label of a position that is no target
MAX_BROKEN = 20  # unreadable images in a row before giving up

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """An image and the texts (captions or answers) that are learned with it in one row of a batch."""

    sample: Sample
    texts: tuple[str, ...]


class Rows:
    """What all kinds of batches share: the order of the items, and reading their images."""

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
            texts_per_image: so many texts of an image share a row; 1, as published, gives each text a row.
            augment: random crop and flip; False: images as for evaluation.

        Raises:
            DataError: not enough texts for one batch.
        """
        self.samples, self.image_processor = samples, image_processor
        self.batch_size, self.seed, self.texts_per_image, self.augment = (
            batch_size,
            seed,
            texts_per_image,
            augment,
        )
        self.items = [
            Item(sample, texts[start : start + texts_per_image])
            for sample in samples
            for texts in (sample.captions if sample.question is None else sample.answers,)
            for start in range(0, len(texts), texts_per_image)
        ]
        if len(self.items) < batch_size:
            raise DataError(
                f"{len(self.items)} rows of texts do not fill a batch of {batch_size}; lower the batch size"
            )
        self.image_ids = {
            path: number for number, path in enumerate(dict.fromkeys(sample.image for sample in samples))
        }
        self._order: tuple[int, Any] = (-1, None)  # the epoch at hand and its permutation

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over all texts."""
        return len(self.items) // self.batch_size

    def _row(self, position: int, row: int) -> tuple[Item, Tensor]:
        """An item of a batch and its pixels [3, S, S]; an unreadable image gives way to the next item."""
        epoch, batch = divmod(position, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.items)))
        place = batch * self.batch_size + row
        for skipped in range(MAX_BROKEN):
            item = self.items[self._order[1][(place + skipped) % len(self.items)]]
            try:
                image = load_image(item.sample.image)
            except ImageError as error:
                log.warning("left out: %s", error)
                continue
            if self.augment:
                rng = np.random.default_rng((self.seed, 1, position, row))
                image = random_resized_crop(image, self.image_processor.size, rng)
            return item, to_pixels([image], self.image_processor)[0]
        raise DataError(f"{MAX_BROKEN} images in a row cannot be read, the last: {item.sample.image}")

    def __getitem__(self, position: int) -> tuple[list[Item], Tensor]:
        """The items of a batch and their pixels [B, 3, S, S]."""
        pairs = [self._row(position, row) for row in range(self.batch_size)]
        return [item for item, _ in pairs], torch.stack([pixels for _, pixels in pairs])


class MatchingBatches:
    """Stage 1's batches: an image and one caption a row. The tokenizer is the Q-Former's (BERT's)."""

    def __init__(self, rows: Rows, tokenizer: Tokenizer, *, max_tokens: int = 32) -> None:
        """`max_tokens`: captions are cut to this many token ids, [CLS] and [SEP] included."""
        if rows.texts_per_image != 1:
            raise DataError(
                f"matching takes one text a row, not {rows.texts_per_image}; set texts_per_image to 1"
            )
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """pixels [B, 3, S, S]; ids and mask [B, T]; image_ids [B]."""
        items, pixels = self.rows[position]
        captions = [clean_caption(item.texts[0]) for item in items]
        ids, mask = self.tokenizer.encode_batch(captions, pad="right", max_length=self.max_tokens)
        image_ids = torch.tensor([self.rows.image_ids[item.sample.image] for item in items])
        return {"pixels": pixels, "ids": ids, "mask": mask, "image_ids": image_ids}


class WritingBatches:
    """Batches of stage 2 and fine-tuning with OPT: captions after a prompt, answers after their question.

    Targets are the text and the newline that ends it; `</s>`, the prompt and padding are none.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, *, prompt: str = "", max_tokens: int = 32) -> None:
        """
        Args:
            tokenizer: the language model's.
            prompt: stands before every caption; a space between them is added here.
            max_tokens: prompt and text are cut to this many token ids.
        """
        self.rows, self.tokenizer, self.prompt, self.max_tokens = rows, tokenizer, prompt.rstrip(), max_tokens

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """pixels [B, 3, S, S]; input_ids, attention_mask, labels [R, T]; image_index [R]: the image of each text."""
        items, pixels = self.rows[position]
        texts = [self.encode(item.sample, text) for item in items for text in item.texts]
        labels = [[IGNORE_INDEX] * prompt + ids[prompt:] for ids, prompt in texts]
        return _writing_batch(items, pixels, [ids for ids, _ in texts], labels, self.tokenizer.pad_id)

    def encode(self, sample: Sample, text: str) -> tuple[list[int], int]:
        """Token ids of prompt and text, and how many of them are prompt."""
        prompt = self.prompt if sample.question is None else question_prompt(clean_question(sample.question))
        before = self.tokenizer.encode(prompt)  # with `</s>`
        written = f"{clean_caption(text)}\n"
        after = self.tokenizer.encode(f" {written}" if prompt else written, frame=False)
        return (before + after)[: self.max_tokens], len(before)


class ReadingBatches:
    """The same with T5, which reads a prompt or a question and writes the caption or the answer.

    Targets are the text and the `</s>` that ends it.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        prompt: str = "",
        max_tokens: int = 32,
        split: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: the language model's.
            prompt: is read with every caption's image.
            max_tokens: what is read and what is written are cut to this many token ids each, `</s>` included.
            split: cut every caption at a random word: what stands before it is read after the prompt, the rest is
                written. So T5 is trained in stage 2 (section 3.2 of the paper).
        """
        self.rows, self.tokenizer, self.prompt = rows, tokenizer, prompt
        self.max_tokens, self.split = max_tokens, split

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """pixels [B, 3, S, S]; input_ids, attention_mask [R, T]; labels [R, L]; image_index [R]: each text's image."""
        items, pixels = self.rows[position]
        rng = np.random.default_rng((self.rows.seed, 2, position))
        pairs = [self.encode(item.sample, text, rng) for item in items for text in item.texts]
        read, written = ([pair[i] for pair in pairs] for i in (0, 1))
        return _writing_batch(items, pixels, read, written, self.tokenizer.pad_id)

    def encode(self, sample: Sample, text: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Token ids of what is read and of what is written."""
        read, written = self.prompt, clean_caption(text)
        if sample.question is not None:
            read = question_prompt(clean_question(sample.question), short=True)
        elif self.split:
            words = written.split(" ")
            cut = int(rng.integers(len(words)))
            read, written = " ".join([self.prompt, *words[:cut]]).strip(), " ".join(words[cut:])
        return (
            self.tokenizer.encode(read, max_length=self.max_tokens),
            self.tokenizer.encode(written, max_length=self.max_tokens),
        )


def _writing_batch(
    items: Sequence[Item],
    pixels: Tensor,
    read: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pad_id: int,
) -> dict[str, Tensor]:
    """A batch of texts, one row each, padded on the right."""
    return {
        "pixels": pixels,
        "input_ids": _padded(read, pad_id),
        "attention_mask": _padded([[1] * len(ids) for ids in read], 0),
        "labels": _padded(labels, IGNORE_INDEX),
        "image_index": torch.tensor([i for i, item in enumerate(items) for _ in item.texts]),
    }


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
