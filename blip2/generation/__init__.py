"""Choosing new tokens: `generate` continues prompts by greedy search, sampling or beam search. Token ids only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blip2.generation.options import GenerateKwargs, GenerationOptions

if TYPE_CHECKING:
    from blip2.generation.decoding import Generated, generate, stream

__all__ = ["GenerateKwargs", "Generated", "GenerationOptions", "generate", "stream"]


if not TYPE_CHECKING:  # or a type checker would let any name pass

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'blip2.generation' has no attribute {name!r}")
        from blip2.generation import decoding  # needs torch, which the options do not

        return getattr(decoding, name)
