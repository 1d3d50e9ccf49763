"""A checkpoint -> a model, strictly: every tensor of the file has a place in the model, and every place a tensor.

Tensors whose dtype stays are mapped from the file, so a model takes the memory of its weights once and is ready as soon
as it is built. Do not overwrite a file in place while a model loaded from it is in use (`save_model` never does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blip2.checkpoint.hub import resolve_path
from blip2.checkpoint.key_mapping import HEAD, from_hugging_face
from blip2.checkpoint.remap import equal_values
from blip2.checkpoint.source import Checkpoint, folder_of, has_tokenizer, open_checkpoint
from blip2.checkpoint.weights import check_range, check_weights
from blip2.images import ImageProcessor
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import MAX_SIZE, Blip2Config, MatcherConfig, Mode, read_config
from blip2.modeling.layers import cpu_has_bf16
from blip2.quantization import apply
from blip2.quantization.apply import EMBEDDINGS
from blip2.quantization.formats import Int4Weight, QuantizedWeight, read_quantized, stored_mode
from blip2.quantization.linear import openvino_multiplies
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.strict_json import read_json
from blip2.tensorfiles.tensors import Tensors
from blip2.text import Tokenizer

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip

# Buffers of older files that hold no weights: counted positions, and a version number.
DROPPED = frozenset(
    {"embeddings.position_ids", "qformer.embeddings.position_ids", "language_model.model.decoder.version"}
)
# T5's matrices that overflow in fp16, whose range ends at 65504. Kept in fp32 as transformers keeps them.
_OVERFLOWS = ".DenseReluDense.wo.weight"
# What runs together and therefore has one dtype. Between parts the model converts what it passes on.
_PARTS: Mapping[str, str] = {
    "vision": "vision",
    "qformer": "qformer",
    "itg_head": "qformer",
    "projection": "language",
    "language": "language",
}


class SkipInit(TorchFunctionMode):
    """Modules built under this keep their parameters as allocated: the checkpoint's values come anyway.

    On the meta device torch would import its compiler to pretend to fill them, which takes longer than torch itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    quantize: Mode | None = None,
    prepack: bool = False,
) -> Blip2 | Blip2Matcher:
    """Load a model in eval mode, from Hugging Face's layout, LAVIS's, PaddleNLP's or PaddleMIX's.

    Args:
        path: a folder, a tensor file, or a name on the Hub. Settings are in the config.json beside the tensors; LAVIS's
            files have none, and their shapes tell.
        dtype: of all weights: a torch dtype, "fp32", "bf16", "fp16" or "fp64"; in fp16 some of T5's stay in fp32. None:
            as stored, where each of image encoder, Q-Former and language model with its projection has the dtype most
            of its stored values have.
        device: where the weights go.
        revision: branch, tag or commit of a model on the Hub.
        vision, language: the image encoder and the language model, for a checkpoint that was saved without them, as
            LAVIS does: a tensor file, a folder, or a name on the Hub.
        quantize: "int8" or "int4": quantize the linear layers' weights, one at a time, so that no more than the
            quantized ones are ever in memory; see `blip2.quantization.apply`.
        prepack: for inference: pack bf16 weights for this CPU, where it has bf16 (see `PackedLinear`). They are then
            read from the file one by one, not mapped. Such a model cannot be trained until it is unpacked.

    Raises:
        CheckpointError: not found, unreadable, tensors missing, left over or of another shape than config.json says, or
            weights that are not finite, in the file or in the dtype.
        ConfigError: config.json describes no model this package builds.
    """
    target_dtype = parse_dtype(dtype)
    with open_checkpoint(path, revision, vision=vision, language=language) as checkpoint:
        return load_checkpoint(checkpoint, target_dtype, torch.device(device), quantize, prepack)[0]


