"""Where a model's time goes: the operators that take most of it.

    python -m benchmarks.profile FOLDER [--dtype bf16 | --quantize int8]

One table for encoding an image, one for reading its prompt, one for a step with five beams: milliseconds and the share
of the whole, as torch's profiler counts them. What is outside torch's operators is Python's and OpenVINO's. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from blip2.bench import BEAMS
from blip2.checkpoint.load import load_model, load_processors, stored_as
from blip2.modeling.blip2 import Blip2
from blip2.text import CAPTION_PROMPT

MOST = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    arguments = parser.parse_args()
    quantized = arguments.quantize or stored_as(Path(arguments.folder))
    dtype = None if quantized else arguments.dtype  # between quantized weights fp32 is computed
    model = load_model(arguments.folder, dtype=dtype, quantize=arguments.quantize, prepack=True)
    assert isinstance(model, Blip2)
    image_processor, tokenizer = load_processors(arguments.folder)
    pixels = torch.randn(1, 3, image_processor.size, image_processor.size)
    ids = torch.tensor([tokenizer.encode(CAPTION_PROMPT)])
    with torch.inference_mode():
        prefix = model.embed_image(pixels)
        state = model.prefill(prefix, ids, rows=BEAMS, max_new_tokens=32)
        tokens = state.logits.topk(BEAMS).indices.flatten()
        profiles = {
            "encode": profiled("encoding an image", lambda: model.embed_image(pixels), 2),
            "prefill": profiled(
                "reading its prompt", lambda: model.prefill(prefix, ids, max_new_tokens=1), 2
            ),
            "step": profiled(f"a step with {BEAMS} beams", lambda: state.decode_step(tokens), 8),
        }
    print(json.dumps(profiles))


def profiled(what: str, work: Callable[[], object], times: int) -> dict[str, float]:
    """Print a table of what `work` does; milliseconds by operator, "all" the whole."""
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    took = (time.perf_counter() - start) / times * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(times):
            work()
        watched = (time.perf_counter() - start) / times * 1e3  # longer: it takes time to look
    rows = {event.key: event.self_cpu_time_total / times / 1e3 for event in profile.key_averages()}
    rows["outside torch's operators"] = max(0.0, watched - sum(rows.values()))
    most = sorted(rows, key=lambda name: -rows[name])[:MOST]
    print(f"{what}: {took:.0f} ms, {watched:.0f} ms while watched")
    for name in most:
        print(f"  {name:60} {rows[name]:8.1f} ms {rows[name] / watched:6.1%}")
    return {"all": round(took, 1)} | {name: round(rows[name], 2) for name in most}


if __name__ == "__main__":
    main()
