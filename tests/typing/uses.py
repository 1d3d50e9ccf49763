"""What a type checker sees of each door. Never run: tests/test_typing.py hands this file to mypy --strict."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, assert_type

import numpy as np
from PIL import Image
from torch import Tensor

import blip2
from blip2 import Answer, Caption, EncodedImage, Match, Ranked

model = blip2.load("Salesforce/blip2-opt-2.7b", device="cpu", dtype="bf16", quantize="int8", matcher="itm")
assert_type(model, blip2.Predictor)
assert_type(blip2.load(), blip2.Predictor)

path = Path("photo.jpg")
paths = [path, path]

# one image, whatever holds it
assert_type(model.caption("photo.jpg"), Caption)
assert_type(model.caption(path, num_beams=3, max_new_tokens=20, early_stopping="never"), Caption)
assert_type(model.caption(path.read_bytes(), prompt="", stream=False), Caption)
assert_type(model.caption(BytesIO(b"")), Caption)
assert_type(model.caption(path.open("rb")), Caption)
assert_type(model.caption(Image.new("RGB", (4, 4))), Caption)
assert_type(model.caption(np.zeros((4, 4, 3), np.uint8)), Caption)
assert_type(model.caption(path).score, float)
assert_type(model.caption(path).probability_right, float | None)
assert_type(model.caption(path).warnings, tuple[str, ...])

# many images
assert_type(model.caption(paths, batch_size=4), list[Caption])
assert_type(model.caption((path, "photo.jpg")), list[Caption])
assert_type(model.caption(["a.jpg", "b.jpg"], temperature=0.7, top_k=None, seed=1), list[Caption])

# a number of texts each
assert_type(model.caption(path, num_return_sequences=1), list[Caption])
assert_type(model.caption(paths, num_return_sequences=3), list[list[Caption]])
assert_type(model.caption(path, num_return_sequences=None), Caption)

# streams
assert_type(model.caption(path, stream=True), Iterator[str])
assert_type(model.caption(path, prompt="a", stream=True, top_p=0.9), Iterator[str])
assert_type(model.ask(path, "what is it?", stream=True), Iterator[str])

# answers
assert_type(model.ask(path, "what is it?"), Answer)
assert_type(model.ask(path, "what is it?", num_return_sequences=2), list[Answer])
assert_type(model.ask(paths, "what is it?", eos_token_id=[2, 50118]), list[Answer])
assert_type(model.ask(paths, ["what is it?", "why?"]), list[Answer])
assert_type(model.ask(paths, ("what is it?", "why?"), num_return_sequences=2), list[list[Answer]])

# encoded once
encoded = model.encode(path)
assert_type(encoded, EncodedImage)
assert_type(model.encode(paths), list[EncodedImage])
assert_type(model.ask(encoded, "what is it?"), Answer)
assert_type(model.caption([encoded, "photo.jpg"]), list[Caption])
assert_type(model.caption(model.encode(paths)), list[Caption])

# conversation
chat = model.chat(encoded)
assert_type(chat, blip2.Chat)
assert_type(chat.send("what is it?"), Answer)
assert_type(chat.send("why?", max_new_tokens=5, stream=False), Answer)
assert_type(chat.send("why?", stream=True), Iterator[str])
assert_type(chat.turns, tuple[tuple[str, str], ...])

# the other doors
assert_type(model.rank(path, "what is it?", ["dog", "cat"]), list[Ranked])
assert_type(model.rank(paths, "what is it?", ("dog", "cat")), list[list[Ranked]])
assert_type(model.match(path, "a dog"), Match)
assert_type(model.match(path, ["a dog", "a cat"]), list[Match])
assert_type(model.match(paths, "a dog"), list[Match])
assert_type(model.match(paths, ("a dog", "a cat")), list[list[Match]])
assert_type(model.embed(paths), Tensor)
assert_type(model.embed_text(["a dog"]), Tensor)
assert_type(model.explain(path), blip2.Explanation)

# options read from elsewhere
settings: dict[str, Any] = {"num_beams": 3}
for text in model.caption(paths, **settings):
    print(text)
