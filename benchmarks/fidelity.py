"""How close quantized weights stay to fp32: what each writes next, position by position, over texts that fp32 wrote.

    python -m benchmarks.fidelity                            # the default model on examples/
    python -m benchmarks.fidelity --model opt-2.7b PHOTOS

For every image a caption and the answers to some questions are written in fp32; then every mode reads the same images
and texts. Top-1 agreement is the share of positions at which the likeliest token is the same, KL the mean divergence of
the distributions from fp32's, in nats. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import blip2
from blip2.images import SUFFIXES, load_image, to_pixels
from blip2.modeling.config import MODES
from blip2.predict import Predictor
from blip2.text import CAPTION_PROMPT, question_prompt

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTIONS = (
    "what is in the picture?",
    "how many things are there?",
    "what color is it?",
    "is it red?",
    "is there a person?",
    "is there an animal?",
    "what shape is it?",
    "where is it?",
    "what is it doing?",
    "what is on the left?",
    "what is on the right?",
    "what is behind it?",
    "is it day or night?",
    "what is it made of?",
    "is it indoors?",
    "what is the main object?",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="?", type=Path, default=EXAMPLES, metavar="FOLDER")
    parser.add_argument("--model", default="default")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in SUFFIXES)
    exact = blip2.load(arguments.model, dtype="fp32")
    texts = [written(exact, path) for path in paths]
    expected = [distributions(exact, path, rows) for path, rows in zip(paths, texts, strict=True)]
    del exact
    agreement = {}
    for mode in MODES:
        quantized = blip2.load(arguments.model, quantize=mode)
        same, divergence, count = 0, 0.0, 0
        for path, rows, theirs in zip(paths, texts, expected, strict=True):
            for ours, reference in zip(distributions(quantized, path, rows), theirs, strict=True):
                same += int((ours.argmax(-1) == reference.argmax(-1)).sum())
                divergence += float((reference.exp() * (reference - ours)).sum())
                count += len(ours)
        agreement[mode] = {
            "positions": count,
            "top1": round(same / count, 4),
            "kl": round(divergence / count, 6),
        }
        print(
            f"{mode}: top-1 agreement {same / count:.1%}, KL {divergence / count:.5f} over {count} positions"
        )
    print(json.dumps(agreement))


def written(model: Predictor, path: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and what fp32 writes after them, as token ids."""
    tokenizer, encoded = model.generator.tokenizer, model.encode(path)
    texts = [(CAPTION_PROMPT, model.caption(encoded))]
    texts += [(question_prompt(question), model.ask(encoded, question)) for question in QUESTIONS]
    return [(tokenizer.encode(prompt), tokenizer.encode(f" {text}\n", frame=False)) for prompt, text in texts]


@torch.inference_mode()
def distributions(model: Predictor, path: Path, rows: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Log-probabilities [T, V] at the positions of each text."""
    part = model.generator
    prefix = model.model.embed_image(to_pixels([load_image(path)], part.image_processor))
    out = []
    for prompt, text in rows:
        logits = model.model.logits_from_prefix(prefix, torch.tensor([prompt + text]))[0]
        out.append(logits[-len(text) - 1 : -1].float().log_softmax(-1))
    return out


if __name__ == "__main__":
    main()
