"""BLIP-2: from a picture to words.

    import blip2
    model = blip2.load()
    model.caption("photo.jpg")
    model.ask("photo.jpg", "how many dogs are there?")

Importing this package costs next to nothing: what the names below need is imported when they are first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torch's threads wait for their next work spinning, for milliseconds, and keep a processor from OpenVINO's threads
# meanwhile (and from other programs). Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

if TYPE_CHECKING:
    from blip2.explain import Explanation
    from blip2.generation.options import GenerationOptions
    from blip2.images import ImageError
    from blip2.modeling.config import ConfigError
    from blip2.predict import Chat, Predictor, load
    from blip2.results import Answer, Caption, EncodedImage, Match, Ranked

__all__ = [
    "Answer",
    "Caption",
    "Chat",
    "ConfigError",
    "EncodedImage",
    "Explanation",
    "GenerationOptions",
    "ImageError",
    "Match",
    "Predictor",
    "Ranked",
    "load",
]

_HOMES = {
    "ConfigError": "modeling.config",
    "Explanation": "explain",
    "GenerationOptions": "generation.options",
    "ImageError": "images",
} | dict.fromkeys(("Answer", "Caption", "EncodedImage", "Match", "Ranked"), "results")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}")
    value = getattr(import_module(f"blip2.{_HOMES.get(name, 'predict')}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
