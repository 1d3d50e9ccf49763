"""A model -> a folder in Hugging Face's layout, which transformers opens. The folder appears complete or not at all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.calibration import FILE as CALIBRATION
from blip2.calibration import Calibration
from blip2.checkpoint.key_mapping import HEAD, to_hugging_face
from blip2.checkpoint.load import allocate_model, parse_dtype
from blip2.images import ImageProcessor
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig, to_hf
from blip2.storage import Content, new_folder, sync, write_file
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.tensors import TensorInfo, blocks
from blip2.tensorfiles.writers import SAFETENSORS, FileKind, Read
from blip2.text import TOKENIZER_FILES, Tokenizer

SHARD_BYTES = 5_000_000_000

log = logging.getLogger(__name__)


def save_model(
    model: Blip2 | Blip2Matcher,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    image_processor: ImageProcessor | None = None,
    calibration: Calibration | None = None,
    dtype: torch.dtype | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model so that `load_model` and transformers open it; gives its folder.

    Everything is written to a folder beside the target, flushed to the disk and then renamed, so that an interrupted
    save leaves no half-written model. One tensor at a time is converted. A tied head is stored once.

    Args:
        folder: the new folder; it must not exist yet, or be empty.
        tokenizer: the folder whose tokenizer files are copied.
        image_processor: how images are prepared; None is BLIP-2's own way at the model's image size. The file of its
            stem is copied.
        calibration: how likely the model's captions are right; only of the same weights, not of others before they
            were trained.
        dtype: of the stored weights; None as they are in the model.
        shard_bytes: start another file when one would grow beyond this.

    Raises:
        CheckpointError: the folder holds something already, the model is quantized, or writing failed.
    """
    target = Path(folder)
    state, tied = _state(model)
    target_dtype = parse_dtype(dtype)
    info = {n: TensorInfo(tuple(t.shape), target_dtype or t.dtype) for n, t in state.items()}
    files: dict[str, Content] = {**settings(model.config, info, tied, tokenizer, image_processor)}
    if image_processor is not None:
        files |= image_processor.files()
    if tokenizer is not None:
        files |= tokenizer_files(Path(tokenizer))
    if calibration is not None:
        files[CALIBRATION] = calibration.to_dict()
    elif tokenizer is not None and (source := Path(tokenizer) / CALIBRATION).is_file():
        log.warning(
            "%s is left out: it does not hold for weights that were trained after it was made", source
        )

    def read(name: str) -> Iterator[Tensor]:
        return (block.to(info[name].dtype) for block in blocks(state[name].detach().cpu()))

    with new_model_folder(target, files, SAFETENSORS, info, read, shard_bytes):
        return target


@contextmanager
def new_model_folder(
    folder: Path,
    files: Mapping[str, Content],
    kind: FileKind,
    info: Mapping[str, TensorInfo],
    read: Read,
    shard_bytes: int | None,
) -> Iterator[Path]:
    """Write a model's folder; gives it until the block ends without an error, then it takes the place of `folder`.

    Args:
        files: what is beside the tensors, by name.
        kind, info, read: the kind of tensor files, the tensors as they are to be stored, and their values.
        shard_bytes: start another file when one would grow beyond this; None: one file.

    Raises:
        CheckpointError: the place is taken, or the disk refuses.
    """
    with new_folder(folder) as beside:
        write_files(beside, kind, info, read, shard_bytes)
        for name, content in files.items():
            write_file(beside / name, content)
        yield beside


def write_files(
    folder: Path, kind: FileKind, info: Mapping[str, TensorInfo], read: Read, limit: int | None
) -> None:
    """Write tensors to as many files as `limit`, bytes in each, needs (None: one); to several, with their index."""
    shards: list[dict[str, TensorInfo]] = [{}]
    room = limit or 0
    for name, entry in info.items():
        if limit is not None and shards[-1] and entry.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= entry.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        path = folder / kind.file
        if len(shards) > 1:
            path = path.with_stem(f"{path.stem}-{i:05}-of-{len(shards):05}")
        with path.open("wb") as file:
            kind.write(file, shard, read)
        sync(path)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in info.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(folder / f"{kind.file}.index.json", index)


def _state(model: Blip2 | Blip2Matcher) -> tuple[dict[str, Tensor], bool]:
    """The model's tensors under Hugging Face's names, and whether its head is the word embeddings' weight."""
    state = model.state_dict()
    itg = isinstance(model, Blip2Matcher) and model.itg_head is not None
    if state.keys() != allocate_model(model.config, itg=itg).state_dict().keys():
        raise CheckpointError("the model is quantized or changed; only a model as it was loaded can be saved")
    tied = isinstance(model, Blip2) and model.language.tied
    if tied:
        del state[HEAD]
    return {to_hugging_face(name): tensor for name, tensor in state.items()}, tied


def settings(
    config: Blip2Config | MatcherConfig,
    info: Mapping[str, TensorInfo],
    tied: bool,
    tokenizer: str | Path | None,
    image_processor: ImageProcessor | None,
) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights of a folder in Hugging Face's layout.

    Args:
        info: the tensors that are stored. tied: whether the head is left out of them.
    """
    processor: dict[str, Any] = {"processor_class": "Blip2Processor"}
    files: dict[str, dict[str, Any]] = {}
    if isinstance(config, Blip2Config):
        config = replace(config, language=replace(config.language, tie_word_embeddings=tied))
        if config.image_token_id is None and tokenizer is not None:
            image = _image_token(Path(tokenizer), config.language.vocab_size)
            config = replace(config, image_token_id=image)
        if config.image_token_id is not None:
            processor["num_query_tokens"] = config.num_query_tokens
        text_config = to_hf(config)["text_config"]
        names = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
        files["generation_config.json"] = {name: text_config[name] for name in names if name in text_config}
    counts: Counter[torch.dtype] = Counter()
    for entry in info.values():
        counts[entry.dtype] += entry.nbytes
    main = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    files["config.json"] = to_hf(config) | {"torch_dtype": main}
    image_processor = image_processor or ImageProcessor(config.vision.image_size)
    files["preprocessor_config.json"] = image_processor.to_dict()
    files["processor_config.json"] = processor
    return files


def _image_token(tokenizer: Path, vocab_size: int) -> int | None:
    """The id that transformers' processor replaces by the queries: `<image>`, or the first id after the tokenizer's."""
    known = Tokenizer.load(tokenizer)
    image = known.token_id("<image>")
    image = len(known) if image is None else image
    return image if image < vocab_size else None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer files in a folder, by name. Raises CheckpointError where there are none."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not files:
        raise CheckpointError(f"{folder} holds no tokenizer files")
    return files
