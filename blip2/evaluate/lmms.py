"""The plug-in for the harness lmms-eval: `python -m lmms_eval --model blip2 --model_args pretrained=opt-2.7b ...`.

lmms-eval finds it by the entry point in pyproject.toml, if both are installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

import blip2
from blip2.generation.options import GenerateKwargs
from blip2.inputs import in_batches

MANIFEST = ModelManifest("blip2", simple_class_path="blip2.evaluate.lmms.Blip2Lmms")


class Blip2Lmms(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers questions with `Predictor.ask`: the harness's tasks of the kind generate_until, one image a question."""

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
        """An answer to each request, in order. Raises ValueError if one has no image, or several."""
        answers: list[str] = []
        for _, batch in in_batches(requests, self._batch_size):
            images, questions = zip(*map(self._image_and_question, batch), strict=True)
            settings = batch[0].args[1]
            if any(request.args[1] != settings for request in batch):
                raise ValueError("requests of one task differ in their generation settings")
            texts = self._predictor.ask(
                list(images), list(questions), batch_size=len(batch), **_options(settings)
            )
            ends = settings.get("until") or []
            answers += [_until(text, [ends] if isinstance(ends, str) else ends) for text in texts]
        return answers

    def _image_and_question(self, request: Any) -> tuple[Any, str]:
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


def _options(settings: Mapping[str, Any]) -> GenerateKwargs:
    """The decoding options among a task's generation settings; samples are repeatable."""
    options = {name: settings[name] for name in GenerateKwargs.__optional_keys__ if name in settings}
    if options.get("do_sample") is False:  # as in transformers, what shapes samples has no effect then
        for name in ("temperature", "top_k", "top_p"):
            options.pop(name, None)
    return cast(GenerateKwargs, {"seed": 0} | options)


def _until(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of `ends`."""
    return min((text.split(end)[0] for end in ends if end), key=len, default=text).strip()
