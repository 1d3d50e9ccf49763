"""Answers ranked with the image and the question read once, against each answer read alone.

`python -m benchmarks.ranking`. Both ways must give the same log-probabilities; the figure is how many times faster the
first is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import blip2
from blip2.predict import Predictor

IMAGE = Path(__file__).parent.parent / "examples/four-pineapples.jpg"
QUESTION = "how many pineapples are in the picture?"


def one_by_one(
    model: Predictor, image: Path | blip2.EncodedImage, question: str, answers: list[str]
) -> list[float]:
    """Question and answer read in full for each answer, as a loop over answers does."""
    config, tokenizer = model.model.config.language, model.generator.tokenizer
    prompt = torch.tensor([tokenizer.encode(model.question_prompt(question))], device=model.device)
    logprobs = []
    for answer in answers:
        prefix = model.encode(image).prefix
        ids = torch.tensor(
            [[*tokenizer.encode(" " + answer, frame=False), config.eos_token_ids[0]]], device=model.device
        )
        with torch.inference_mode():
            input_ids = prompt if config.is_encoder_decoder else torch.cat([prompt, ids], 1)
            logits, targets = model.model.target_logits(prefix, input_ids, None, ids)
        logprobs.append(float(logits.float().log_softmax(-1).gather(1, targets[:, None]).sum()))
    return logprobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--count", type=int, default=100, help="answers, 1 to 10,000 (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many (default: 3)")
    arguments = parser.parse_args()
    model = blip2.load(arguments.model)
    words = ["red", "blue", "green", "two", "three", "small", "large", "yellow", "white", "black"]
    things = ["dog", "cat", "bus", "circle", "triangle", "pineapple", "rose", "car", "tree", "fish"]
    answers = [*things, *words, *(f"{a} {b}" for a in words for b in things)]
    answers = (answers + [f"{i} {b}" for i in range(1000) for b in things])[: arguments.count]
    encoded = model.encode(IMAGE)
    shared, alone, read = [], [], []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        ranked = model.rank(IMAGE, QUESTION, answers)
        middle = time.perf_counter()
        reference = one_by_one(model, IMAGE, QUESTION, answers)
        shared.append(middle - start)
        after = time.perf_counter()
        one_by_one(model, encoded, QUESTION, answers)
        alone.append(after - middle)
        read.append(time.perf_counter() - after)
    logprobs = {answer.answer: answer.logprob for answer in ranked}
    apart = max(abs(logprobs[answer] - value) for answer, value in zip(answers, reference, strict=True))
    fast, slow, text = (sorted(times)[len(times) // 2] for times in (shared, alone, read))
    print(f"{len(answers)} answers: together {fast * 1000:.0f} ms, one by one {slow * 1000:.0f} ms")
    print(f"{slow / fast:.1f} times as fast, {text / fast:.1f} where the image had been read before")
    print(f"log-probabilities differ by at most {apart:.1e}")
    if apart > 1e-3:
        raise SystemExit("the two ways differ")


if __name__ == "__main__":
    main()
