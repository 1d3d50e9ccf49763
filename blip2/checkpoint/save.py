"""A model -> a folder in Hugging Face's layout, which transformers opens. The folder appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.checkpoint.files import INDEX_FILE, SINGLE_FILE
from blip2.checkpoint.load import Unfilled, parse_dtype
from blip2.checkpoint.names import to_hugging_face
from blip2.checkpoint.safetensors_files import sync, write_tensors
from blip2.checkpoint.tensors import CheckpointError, TensorInfo
from blip2.config import Blip2Config, MatcherConfig, to_hf
from blip2.images import ImageProcessing
from blip2.model import Blip2, Blip2Matcher
from blip2.text import TOKENIZER_FILES, Tokenizer

SHARD_BYTES = 5_000_000_000
_HEAD = "language.lm_head.weight"


def save_model(
    model: Blip2 | Blip2Matcher,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    processing: ImageProcessing | None = None,
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model so that `load_model` and transformers open it.

    Everything is written to a folder beside the target, handed to the disk and then renamed, so that an interrupted
    save leaves no half-written model. One tensor at a time is converted. A tied head is stored once.

    Args:
        folder: where to; it must not exist yet, or be empty.
        tokenizer: the folder whose tokenizer files are copied.
        processing: how images are prepared; None is BLIP-2's own way at the model's image size.
        dtype: of the stored weights; None as they are in the model.
        shard_bytes: start another file when one would grow beyond this.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something already, the model is quantized, or writing failed.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; save to a new folder, or remove it first")
    state, tied = _state(model)
    wanted = parse_dtype(dtype)
    info = {name: TensorInfo(tuple(tensor.shape), wanted or tensor.dtype) for name, tensor in state.items()}
    beside = target.absolute().parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        beside.mkdir(parents=True)
        for name, value in _settings(model, info, tied, tokenizer, processing).items():
            _write_json(beside / name, value)
        for source in () if tokenizer is None else _tokenizer_files(Path(tokenizer)):
            shutil.copyfile(source, beside / source.name)
            with (beside / source.name).open("rb") as file:
                sync(file)
        _write_shards(beside, state, info, shard_bytes)
        _sync_folder(beside)
        if target.is_dir():
            target.rmdir()
        beside.rename(target)
        _sync_folder(target.absolute().parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}); nothing was saved"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _state(model: Blip2 | Blip2Matcher) -> tuple[dict[str, Tensor], bool]:
    """The model's tensors under Hugging Face's names, and whether its head is the word embeddings' weight."""
    state = model.state_dict()
    tied = isinstance(model, Blip2) and model.language.lm_head.weight is model.language.embed_tokens.weight
    with torch.device("meta"), Unfilled():
        plain = (
            Blip2(model.config)
            if isinstance(model, Blip2)
            else Blip2Matcher(model.config, itg=model.itg_head is not None)
        )
    if state.keys() != plain.state_dict().keys():
        raise CheckpointError("the model is quantized or changed; only a model as it was loaded can be saved")
    if tied:
        del state[_HEAD]
    return {to_hugging_face(name): tensor for name, tensor in state.items()}, tied


def _settings(
    model: Blip2 | Blip2Matcher,
    info: Mapping[str, TensorInfo],
    tied: bool,
    tokenizer: str | Path | None,
    processing: ImageProcessing | None,
) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights."""
    config: Blip2Config | MatcherConfig = model.config
    processor: dict[str, Any] = {"processor_class": "Blip2Processor"}
    files: dict[str, dict[str, Any]] = {}
    if isinstance(config, Blip2Config):
        language = replace(config.language, tie_word_embeddings=tied)
        if config.image_token_id is None and tokenizer is not None:
            config = replace(config, image_token_id=_image_token(Path(tokenizer), language.vocab_size))
        config = replace(config, language=language)
        if config.image_token_id is not None:
            processor["num_query_tokens"] = config.num_query_tokens
        end = language.eos_token_id
        files["generation_config.json"] = {
            "bos_token_id": language.bos_token_id,
            "eos_token_id": (list(end) or None) if isinstance(end, tuple) else end,
            "pad_token_id": language.pad_token_id,
        }
    counts: Counter[torch.dtype] = Counter()
    for entry in info.values():
        counts[entry.dtype] += entry.nbytes
    main = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    files["config.json"] = to_hf(config) | {"torch_dtype": main}
    files["preprocessor_config.json"] = (processing or ImageProcessing(config.vision.image_size)).to_dict()
    files["processor_config.json"] = processor
    return files


def _image_token(tokenizer: Path, vocab_size: int) -> int | None:
    """The id transformers' processor lets the queries stand for: `<image>`, or the first id after the tokenizer's."""
    words = Tokenizer.load(tokenizer)
    found = words.token_id("<image>")
    found = len(words) if found is None else found
    return found if found < vocab_size else None


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} holds no tokenizer files")
    return found


def _write_shards(
    folder: Path, state: Mapping[str, Tensor], info: Mapping[str, TensorInfo], limit: int
) -> None:
    shards: list[dict[str, TensorInfo]] = [{}]
    room = limit
    for name, entry in info.items():
        if shards[-1] and entry.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= entry.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard, lambda name: state[name].to(info[name].dtype))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in info.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        sync(file)


def _sync_folder(folder: Path) -> None:
    """Hand a folder's list of names to the disk, where the system can (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
