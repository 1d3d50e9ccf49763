"""BLIP-2: from a picture to words.

    import blip2
    model = blip2.load()
    model.caption("photo.jpg")
    model.ask("photo.jpg", "how many dogs are there?")

Importing this package costs next to nothing: what the names below need is imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from blip2.explain import Explanation
    from blip2.generation.options import GenerationOptions
    from blip2.images import ImageError
    from blip2.modeling.config import ConfigError
    from blip2.predict import Chat, Predictor, load
    from blip2.results import Answer, Caption, EncodedImage, Match, Ranked

__all__ = [
    "Answer", "Caption", "Chat", "ConfigError", "EncodedImage", "Explanation", "GenerationOptions", "ImageError",
    "Match", "Predictor", "Ranked", "load",
]  # fmt: skip

_HOMES = {
    "ConfigError": "modeling.config", "Explanation": "explain", "GenerationOptions": "generation.options",
    "ImageError": "images", **dict.fromkeys(("Answer", "Caption", "EncodedImage", "Match", "Ranked"), "results"),
}  # fmt: skip


if not TYPE_CHECKING:  # or a type checker would let any name pass

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            import difflib

            meant = difflib.get_close_matches(name, __all__, n=1)
            hint = f"; did you mean {meant[0]!r}?" if meant else ""
            raise AttributeError(f"module 'blip2' has no attribute {name!r}{hint}", name=name)
        value = getattr(import_module(f"blip2.{_HOMES.get(name, 'predict')}"), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
