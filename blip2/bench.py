"""How fast a model is on this machine, beside the machine's own limits and beside transformers.

Every side loads and runs in a process of its own, the sides in turns, so that two large models are never in memory
together and noise of the machine falls on all alike; a figure is the median of the rounds. Both sides get the same
files, the same pixels and the same prompt, and write texts of the same length. Nothing is downloaded.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from blip2.checkpoint.inspect import stored_model
from blip2.checkpoint.load import DTYPES, load_model, load_processors, read_config_file
from blip2.generation.decoding import generate
from blip2.generation.options import GenerationOptions
from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import Blip2Config, Mode
from blip2.modeling.kv_cache import PromptCache
from blip2.quantization.formats import Int8Weight
from blip2.quantization.linear import Int8ImageLinear, Int8Linear, onednn_multiplies
from blip2.registry import BYTES, KnownModel, int4_bytes
from blip2.text import CAPTION_PROMPT

SHORT, LONG = 10, 20  # new tokens
BEAMS = 5


@dataclass(frozen=True)
class Contender:
    """One side: whose code, in what dtype, and how its weights are quantized."""

    code: str  # "blip2" or "transformers"
    folder: str
    dtype: str
    quantize: Mode | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.code} {self.quantize or self.dtype}"


def _prompt_ids(side: Contender) -> Tensor:
    """The caption's prompt, int64 [1, T]."""
    tokenizer = load_processors(side.folder)[1]
    return torch.tensor([tokenizer.encode(CAPTION_PROMPT)], device=side.device)


class Ours:
    """This package's model, loaded.

    encode: pixels [B, 3, S, S] -> what the language model reads first. write: a text of exactly so many tokens for each
    image. ask_again: a second question about the same images, up to its first token.
    """

    def __init__(self, side: Contender) -> None:
        dtype = None if side.quantize else side.dtype
        model = load_model(side.folder, dtype=dtype, device=side.device, quantize=side.quantize, prepack=True)
        assert isinstance(model, Blip2)
        self.model, self.ids = model, _prompt_ids(side)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.embed_image(pixels)

    def write(
        self, prefix: Tensor, num_beams: int, tokens: int, prompt_cache: PromptCache | None = None
    ) -> None:
        options = GenerationOptions(num_beams=num_beams, max_new_tokens=tokens, min_new_tokens=tokens)
        ids = self.ids.expand(len(prefix), -1)
        generate(self.model, prefix, ids, None, options, prompt_cache=prompt_cache)

    def ask_again(self, prefix: Tensor) -> Callable[[], None]:
        prompt_cache = self.model.prefill_prefix(prefix)
        return lambda: self.write(prefix, 1, 1, prompt_cache)


class Theirs:
    """transformers' Blip2ForConditionalGeneration, its language model called as its own `generate` calls it."""

    def __init__(self, side: Contender) -> None:
        from transformers import Blip2ForConditionalGeneration

        model: Any = Blip2ForConditionalGeneration.from_pretrained(side.folder, dtype=DTYPES[side.dtype])
        self.model, self.ids = model.eval().to(side.device), _prompt_ids(side)

    def encode(self, pixels: Tensor) -> Tensor:
        model = self.model
        features = model.vision_model(pixel_values=pixels.to(model.dtype)).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        output = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        prefix: Tensor = model.language_projection(output.to(model.language_projection.weight.dtype))
        return prefix

    def write(self, prefix: Tensor, num_beams: int, tokens: int) -> None:
        words = self.model.get_input_embeddings()(self.ids.expand(len(prefix), -1))
        embeddings = torch.cat([prefix, words.to(prefix.dtype)], dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        options = {"num_beams": num_beams, "do_sample": False}
        options |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
        self.model.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)


# --- one round of one side, in a process of its own ------------------------------------------------------------------


