"""How likely a caption is right: a logistic regression on the log-probabilities of its tokens, fitted for one model.

A model's folder may hold it as calibration.json:

    {"caption": {"intercept": f, "mean": f, "lowest": f, "length": f, "threshold": f}, "advice": "this looks ..."}

`python -m default_model.calibrate` fits one. It holds for the weights it was fitted on, and for captions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blip2.tensorfiles.errors import CheckpointError, quoted
from blip2.tensorfiles.strict_json import read_json

FILE = "calibration.json"
LARGEST = 1e6  # of a coefficient: sums of their products stay finite
LEAST_LOGPROB = -100.0  # a token of less, down to probability 0, counts as this
MAX_ADVICE = 300  # characters
_SUBJECT = (
    "this looks "  # an advice's first words: a run over many images has "3 of 20 images look" in their place
)


def features(token_logprobs: Sequence[float]) -> tuple[float, float, int]:
    """What a caption is judged by: its mean and its lowest token log-probability, and its number of tokens.

    token_logprobs: under the model itself, the end token's included; one at least.
    """
    logprobs = [max(logprob, LEAST_LOGPROB) for logprob in token_logprobs]
    return sum(logprobs) / len(logprobs), min(logprobs), len(logprobs)


@dataclass(frozen=True)
class Calibration:
    """P(right) = sigmoid(intercept + mean * mean log-probability + lowest * lowest one + length * number of tokens).

    threshold: a caption whose P(right) is below it is taken for one about something that the model does not know.
    advice: what is said of such an image; it begins with "this looks ".

    Raises:
        CheckpointError: a number that is none, is too large or is out of its bounds, or an advice that is none.
    """

    intercept: float
    mean: float
    lowest: float
    length: float
    threshold: float
    advice: str

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            low, high = (0, 1) if name == "threshold" else (-LARGEST, LARGEST)
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
                raise CheckpointError(
                    f"{name} must be a number from {low:,.0f} to {high:,.0f}; got {quoted(number)}"
                )
        advice = self.advice
        good = isinstance(advice, str) and advice.startswith(_SUBJECT) and advice.isprintable()
        if not good or len(advice) > MAX_ADVICE:
            raise CheckpointError(
                f"advice must be a line of up to {MAX_ADVICE} characters that begins with {_SUBJECT!r}; "
                f"got {quoted(advice)}"
            )

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """The calibration of a model's folder; None where it has none. Raises CheckpointError where it is broken."""
        path = folder / FILE
        if not path.is_file():
            return None
        content = read_json(path)
        caption = content.get("caption")
        if not isinstance(caption, Mapping) or caption.keys() != {*_NUMBERS}:
            raise CheckpointError(
                f"{path}: caption must be an object of {', '.join(_NUMBERS)}; got {_shown(caption)}"
            )
        try:
            return cls(**caption, advice=content.get("advice"))  # type: ignore[arg-type]  # checked there
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; restore the file, or remove it") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of calibration.json."""
        return {"caption": {name: getattr(self, name) for name in _NUMBERS}, "advice": self.advice}

    def probability_right(self, token_logprobs: Sequence[float]) -> float:
        """How likely a caption is right, 0..1; token_logprobs: as for `features`."""
        mean, lowest, length = features(token_logprobs)
        score = self.intercept + self.mean * mean + self.lowest * lowest + self.length * length
        return 0.5 + 0.5 * math.tanh(score / 2)  # the logistic function, without overflow

    def warnings(self, probabilities: Sequence[float]) -> tuple[str, ...]:
        """The advice, where of an image's captions none reaches the threshold; nothing else."""
        return (self.advice,) if max(probabilities) < self.threshold else ()

    def advice_for(self, flagged: int, images: int) -> str:
        """The advice for a run, as "3 of 20 images look ... (captions may be wrong); ..."; for one image as it is."""
        if images == 1:
            return self.advice
        what, semicolon, rest = self.advice.removeprefix(_SUBJECT).partition(";")
        return f"{flagged:,} of {images:,} images look {what} (captions may be wrong){semicolon}{rest}"


_NUMBERS = tuple(field.name for field in fields(Calibration) if field.name != "advice")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, Mapping) else quoted(value)
