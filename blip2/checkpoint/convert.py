"""A checkpoint of any layout -> a folder in another, one tensor in memory at a time.

The folder appears complete or not at all: a conversion that was interrupted leaves nothing in its place and is started
again. Values are changed by nothing but a `dtype`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from blip2.calibration import FILE as CALIBRATION
from blip2.calibration import Calibration
from blip2.checkpoint.formats.lavis import LAVIS, to_lavis_config
from blip2.checkpoint.formats.paddle import PADDLEMIX, PADDLENLP, to_paddle_config, tokenizer_changes
from blip2.checkpoint.key_mapping import HF_HEAD, to_hugging_face
from blip2.checkpoint.layouts import HUGGING_FACE
from blip2.checkpoint.load import match_state_dict, our_names, parse_dtype
from blip2.checkpoint.remap import from_hf_layout, rename_tensors, same_bits
from blip2.checkpoint.save import SHARD_BYTES, new_model_folder, settings, tokenizer_files
from blip2.checkpoint.source import Checkpoint, open_checkpoint
from blip2.checkpoint.verify import compare_logits, compare_stems, compare_tensors
from blip2.checkpoint.weights import check_weights
from blip2.images import ImageProcessor, read_image_settings
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig
from blip2.stemfiles import STEM_FILE
from blip2.storage import Content
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.strict_json import read_json
from blip2.tensorfiles.tensors import TensorInfo, Tensors
from blip2.tensorfiles.writers import PDPARAMS, SAFETENSORS, TORCH, FileKind, Read

Format = Literal["hf", "paddle", "lavis"]
KINDS: Mapping[str, FileKind] = {"hf": SAFETENSORS, "paddle": PDPARAMS, "lavis": TORCH}
SMALLEST_EXACT = "smallest-exact"

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is done, bytes since the last call, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. Sizes in bytes, of the values alone.

    narrowed: tensors that `smallest-exact` found to fit into 16 bits.
    verified: what was compared afterwards, in words; empty without `verify`.
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
    to: Format,
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
        ValueError: an unknown format or dtype, or shards for LAVIS, which has none.
        CheckpointError: a source that is broken or lacks something, a stem where `to` is not "hf", a value that the
            dtype cannot hold, a target that exists, a full disk, or a result that is not what was written.
    """
    if to not in KINDS:
        raise ValueError(f"to={to!r} is not known; choose one of {', '.join(KINDS)}")
    if shard_bytes is not None and (to == "lavis" or shard_bytes < 1):
        raise ValueError(
            "LAVIS reads one file: no shards" if to == "lavis" else f"shards of {shard_bytes} bytes"
        )
    narrow = None if dtype == SMALLEST_EXACT else parse_dtype(dtype)
    report = progress or (lambda what, done, total: None)
    with open_checkpoint(source, vision=vision, language=language) as checkpoint:
        original = normalize(checkpoint)
        if to != "hf":
            _refuse_stem(checkpoint, to)
        if verify:  # outputs of weights that are not finite cannot be compared
            check_weights(checkpoint.tensors)
        layout = {"hf": HUGGING_FACE, "paddle": PADDLENLP, "lavis": LAVIS}[to]
        if to == "paddle" and isinstance(original.config, MatcherConfig):
            layout = PADDLEMIX
        stored = from_hf_layout(original.tensors, layout)
        dtypes, narrowed = _dtypes(stored, dtype, report)
        info = {name: replace(stored.info(name), dtype=dtypes[name]) for name in stored}
        total = stored.nbytes
        folder, verified = Path(target), ""

        def read(name: str) -> Iterator[Tensor]:
            return _converted(stored, name, dtypes[name], report, total)

        limit = shard_bytes if shard_bytes is not None or to != "hf" else SHARD_BYTES
        with new_checkpoint(folder, original, to, info, read, limit) as beside:
            if verify:
                with open_checkpoint(beside) as written:
                    count = compare_tensors(original.tensors, written.tensors, narrow, report)
                    logits = compare_logits(checkpoint, written, narrow) + compare_stems(checkpoint, written)
                rounding = "" if narrow is None else f" after rounding to {dtype}"
                verified = f"{count} tensors bit by bit{rounding}; {logits}"
    written_bytes = sum(entry.nbytes for entry in info.values())
    return Conversion(folder, layout.name, len(info), total, written_bytes, narrowed, verified)


@dataclass(frozen=True)
class NormalizedCheckpoint:
    """A checkpoint's tensors under Hugging Face's names, each once; tied: the head is left out.

    model: the model they fill, without values. config: its config.
    """

    checkpoint: Checkpoint
    model: Blip2 | Blip2Matcher
    config: Blip2Config | MatcherConfig
    tensors: Tensors
    tied: bool