def measure(side: Contender, batches: tuple[int, ...]) -> dict[str, float]:
    """Seconds by figure, and "peak" in bytes. Loads the model; for a fresh process."""
    start = time.perf_counter()
    loaded = Ours(side) if side.code == "blip2" else Theirs(side)
    figures = {"load": time.perf_counter() - start}
    size = load_processors(side.folder)[0].size
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(max(batches), 3, size, size, generator=random).to(side.device)
    with torch.inference_mode():
        prefix = loaded.encode(pixels[:1])
        loaded.write(prefix, 1, 2)  # pages come in from the disk
        figures["encode"] = _seconds(lambda: loaded.encode(pixels[:1]))
        figures["prefill"] = _seconds(lambda: loaded.write(prefix, 1, 1))
        greedy = _seconds(lambda: loaded.write(prefix, 1, 1 + SHORT))
        figures["greedy step"] = (greedy - figures["prefill"]) / SHORT
        short = _seconds(lambda: loaded.write(prefix, BEAMS, SHORT))
        long = _seconds(lambda: loaded.write(prefix, BEAMS, LONG))
        figures[f"beam-{BEAMS} step"] = (long - short) / (LONG - SHORT)
        figures[f"caption of {SHORT} tokens, {BEAMS} beams"] = figures["encode"] + short
        figures[f"caption of {LONG} tokens, {BEAMS} beams"] = figures["encode"] + long
        first = figures["encode"] + figures["prefill"]
        figures["first token, first question"] = first
        second = _seconds(loaded.ask_again(prefix)) if isinstance(loaded, Ours) else first
        figures["first token, second question"] = second  # transformers begins anew
        # of one image, which is what `blip2 doctor` predicts
        figures["peak"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        for images in (pixels[:batch] for batch in batches if batch > 1):
            seconds = _seconds(lambda: loaded.write(loaded.encode(images), BEAMS, SHORT), 1)  # noqa: B023
            figures[f"an image in a batch of {len(images)}"] = seconds / len(images)
    return figures


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    """The median of a few runs; of fewer where they take long."""
    taken: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if sum(taken) > 15:
            break
    return median(taken)


def limits() -> dict[str, float]:
    """What this processor can do: bytes a second read in order, operations a second in matrix products."""
    store = torch.ones(1 << 27)  # 512 MB, beyond every cache
    read = store.nbytes / min(_seconds(lambda: store.sum()) for _ in range(3))
    side = 1536
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    operations = 2 * side**3
    narrow, weight = a.bfloat16(), Int8Weight.of(a)
    eight = Int8ImageLinear(weight, None) if onednn_multiplies() else Int8Linear(weight, None, hi_lo=False)
    return {
        "read": read,
        "fp32": operations / _seconds(lambda: a @ a.mT, 5),
        "bf16": operations / _seconds(lambda: narrow @ narrow.mT, 5),
        "int8": operations / _seconds(lambda: eight(a), 5),
    }


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Medians of all rounds: seconds (and the peak's bytes) by contender and figure, and the machine's limits."""

    contenders: tuple[Contender, ...]
    rounds: int
    limits: dict[str, float]
    figures: dict[str, dict[str, float]]
    decode_bytes: dict[str, float]  # what one step of the language model reads
    operations: dict[str, float]  # of encoding an image and of reading its prompt
    predicted: dict[str, float]  # the peak by `blip2 doctor`, bytes

    def lines(self) -> list[str]:
        """A table: a line a figure; the ratio is that of the last contender to each."""
        names = list(self.figures)
        peer = self.figures[names[-1]]
        width = max(len(figure) for figure in peer)
        lines = [" " * width + "".join(f"  {name:>22}" for name in names)]
        for figure, base in peer.items():
            line = f"{figure:{width}}"
            for name in names:
                value = self.figures[name].get(figure)
                cell = "" if value is None else _readable(figure, value)
                if value and name != names[-1]:
                    cell += f" ({base / value:.2f}x)"
                line += f"  {cell:>22}"
            lines.append(line)
        lines += [f"{name}: {self._shares(name)}" for name in names]
        rates = [f"{name} {rate / 1e9:.0f} GOP/s" for name, rate in self.limits.items() if name != "read"]
        read = self.limits["read"] / 1e9
        return [*lines, f"limits: reads {read:.1f} GB/s; matrix products {', '.join(rates)}"]

    def _shares(self, name: str) -> str:
        """A contender's figures as shares of what this machine can do."""
        figures, shares = self.figures[name], []
        products = name.split()[-1].replace("int4", "int8")  # an image is encoded in 8 bits in both
        for what, operations in self.operations.items():
            if what in figures and products in self.limits:
                rate = operations / figures[what]
                share = f"{rate / self.limits[products]:.0%} of {products}'s limit"
                shares.append(f"{what} {operations / 1e12:.2f} TOP at {rate / 1e9:.0f} GOP/s, {share}")
        for step in (step for step in ("greedy step", f"beam-{BEAMS} step") if step in figures):
            size, rate = self.decode_bytes[name], self.decode_bytes[name] / figures[step]
            share = f"{rate / self.limits['read']:.0%} of what this machine reads"
            shares.append(f"a {step} reads {size / 1e9:.2f} GB at {rate / 1e9:.1f} GB/s, {share}")
        if "peak" in figures and name in self.predicted:
            shares.append(f"`blip2 doctor` predicts {self.predicted[name] / figures['peak']:.0%} of its peak")
        return "; ".join(shares)

    def as_json(self) -> str:
        """All of it on one line."""
        record = {
            "rounds": self.rounds,
            "figures": {name: _rounded(figures) for name, figures in self.figures.items()},
            "limits": _rounded(self.limits),
            "decode_bytes": self.decode_bytes,
            "operations": self.operations,
            "predicted_peak": self.predicted,
        }
        return json.dumps(record)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def _readable(figure: str, value: float) -> str:
    if figure == "peak":
        return f"{value / 1e9:.2f} GB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def run_benchmark(
    contenders: tuple[Contender, ...],
    *,
    rounds: int = 3,
    batches: tuple[int, ...] = (1, 4, 16),
    record: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure contenders side by side.

    Args:
        record: a file to which every measurement is added, a line of JSON each; what it holds already is taken from
            it. So a run that takes long can be made in pieces.

    Raises:
        ValueError: a contender that cannot run; the message is its own.
    """
    measured = _recorded(record)
    sides = {"limits": limits} | {side.name: partial(_apart, side, batches) for side in contenders}
    for number in range(rounds):
        for name, measurement in sides.items():
            if (name, number) not in measured:
                report(f"round {number + 1} of {rounds}: {name}")
                measured[name, number] = measurement()
                if record is not None:
                    with record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([name, number, measured[name, number]]) + "\n")

    def summary(name: str, combine: Callable[[Iterable[float]], float]) -> dict[str, float]:
        rows = [measured[name, number] for number in range(rounds)]
        return {figure: combine(row[figure] for row in rows) for figure in rows[0]}

    figures = {side.name: summary(side.name, median) for side in contenders}
    reads = {side.name: decode_bytes(side) for side in contenders}
    predicted = {side.name: predicted_peak(side) for side in contenders if side.code == "blip2"}
    counted = operations(contenders[0])
    return Bench(contenders, rounds, summary("limits", max), figures, reads, counted, predicted)


def _recorded(record: Path | None) -> dict[tuple[str, int], dict[str, float]]:
    """Measurements that a file holds, by contender and round."""
    if record is None or not record.exists():
        return {}
    try:
        lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        return {(str(name), int(number)): dict(figures) for name, number, figures in lines}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record} holds no measurements of `blip2 bench` ({error})") from error


def _apart(side: Contender, batches: tuple[int, ...]) -> dict[str, float]:
    """One round in a process of its own."""
    request = json.dumps({"side": asdict(side), "batches": batches})
    command = [sys.executable, "-m", "blip2.bench", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{side.name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def predicted_peak(side: Contender) -> float:
    """The memory that `blip2 doctor` predicts for a side."""
    config, parameters, disk_bytes, stem = stored_model(Path(side.folder))
    model = KnownModel(side.folder, "", "", config, parameters, disk_bytes, stem=stem)
    return model.memory_bytes(side.quantize or side.dtype)


def operations(side: Contender) -> dict[str, float]:
    """Multiplications and additions of encoding an image, and with OPT of reading its prompt."""
    config = _config(side)
    vision, language = config.vision, config.language
    width, positions = vision.hidden_size, vision.num_positions
    matrices = 4 * width * width + 2 * width * vision.intermediate_size
    layer = 2 * positions * matrices + 4 * positions * positions * width
    counted = {"encode": float(vision.num_hidden_layers * layer)}
    if not language.is_encoder_decoder:
        prompt = config.num_query_tokens + len(load_processors(side.folder)[1].encode(CAPTION_PROMPT))
        counted["prefill"] = 2.0 * prompt * language.matrix_values()
    return counted


def decode_bytes(side: Contender) -> float:
    """The weights that one step of the language model reads."""
    language = _config(side).language
    head = language.vocab_size * language.width
    value = {"int8": 1.0, "int4": int4_bytes(language)}.get(side.quantize or "", BYTES[side.dtype])
    matrices = language.matrix_values(decode_step=True) * value
    return matrices + head * (1.0 if side.quantize else BYTES[side.dtype])


def _config(side: Contender) -> Blip2Config:
    config = read_config_file(Path(side.folder))
    assert isinstance(config, Blip2Config)
    return config


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(measure(Contender(**request["side"]), tuple(request["batches"]))))
