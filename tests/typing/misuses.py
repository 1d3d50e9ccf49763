"""What a type checker refuses: every line that ends with `# error` must be one, no other line may be."""

from pathlib import Path

import blip2

model = blip2.load()
path = Path("photo.jpg")
paths = [path, path]

model.caption(path, beams=3)  # error
model.caption(path, num_beam=3)  # error
model.caption(path, num_beams="3")  # error
model.caption(path, temperature="hot")  # error
model.caption(path, early_stopping="always")  # error
model.caption(paths, stream=True)  # error
model.caption(path, stream=True, num_return_sequences=2)  # error
model.caption(path, stream=True, batch_size=2)  # error
model.caption(3)  # error
model.caption({path})  # error
print(model.caption(path).scores)  # error
model.ask(path)  # error
model.ask(path, 3)  # error
model.ask(path, ["what is it?", "why?"])  # error
model.ask(path, "what is it?", prompt="a photo of")  # error
model.chat(paths)  # error
model.chat(path).send("why?", num_return_sequences=2)  # error
model.rank(path, "what is it?", "dog")  # error
model.match(model.encode(path), "a dog")  # error
model.explain(model.encode(path))  # error
blip2.load(quantize="int3")  # error
print(blip2.Encoded)  # error
caption: int = model.caption(path)  # error
texts: list[str] = model.caption(path)  # error