def load_checkpoint(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: Mode | None = None,
    prepack: bool = False,
) -> tuple[Blip2 | Blip2Matcher, str]:
    """As `load_model`, from an open checkpoint; gives the model and the digest of its files' weights."""
    config = checkpoint.required()  # what is wrong with the settings is reported first
    matched = match_state_dict(config, checkpoint.tensors, our_names(checkpoint.tensors))
    digest = check_weights(checkpoint.tensors)
    return build_model(matched, checkpoint.tensors, dtype, device, quantize, prepack), digest


def count_parameters(
    path: Path, *, vision: str | Path | None = None, language: str | Path | None = None
) -> int:
    """How many values a checkpoint holds, the parts from elsewhere counted in; arguments as `load_model`'s."""
    with open_checkpoint(path, vision=vision, language=language) as checkpoint:
        return checkpoint.tensors.numel


def stored_as(path: Path) -> Mode | None:
    """How a checkpoint's weights are quantized; None where they are floats."""
    with open_checkpoint(path) as checkpoint:
        return stored_mode(checkpoint.tensors)


def load_processors(
    path: str | Path,
    *,
    revision: str | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> tuple[ImageProcessor, Tokenizer]:
    """How a checkpoint's images and texts are prepared; the tokenizer is the language model's where that is given.

    Args:
        device: where a stem runs.

    Raises:
        CheckpointError, ConfigError, ImageError, TextError: a file is missing or broken.
    """
    file = resolve_path(path, revision)
    folder = folder_of(file)
    if (folder / "config.json").is_file():
        size = read_config_file(folder).vision.image_size
    else:
        with open_checkpoint(file, vision=vision, language=language) as checkpoint:
            size = checkpoint.required().vision.image_size
    tokenizer_folder = folder if language is None or has_tokenizer(folder) else resolve_path(language)
    return ImageProcessor.load(folder, size, device), Tokenizer.load(tokenizer_folder)


def read_config_file(folder: Path) -> Blip2Config | MatcherConfig:
    """The config.json of a checkpoint's folder."""
    return read_config(read_json(folder / "config.json"))


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype or its name -> the dtype; None stays None. Raises CheckpointError for any other."""
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and parsed not in DTYPES.values():
        raise CheckpointError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return parsed


def build_model(
    matched: tuple[Blip2 | Blip2Matcher, dict[str, str], bool],
    tensors: Tensors,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: Mode | None = None,
    prepack: bool = False,
) -> Blip2 | Blip2Matcher:
    """A model in eval mode from tensors in Hugging Face's layout.

    Args:
        matched: what `match_state_dict` gives for these tensors.
        dtype, quantize, prepack: see `load_model`.
    """
    model, names, tied = matched
    config = model.config
    dtypes = _part_dtypes(tensors, names, dtype)
    weights, on_cpu = names, device.type == "cpu"
    packed: dict[str, Callable[[], Tensor]] = {}
    quantize = quantize or stored_mode(tensors)
    if quantize is not None:

        def read(name: str, kind: type[QuantizedWeight]) -> QuantizedWeight:
            # word embeddings are looked up as they are stored: only the words that occur are ever read
            mapped = name in EMBEDDINGS or (kind is Int4Weight and on_cpu and openvino_multiplies())
            return read_quantized(tensors, weights[f"{name}.weight"], kind, mapped=mapped).to(device)

        apply.quantize_model(model, quantize, read)
        rest = model.state_dict()
        names, tied = {ours: stored for ours, stored in names.items() if ours in rest}, False
        dtypes = dict.fromkeys(dtypes, dtype or torch.float32)
    elif tied:
        del names[HEAD]
    for ours, stored in weights.items():
        check_range(tensors, stored, _target(ours, dtypes) if ours in names else torch.float32)
    if prepack and on_cpu and cpu_has_bf16():
        # beside quantized weights, where no dtype is given, what is left of the linear layers is bf16 too
        narrow = quantize is not None and dtype is None
        packed = {
            name: partial(tensors.copy, names[f"{name}.weight"])
            for name, _ in apply.linear_layers(model)
            # a head that is the word embeddings' weight, which is not among them, is needed as it is
            if (narrow or dtypes[_part(name)] == torch.bfloat16) and f"{name}.weight" in names
        }
        apply.prepack(model, packed)
        names = {ours: stored for ours, stored in names.items() if ours.removesuffix(".weight") not in packed}
    state: dict[str, Tensor] = {}
    for ours, stored in names.items():
        target = _target(ours, dtypes)
        unchanged = tensors.info(stored).dtype == target and on_cpu
        state[ours] = tensors[stored] if unchanged else tensors.copy(stored).to(device, target)
    if tied:
        assert isinstance(config, Blip2Config)
        state[HEAD] = state[embeddings_weight(config)]
    absent = model.load_state_dict(state, strict=False, assign=True)  # packed weights are in place already
    assert not absent.unexpected_keys and {*absent.missing_keys} == {f"{name}.weight" for name in packed}
    if tied:
        assert isinstance(model, Blip2)
        model.language.tie()
    apply.widen(model)
    return model.eval()


def match_state_dict(
    config: Blip2Config | MatcherConfig, tensors: Tensors, names: Mapping[str, str]
) -> tuple[Blip2 | Blip2Matcher, dict[str, str], bool]:
    """The model these tensors fill, without values.

    Returns:
        the model, on the meta device; our names -> those in `tensors`, one for every tensor of the model; and whether
        the language model's head is the word embeddings' weight.

    Raises:
        CheckpointError: tensors missing, left over or of another shape than the config says.
    """
    names = dict(names)
    tied = isinstance(config, Blip2Config) and _share_head(tensors, names, embeddings_weight(config))
    model = empty_model(config, tensors, names, tied=tied)
    _check(model.state_dict(), tensors, names)
    if isinstance(model, Blip2):
        start, words = model.config.language.decoder_start_token_id, model.config.language.vocab_size
        if start is not None and not 0 <= start < words:
            raise CheckpointError(
                f"config.json says decoder_start_token_id {start}, but the model knows {words:,} words"
            )
    return model, names, tied


def empty_model(
    config: Blip2Config | MatcherConfig, tensors: Tensors, names: Mapping[str, str], *, tied: bool
) -> Blip2 | Blip2Matcher:
    """The model of a config on the meta device, its vocabulary as long as it is stored."""
    if isinstance(config, Blip2Config):
        size = _vocabulary(tensors, names, embeddings_weight(config), config.language.vocab_size)
        language = replace(config.language, vocab_size=size, tie_word_embeddings=tied)
        config = replace(config, language=language)
    else:
        size = _vocabulary(tensors, names, "qformer.word_embeddings.weight", config.qformer.vocab_size)
        config = replace(config, qformer=replace(config.qformer, vocab_size=size))
    return allocate_model(config, itg=any(name.startswith("itg_head.") for name in names))


def allocate_model(config: Blip2Config | MatcherConfig, *, itg: bool) -> Blip2 | Blip2Matcher:
    """The model of a config on the meta device; itg: whether a matcher has its text head."""
    with torch.device("meta"), SkipInit():
        return Blip2(config) if isinstance(config, Blip2Config) else Blip2Matcher(config, itg=itg)


def embeddings_weight(config: Blip2Config) -> str:
    """Our name for the word embeddings' weight, which a tied head shares."""
    return f"language.{config.language.word_embeddings}.weight"


def our_names(tensors: Tensors) -> dict[str, str]:
    """Our names for a file's tensors."""
    names: dict[str, str] = {}
    spare = []
    for stored in tensors:
        ours = from_hugging_face(stored)
        if ours is not None and ours in names:
            if not _equal(tensors, names[ours], stored):
                raise CheckpointError(
                    f"the file holds {stored} and {names[ours]}, which differ; they must be one and the same"
                )
        elif ours is not None:
            names[ours] = stored
        elif stored not in DROPPED:
            spare.append(stored)
    if spare:
        raise CheckpointError(f"the file holds {_tensors(spare)} that belong to no BLIP-2 model")
    return names


def _share_head(tensors: Tensors, names: dict[str, str], embeddings: str) -> bool:
    """Whether the head is the word embeddings' weight: absent, or stored and equal. One that differs counts."""
    stored = [name for name in (HEAD, embeddings) if name in names]
    if len(stored) == 1:
        names[HEAD] = names[embeddings] = names[stored[0]]
        return True
    return bool(stored) and _equal(tensors, names[HEAD], names[embeddings])


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    return tensors.info(a) == tensors.info(b) and equal_values(tensors.blocks(a), tensors.blocks(b))


def _vocabulary(tensors: Tensors, names: Mapping[str, str], embeddings: str, configured: int) -> int:
    """vocab_size as stored: vocabularies get padded or extended, and config.json is not always updated."""
    shape = tensors.info(names[embeddings]).shape if embeddings in names else ()
    return shape[0] if len(shape) == 2 and shape[0] <= MAX_SIZE else configured


def mismatches(
    expected: Mapping[str, Tensor], tensors: Tensors, names: Mapping[str, str]
) -> tuple[list[str], list[str], list[str], list[str]]:
    """What keeps tensors from filling a model's places.

    Returns:
        our names of places without a tensor, tensors without a place, those of another shape, and those of no dtype
        that a model has.
    """
    missing = [name for name in expected if name not in names]
    spare = [stored for ours, stored in names.items() if ours not in expected]
    infos = {ours: tensors.info(stored) for ours, stored in names.items()}
    shapes = [
        f"{names[ours]} {list(infos[ours].shape)} instead of {list(place.shape)}"
        for ours, place in expected.items()
        if ours in names and infos[ours].shape != tuple(place.shape)
    ]
    odd = [names[ours] for ours, info in infos.items() if info.dtype not in DTYPES.values()]
    return missing, spare, shapes, odd


def _check(expected: Mapping[str, Tensor], tensors: Tensors, names: Mapping[str, str]) -> None:
    missing, spare, shapes, odd = mismatches(expected, tensors, names)
    problems = []
    if missing:
        problems.append(f"lacks {_tensors(missing)}")
        if all(name in missing for name in expected if name.startswith("language.")) and HEAD in expected:
            problems.append(
                "so it has no language model: it is a part of a model, such as its Q-Former alone"
            )
    if spare:
        problems.append(f"holds {_tensors(spare)} that its config.json has no place for")
    if shapes and not problems:
        problems.append(f"holds {_tensors(shapes)}: file and config.json do not belong together")
    if odd and not problems:
        odd = [f"{stored} ({tensors.info(stored).dtype})" for stored in odd]
        problems.append(f"holds {_tensors(odd)}, which are no weights of 16, 32 or 64 bit floats")
    if problems:
        raise CheckpointError(f"the checkpoint {'; '.join(problems)}")


def _tensors(items: list[str]) -> str:
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''} {listed(items, 10)}"


def listed(items: list[str], most: int) -> str:
    """The first of some names: "(a, b and 3 more)"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"({', '.join(sorted(items)[:most])}{more})"


def _part(name: str) -> str:
    return _PARTS.get(name.split(".", 1)[0], "heads")


def _target(name: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of a weight, by those of the model's parts."""
    dtype = dtypes[_part(name)]
    return torch.float32 if dtype == torch.float16 and name.endswith(_OVERFLOWS) else dtype


def _part_dtypes(
    tensors: Tensors, names: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of every part of the model."""
    counts: dict[str, Counter[torch.dtype]] = {}
    for ours, stored in names.items():
        info = tensors.info(stored)
        counts.setdefault(_part(ours), Counter())[info.dtype] += info.nbytes // info.dtype.itemsize
    return {part: dtype or count.most_common(1)[0][0] for part, count in counts.items()}
