"""A checkpoint of any layout -> a folder in another, one tensor in memory at a time.

The folder appears complete or not at all: a conversion that was interrupted leaves nothing in its place and is started
again. Values are never changed but by a dtype that was asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blip2.checkpoint.dialects import to_lavis, to_paddle, tokenizer_changes
from blip2.checkpoint.folder import copy_file, new_folder, write_json, write_text
from blip2.checkpoint.hub import resolve
from blip2.checkpoint.key_mapping import to_hugging_face
from blip2.checkpoint.layouts import HUGGING_FACE, LAVIS, PADDLEMIX, PADDLENLP, Layout
from blip2.checkpoint.load import has_tokenizer, match_state_dict, our_names, parse_dtype
from blip2.checkpoint.remap import Piece, as_layout, read_blocks, view
from blip2.checkpoint.save import SHARD_BYTES, settings, tokenizer_files
from blip2.checkpoint.source import Checkpoint, open_checkpoint
from blip2.checkpoint.verify import compare_logits, compare_tensors
from blip2.images import ImageProcessor
from blip2.modeling.config import Blip2Config, MatcherConfig
from blip2.tensorfiles.tensors import CheckpointError, TensorInfo, Tensors
from blip2.tensorfiles.writers import PDPARAMS, SAFETENSORS, TORCH, Kind, write_files

World = Literal["hf", "paddle", "lavis"]
KINDS: Mapping[str, Kind] = {"hf": SAFETENSORS, "paddle": PDPARAMS, "lavis": TORCH}
SMALLEST_EXACT = "smallest-exact"
_HEAD = "language_model.lm_head.weight"

Progress = Callable[[str, int, int], None]  # what is done, bytes since the last call, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. Sizes in bytes, of the values alone.

    narrowed: tensors that `smallest-exact` found to fit into 16 bits.
    verified: what was compared afterwards, in words; empty where it was not asked for.
    """

    folder: Path
    layout: str
    tensors: int
    read_bytes: int
    written_bytes: int
    narrowed: int
    verified: str


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: World,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    verify: bool = False,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint.

    Args:
        source: what `load_model` takes.
        target: a new folder.
        to: "hf", transformers' layout; "paddle", PaddleNLP's (and for the stage-1 model, which PaddleNLP has not,
            PaddleMIX's); "lavis", LAVIS's.
        dtype: "fp32", "fp16", "bf16"; None: as it is; "smallest-exact": 16 bits where not one value changes.
        shard_bytes: start another file when one would grow beyond this. None: 5 GB for "hf", one file for the others.
        verify: read the result back before it takes its place, and compare every value, and the outputs for an image.
        vision, language: the parts that LAVIS's checkpoints leave out, as `load_model` takes them.

    Raises:
        ValueError: an unknown world or dtype, or shards for LAVIS, which has none.
        CheckpointError: a source that is broken or lacks something, a value that the dtype cannot hold, a target that
            exists, a full disk, or a result that is not what was written.
    """
    if to not in KINDS:
        raise ValueError(f"to={to!r} is not known; choose one of {', '.join(KINDS)}")
    if shard_bytes is not None and (to == "lavis" or shard_bytes < 1):
        raise ValueError(
            "LAVIS reads one file: no shards" if to == "lavis" else f"shards of {shard_bytes} bytes"
        )
    if dtype != SMALLEST_EXACT:
        parse_dtype(dtype)
    report = progress or (lambda what, done, total: None)
    parts = [None if part is None else resolve(part) for part in (vision, language)]
    with open_checkpoint(resolve(source), vision=parts[0], language=parts[1]) as found:
        config, tensors, tied = normalize(found)
        layout = _layout(to, config)
        stored = as_layout(tensors, layout)
        dtypes, narrowed = _dtypes(stored, dtype, report)
        info = {name: replace(stored.info(name), dtype=dtypes[name]) for name in stored}
        total = sum(stored.info(name).nbytes for name in stored)
        words = next(
            (each for each in (found.folder, parts[1]) if each is not None and has_tokenizer(each)), None
        )
        changed = {} if words is None else tokenizer_changes(words, paddle=to == "paddle")
        folder = Path(target)
        with new_folder(folder) as beside:
            index = write_files(
                beside,
                KINDS[to],
                info,
                lambda name: _converted(stored, name, dtypes[name], report, total),
                shard_bytes if shard_bytes is not None or to != "hf" else SHARD_BYTES,
            )
            if index is not None:
                write_json(beside / KINDS[to].index, index)
            write_settings(beside, folder, to, found, config, info, tied, words, changed)
            verified = ""
            if verify:
                narrow = None if dtype == SMALLEST_EXACT else parse_dtype(dtype)
                with open_checkpoint(beside) as written:
                    count = compare_tensors(tensors, written.tensors, narrow, report)
                    logits = compare_logits(found, written, narrow)
                rounded = "" if narrow is None else f" after rounding to {dtype}"
                verified = f"{count} tensors bit by bit{rounded}; {logits}"
    written_bytes = sum(entry.nbytes for entry in info.values())
    return Conversion(folder, layout.name, len(info), total, written_bytes, narrowed, verified)


def _layout(to: World, config: Blip2Config | MatcherConfig) -> Layout:
    if to == "paddle":
        return PADDLEMIX if isinstance(config, MatcherConfig) else PADDLENLP
    return HUGGING_FACE if to == "hf" else LAVIS


def normalize(found: Checkpoint) -> tuple[Blip2Config | MatcherConfig, Tensors, bool]:
    """A checkpoint's config, its tensors under Hugging Face's names, each once, and whether the head is left out.

    A head that is the word embeddings' weight is left out, unless the settings say that it is one of its own.

    Raises:
        CheckpointError, ConfigError: as `load_model`.
    """
    wanted = found.required()
    model, names, tied = match_state_dict(wanted, found.tensors, our_names(found.tensors))
    config = model.config
    kept = {to_hugging_face(ours): names[ours] for ours in model.state_dict()}
    if isinstance(wanted, Blip2Config) and isinstance(config, Blip2Config) and tied:
        tied = wanted.language.tie_word_embeddings or _HEAD not in found.tensors
        if tied:
            del kept[_HEAD]
        config = replace(config, language=replace(config.language, tie_word_embeddings=tied))
    pieces = {name: Piece(found.tensors.info(stored), (stored,)) for name, stored in kept.items()}
    return config, view(found.tensors, pieces), tied


# --- values -----------------------------------------------------------------------------------------------------------


def _converted(
    stored: Tensors, name: str, dtype: torch.dtype, report: Progress, total: int
) -> Iterator[Tensor]:
    for block in read_blocks(stored, name):
        out = block.to(dtype)
        if block.dtype != dtype and bool(out.isinf().any()) and bool((out.isinf() & ~block.isinf()).any()):
            raise CheckpointError(
                f"{name} holds values beyond the range of {dtype} ({torch.finfo(dtype).max:.6g}); use a wider dtype"
            )
        yield out
        report("write", block.numel() * block.dtype.itemsize, total)


def _dtypes(stored: Tensors, wanted: str | None, report: Progress) -> tuple[dict[str, torch.dtype], int]:
    """The dtype to store each tensor in, and how many were made smaller without a change."""
    as_it_is = {name: stored.info(name).dtype for name in stored}
    if wanted != SMALLEST_EXACT:
        target = parse_dtype(wanted)
        return {
            name: target if target is not None and dtype.is_floating_point else dtype
            for name, dtype in as_it_is.items()
        }, 0
    wide = [name for name, dtype in as_it_is.items() if dtype in (torch.float32, torch.float64)]
    total = sum(stored.info(name).nbytes for name in wide)
    fits = {name: _exact_in(stored, name, report, total) for name in wide}
    counts: Counter[torch.dtype] = Counter()  # one dtype for as much as possible: a model's parts run in one
    for name, dtypes in fits.items():
        for dtype in dtypes:
            counts[dtype] += math.prod(stored.info(name).shape)
    chosen = {
        name: max(dtypes, key=counts.__getitem__) if dtypes else as_it_is[name]
        for name, dtypes in fits.items()
    }
    return as_it_is | chosen, sum(chosen[name] != as_it_is[name] for name in chosen)


def _exact_in(stored: Tensors, name: str, report: Progress, total: int) -> list[torch.dtype]:
    """The 16-bit dtypes that hold every value of a tensor as it is."""
    candidates = [torch.bfloat16, torch.float16]
    for block in read_blocks(stored, name):
        bits = block.view(torch.uint8)
        candidates = [
            each for each in candidates if torch.equal(block.to(each).to(block.dtype).view(torch.uint8), bits)
        ]
        report("scan", block.numel() * block.dtype.itemsize, total)
        if not candidates:
            break
    return candidates


# --- settings ---------------------------------------------------------------------------------------------------------


def write_settings(
    beside: Path,
    folder: Path,
    to: World,
    found: Checkpoint,
    config: Blip2Config | MatcherConfig,
    info: Mapping[str, TensorInfo],
    tied: bool,
    words: Path | None,
    changed: Mapping[str, str],
) -> None:
    """The files beside the weights, as the other world wants them.

    `words`: where the tokenizer is; `changed`: those of its files that the other world wants otherwise.
    """
    image_processor = ImageProcessor.load(found.folder, config.vision.image_size)
    files: dict[str, Any] = settings(config, info, tied, words, image_processor)
    generation = found.folder / "generation_config.json"
    if to == "paddle":
        dtype = files["config.json"]["torch_dtype"]
        files = {
            "config.json": to_paddle(config, dtype),
            "preprocessor_config.json": image_processor.to_dict(),
        }
    elif to == "lavis":
        write_text(beside / "config.yaml", to_lavis(config, str(folder.absolute() / TORCH.single)))
        files = {name: files[name] for name in ("config.json", "preprocessor_config.json")}
    elif found.layout is HUGGING_FACE and generation.is_file():
        del files["generation_config.json"]
        copy_file(generation, beside)
    for name, value in files.items():
        write_json(beside / name, value)
    if words is not None:
        for file in tokenizer_files(words):
            if file.name not in changed:
                copy_file(file, beside)
        for name, text in changed.items():
            write_text(beside / name, text)
