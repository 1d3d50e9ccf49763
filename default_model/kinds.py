"""The kinds of pictures that training keeps as the stem sees them; features.py says what each is."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["scene", "varied", "easy", "photograph", "pasted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What batches draw from: "imagined" has the evidence of a noun that is not there.
Share = Literal[Kind, "imagined"]