def normalize(checkpoint: Checkpoint) -> NormalizedCheckpoint:
    """What a checkpoint holds, whatever its layout.

    A head that is the word embeddings' weight is left out, unless the settings make it a weight of its own.

    Raises:
        CheckpointError, ConfigError: as `load_model`.
    """
    stored_config, tensors = checkpoint.required(), checkpoint.tensors
    model, names, tied = match_state_dict(stored_config, tensors, our_names(tensors))
    config = model.config
    kept = {to_hugging_face(ours): names[ours] for ours in model.state_dict()}
    if isinstance(stored_config, Blip2Config) and isinstance(config, Blip2Config) and tied:
        tied = stored_config.language.tie_word_embeddings or HF_HEAD not in tensors
        if tied:
            del kept[HF_HEAD]
        config = replace(config, language=replace(config.language, tie_word_embeddings=tied))
    return NormalizedCheckpoint(checkpoint, model, config, rename_tensors(tensors, kept), tied)


def _refuse_stem(checkpoint: Checkpoint, to: Format) -> None:
    """Raises CheckpointError where images go through a stem, of which the other layouts and their code know nothing."""
    if "stem" in read_image_settings(checkpoint.folder):
        theirs = "LAVIS" if to == "lavis" else "Paddle"
        raise CheckpointError(
            f"{checkpoint.folder} reads images through a stem ({STEM_FILE}), which {theirs} does not have: there the "
            "model would get plain pixels and write nonsense; convert it to 'hf' alone"
        )


def _converted(
    stored: Tensors, name: str, dtype: torch.dtype, report: Progress, total: int
) -> Iterator[Tensor]:
    for block in stored.blocks(name):
        out = block.to(dtype)
        if block.dtype != dtype and bool(out.isinf().any()) and bool((out.isinf() & ~block.isinf()).any()):
            raise CheckpointError(
                f"{name} holds values beyond the range of {dtype} ({torch.finfo(dtype).max:.6g}); use a wider dtype"
            )
        yield out
        report("write", block.nbytes, total)


def _dtypes(stored: Tensors, target: str | None, report: Progress) -> tuple[dict[str, torch.dtype], int]:
    """The dtype to store each tensor in, and how many were made smaller without a change."""
    as_it_is = {name: stored.info(name).dtype for name in stored}
    if target != SMALLEST_EXACT:
        narrow = parse_dtype(target)
        return {n: (narrow or d) if d.is_floating_point else d for n, d in as_it_is.items()}, 0
    wide = [name for name, dtype in as_it_is.items() if dtype in (torch.float32, torch.float64)]
    total = sum(stored.info(name).nbytes for name in wide)
    fits = {name: _exact_in(stored, name, report, total) for name in wide}
    counts: Counter[torch.dtype] = Counter()  # one dtype for as much as possible: a model's parts run in one
    for name, dtypes in fits.items():
        for dtype in dtypes:
            counts[dtype] += stored.info(name).numel
    chosen = {name: max(dtypes, key=counts.__getitem__) for name, dtypes in fits.items() if dtypes}
    return as_it_is | chosen, len(chosen)


def _exact_in(stored: Tensors, name: str, report: Progress, total: int) -> list[torch.dtype]:
    """The 16-bit dtypes that hold every value of a tensor as it is."""
    candidates = [torch.bfloat16, torch.float16]
    for block in stored.blocks(name):
        candidates = [dtype for dtype in candidates if same_bits(block, block.to(dtype))]
        report("scan", block.nbytes, total)
        if not candidates:
            break
    return candidates


def new_checkpoint(
    folder: Path,
    original: NormalizedCheckpoint,
    to: Format,
    info: Mapping[str, TensorInfo],
    read: Read,
    shard_bytes: int | None,
) -> AbstractContextManager[Path]:
    """Write a checkpoint in a format: tensors, settings and tokenizer; see `new_model_folder`."""
    checkpoint, config, tokenizer = original.checkpoint, original.config, original.checkpoint.tokenizer
    image_processor = ImageProcessor.load(checkpoint.folder, config.vision.image_size)
    hf_files = settings(config, info, original.tied, tokenizer, image_processor)
    files: dict[str, Content] = {**hf_files}
    generation = checkpoint.folder / "generation_config.json"
    if to != "hf":
        files = {name: hf_files[name] for name in ("config.json", "preprocessor_config.json")}
    elif checkpoint.layout is HUGGING_FACE and generation.is_file():
        read_json(generation)  # copied as it is, but nothing that is none
        files[generation.name] = generation
    if to == "paddle":
        files["config.json"] = to_paddle_config(config, hf_files["config.json"]["torch_dtype"])
    elif to == "lavis":
        files["config.yaml"] = to_lavis_config(config, str(folder.absolute() / TORCH.file))
    files |= image_processor.files()
    if tokenizer is not None:
        files |= {**tokenizer_files(tokenizer), **tokenizer_changes(tokenizer, paddle=to == "paddle")}
    files |= _calibration_files(checkpoint.folder, to)
    return new_model_folder(folder, files, KINDS[to], info, read, shard_bytes)


def _calibration_files(folder: Path, to: Format) -> dict[str, Content]:
    """The calibration of a checkpoint's folder, where it has one and the format can hold it."""
    calibration = Calibration.load(folder)  # nothing broken is passed on
    if calibration is None:
        return {}
    if to != "hf":
        log.warning("%s is left out: %s's layout has no place for it", folder / CALIBRATION, to)
        return {}
    return {CALIBRATION: calibration.to_dict()}
