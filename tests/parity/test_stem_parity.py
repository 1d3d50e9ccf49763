"""A folder with a stem beside transformers: it opens all but the image processor, and gives equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from tiny_stem import tiny_processor, with_stem

import blip2
from blip2.images import load_image, to_pixels


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, generator_folder: Path, matcher_folder: Path
) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("stem")
    processor = tiny_processor(base / "made")
    generator = with_stem(generator_folder, base / "model", processor)
    return generator, with_stem(matcher_folder, base / "matcher", processor, beside="model")


def test_plain_pixels_are_refused(folders: tuple[Path, Path]) -> None:
    for kind in (transformers.Blip2Processor, transformers.AutoProcessor, transformers.AutoImageProcessor):
        for folder in folders:
            with pytest.raises(ValueError, match="Unrecognized image processor"):
                kind.from_pretrained(folder)


def test_equal_captions_for_equal_pixels(folders: tuple[Path, Path], pictures: list[Path]) -> None:
    ours = blip2.load(folders[0], device="cpu")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folders[0], dtype=torch.float32)
    theirs.eval()  # type: ignore[no-untyped-call]
    words = ours.generator.tokenizer.encode("a photo of")
    ids: Any = torch.tensor([[theirs.config.image_token_index] * theirs.config.num_query_tokens + words])
    for path in pictures:
        pixels = to_pixels([load_image(path)], ours.generator.image_processor)
        with torch.inference_mode():
            features = theirs.vision_model(pixel_values=pixels).last_hidden_state
            torch.testing.assert_close(ours.model.vision(pixels), features, rtol=1e-4, atol=1e-4)
            written = theirs.generate(pixel_values=pixels, input_ids=ids, num_beams=5, max_new_tokens=30)
        assert tuple(written[0, ids.shape[1] :].tolist()) == ours.caption(path).tokens


def test_equal_matches_for_equal_pixels(folders: tuple[Path, Path], pictures: list[Path]) -> None:
    ours = blip2.load(folders[1], device="cpu")
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(folders[1], dtype=torch.float32)
    theirs.eval()  # type: ignore[no-untyped-call]
    ids, mask = ours.matcher.encode(["a cat"])
    for path in pictures:
        pixels = to_pixels([load_image(path)], ours.matcher.image_processor)
        with torch.inference_mode():
            logits = theirs(
                pixel_values=pixels,
                input_ids=ids,
                attention_mask=mask,
                use_image_text_matching_head=True,
            ).logits_per_image
        probability = ours.match(path, "a cat").probability
        assert probability == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-4)
