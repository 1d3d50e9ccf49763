"""Images and texts side by side: how well they fit (ITM, ITC), and embeddings for search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from blip2.images import MAX_PIXELS, ImageProcessor, ImageSource, ProcessedImage, to_pixels
from blip2.inputs import BATCH_SIZE, in_batches, open_image
from blip2.modeling.blip2 import Blip2Matcher
from blip2.results import EncodedImage, Match
from blip2.text import Tokenizer


class ImageFeatures(NamedTuple):
    """What the matcher has computed of images."""

    features: Tensor  # [B, N, W]
    queries: Tensor  # float32 [B, Q, E], each of length 1


class Matcher:
    """The stage-1 model ready for use; `Predictor.match`, `.embed` and `.embed_text` are these."""

    def __init__(
        self,
        model: Blip2Matcher,
        image_processor: ImageProcessor,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        text_length: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """
        Args:
            text_length: tokens after which a text is cut off; None: the model's positions.
            max_pixels: as for `predict.load`.
        """
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.device, self.max_pixels = device, max_pixels
        self.text_length = text_length or model.config.qformer.max_position_embeddings

    @torch.inference_mode()
    def match(
        self,
        images: Sequence[ImageSource | ProcessedImage],
        texts: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[Match]]:
        """How well texts fit images: for each image a list over the texts."""
        table: list[list[Match]] = []
        for start, batch in in_batches(images, batch_size):
            features = self.encode_images(self.prepare(batch, start))
            rows: list[list[Match]] = [[] for _ in batch]
            for _, text_batch in in_batches(texts, batch_size):
                for row, matches in zip(rows, self.compare(features, text_batch), strict=True):
                    row += matches
            table += rows
        return table

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Read images, what the image encoder takes of them [B, 3, S, S], for any number of texts."""
        features = self.model.vision(pixels.to(self.device))
        return ImageFeatures(features, self.model.image_embeddings(features).float())

    @torch.inference_mode()
    def compare(self, images: ImageFeatures, texts: Sequence[str]) -> list[list[Match]]:
        """For each image how well each text fits."""
        ids, mask = self.encode(texts)
        text_embeddings = self.model.text_embeddings(ids, mask).float()  # [T, E]
        similarities = torch.einsum("bqe,te->btq", images.queries, text_embeddings).amax(-1)  # [B, T]
        table = []
        for features, row in zip(images.features, similarities.tolist(), strict=True):
            logits = self.model.itm_logits(features[None].expand(len(texts), -1, -1), ids, mask)  # [T, 2]
            table.append(list(map(Match, logits.float().softmax(-1)[:, 1].tolist(), row)))
        return table

    @torch.inference_mode()
    def embed(self, images: Sequence[ImageSource], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Image embeddings, float32 [B, Q, E]; see `Predictor.embed`."""
        config = self.model.config
        embeddings = [torch.empty(0, config.num_query_tokens, config.image_text_hidden_size)]
        for start, batch in in_batches(images, batch_size):
            embeddings.append(self.encode_images(self.prepare(batch, start)).queries.cpu())
        return torch.cat(embeddings)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Text embeddings, float32 [T, E]; see `Predictor.embed_text`."""
        embeddings = [torch.empty(0, self.model.config.image_text_hidden_size)]
        for _, batch in in_batches(texts, batch_size):
            embeddings.append(self.model.text_embeddings(*self.encode(batch)).float().cpu())
        return torch.cat(embeddings)

    def prepare(
        self, images: Sequence[ImageSource | ProcessedImage | EncodedImage], start: int = 0
    ) -> Tensor:
        """What the image encoder takes, [B, 3, S, S]; `start` is the index of the first image in what the user passed.

        Raises:
            ImageError: an image that cannot be read; the message names it.
            ValueError: an encoded image.
        """
        opened = list[Image.Image | ProcessedImage]()
        for i, image in enumerate(images):
            if isinstance(image, EncodedImage):
                raise ValueError(
                    "the matcher reads images with its own encoder; give it the image, not its encoding"
                )
            if not isinstance(image, ProcessedImage):
                image = open_image(image, start + i, self.max_pixels)
            opened.append(image)
        return to_pixels(opened, self.image_processor)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [T, L], what is longer than `text_length` cut off."""
        ids, mask = self.tokenizer.encode_batch(texts, pad="right", max_length=self.text_length)
        return ids.to(self.device), mask.to(self.device)
