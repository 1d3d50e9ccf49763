"""Images and texts side by side: how well they fit (ITM, ITC), and embeddings for search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip2.images import ImageProcessor, ImageSource, to_pixels
from blip2.inputs import BATCH_SIZE, as_list, in_batches, is_many, open_image
from blip2.modeling.blip2 import Blip2Matcher
from blip2.results import EncodedImage, Match
from blip2.text import Tokenizer


class ImageFeatures(NamedTuple):
    """Images as the matcher has read them."""

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
    ) -> None:
        """`text_length`: tokens after which a text is cut off; None: the model's positions."""
        self.model, self.image_processor, self.tokenizer, self.device = (
            model,
            image_processor,
            tokenizer,
            device,
        )
        self.text_length = text_length or model.config.qformer.max_position_embeddings

    @torch.inference_mode()
    def match(
        self,
        images: ImageSource | Sequence[ImageSource],
        texts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """How well texts fit images, every text with every image.

        Returns:
            One image and one text: a `Match`. One of them a list: a list. Both: for each image a list over the texts.

        Raises:
            ImageError: an image that cannot be read; the message names it.
        """
        results: list[Any] = []
        for start, batch in in_batches(as_list(images), batch_size):
            seen = self.encode_images(self.prepare(batch, start))
            rows: list[list[Match]] = [[] for _ in batch]
            for _, some in in_batches(as_list(texts), batch_size):
                for row, found in zip(rows, self.compare(seen, some), strict=True):
                    row += found
            results += rows if is_many(texts) else [row[0] for row in rows]
        return results if is_many(images) else results[0]

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Read images, pixels [B, 3, S, S], for any number of texts."""
        features = self.model.vision(pixels.to(self.device))
        return ImageFeatures(features, self.model.image_embeddings(features).float())

    @torch.inference_mode()
    def compare(self, seen: ImageFeatures, texts: Sequence[str]) -> list[list[Match]]:
        """For each image how well each text fits."""
        ids, mask = self.encode(texts)
        words = self.model.text_embeddings(ids, mask).float()  # [T, E]
        similarities = torch.einsum("bqe,te->btq", seen.queries, words).amax(-1)
        found = []
        for features, similar in zip(seen.features, similarities.tolist(), strict=True):
            logits = self.model.itm_logits(features[None].expand(len(texts), -1, -1), ids, mask)
            found.append(list(map(Match, logits.float().softmax(-1)[:, 1].tolist(), similar)))
        return found

    @torch.inference_mode()
    def embed(self, images: ImageSource | Sequence[ImageSource], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Image embeddings for search, float32: [Q, E] for one image, [B, Q, E] for a list; each query of length 1.

        An image's similarity to a text is the greatest product of one of its queries with the text's embedding.

        Raises:
            ImageError: an image that cannot be read; the message names it.
        """
        found = [
            self.encode_images(self.prepare(batch, start)).queries.cpu()
            for start, batch in in_batches(as_list(images), batch_size)
        ]
        if not found:
            return torch.empty(
                0, self.model.config.num_query_tokens, self.model.config.image_text_hidden_size
            )
        return torch.cat(found) if is_many(images) else found[0][0]

    @torch.inference_mode()
    def embed_text(self, texts: str | Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Text embeddings for search, float32, of length 1: [E] for one text, [B, E] for a list."""
        found = [
            self.model.text_embeddings(*self.encode(batch)).float().cpu()
            for _, batch in in_batches(as_list(texts), batch_size)
        ]
        if not found:
            return torch.empty(0, self.model.config.image_text_hidden_size)
        return torch.cat(found) if is_many(texts) else found[0][0]

    def prepare(self, images: Sequence[Any], start: int = 0) -> Tensor:
        """Pixels [B, 3, S, S]; `start` is the place of the first image in what the user gave."""
        if any(isinstance(image, EncodedImage) for image in images):
            raise ValueError(
                "the matcher reads images with its own encoder; give it the image, not its encoding"
            )
        return to_pixels(
            [open_image(image, start + i) for i, image in enumerate(images)], self.image_processor
        )

    def features(self, images: Sequence[Any], start: int = 0) -> Tensor:
        """Image features [B, N, W]; `start` as for `prepare`."""
        features: Tensor = self.model.vision(self.prepare(images, start).to(self.device))
        return features

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [T, L], what is longer than `text_length` cut off."""
        ids, mask = self.tokenizer.encode_batch(texts, pad="right", max_length=self.text_length)
        return ids.to(self.device), mask.to(self.device)
