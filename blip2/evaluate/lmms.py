"""A model of ours in lmms-eval, the harness: `python -m lmms_eval --model blip2 --model_args pretrained=opt-2.7b ...`.

lmms-eval finds it by the entry point in pyproject.toml, where both are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

import blip2
from blip2.inputs import in_batches

MANIFEST = ModelManifest("blip2", simple_class_path="blip2.evaluate.lmms.Blip2Lmms")


class Blip2Lmms(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers the harness's questions with `Predictor.ask`: tasks of the kind generate_until, one image a question."""

    def __init__(
        self,
        pretrained: str = "default",
        *,
        device: str = "auto",
        dtype: str | None = None,
        quantize: Any = None,
        batch_size: int | str = 8,
    ) -> None:
        """Arguments as `blip2.load`'s; `pretrained` is its `name`."""
        super().__init__()
        self._predictor = blip2.load(pretrained, device=device or "auto", dtype=dtype, quantize=quantize)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, in order. Raises ValueError where one has no image, or several."""
        said: list[str] = []
        for _, some in in_batches(requests, self._batch_size):
            images, questions = zip(*map(self._asked, some), strict=True)
            options = dict(some[0].args[1])
            if any(each.args[1] != some[0].args[1] for each in some):
                raise ValueError("requests of one task differ in their generation settings")
            sample = bool(options.get("do_sample")) and options.get("temperature") != 0
            answers = self._predictor.ask(
                list(images),
                list(questions),
                num_beams=1 if sample else int(options.get("num_beams") or 5),
                max_new_tokens=int(options.get("max_new_tokens") or 30),
                do_sample=sample,
                temperature=float(options.get("temperature") or 1.0) if sample else 1.0,
                top_p=float(options.get("top_p") or 1.0) if sample else 1.0,
                seed=0 if sample else None,
                batch_size=len(some),
            )
            ends = options.get("until") or []
            said += [_until(answer, [ends] if isinstance(ends, str) else ends) for answer in answers]
        return said

    def _asked(self, request: Any) -> tuple[Any, str]:
        """The image and the question of a request."""
        question, _, images_of, place, task, split = request.args
        images = images_of(self.task_dict[task][split][place])
        if len(images) != 1:
            raise ValueError(f"{task} asks about {len(images)} images at once; BLIP-2 reads one")
        return images[0], question.replace("<image>", "").strip()

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError: not offered."""
        raise NotImplementedError("blip2 in lmms-eval answers single questions (generate_until)")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: not offered."""
        raise NotImplementedError("blip2 in lmms-eval answers questions (generate_until) and ranks none")


def _until(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of these."""
    return min((text.split(end)[0] for end in ends if end), key=len, default=text).strip()
