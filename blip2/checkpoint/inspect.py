"""What a checkpoint is and what looks wrong with it, from names, shapes and settings: no value is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from blip2.checkpoint.hub import resolve
from blip2.checkpoint.key_mapping import from_hugging_face
from blip2.checkpoint.key_mapping import to_hugging_face as hugging_face_name
from blip2.checkpoint.layouts import HUGGING_FACE, LAVIS
from blip2.checkpoint.load import DROPPED, DTYPES, empty_model, has_tokenizer
from blip2.checkpoint.source import Checkpoint, open_checkpoint
from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig
from blip2.tensorfiles.tensors import TensorInfo

LAYOUTS = {"hf": "Hugging Face", "lavis": "LAVIS", "paddlenlp": "PaddleNLP", "paddlemix": "PaddleMIX"}
_HEAD = "language_model.lm_head.weight"
_WORDS = ("language.embed_tokens.weight", "language.shared.weight")
_NEWLINE = 50118  # of OPT: what ends a caption
_PARTS = {  # our names begin so -> the part
    "vision": "image encoder",
    "qformer": "Q-Former",
    "projection": "projection",
    "language": "language model",
}


@dataclass(frozen=True)
class Part:
    """A part of a model: its tensors and parameters, and how many parameters are stored in each dtype."""

    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as it is stored. `problems` keep it from loading, `notes` are worth knowing.

    head: "tied" (not stored, or stored in place of the embeddings), "stored" (equal or not is seen when loading),
        "none" for the stage-1 model, "missing".
    """

    path: str
    layout: str
    file_format: str
    variant: str
    parts: Mapping[str, Part]
    tensors: int
    parameters: int
    stored_bytes: int
    head: str
    image_px: int | None
    tokenizer: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return asdict(self)


def inspect(
    path: str | Path, *, vision: str | Path | None = None, language: str | Path | None = None
) -> Inspection:
    """Look at a checkpoint; takes what `load_model` takes.

    Raises:
        CheckpointError: there is no tensor file that this package reads.
    """
    parts = [None if part is None else resolve(part) for part in (vision, language)]
    with open_checkpoint(resolve(path), vision=parts[0], language=parts[1]) as found:
        tensors = found.tensors
        ours = {name: from_hugging_face(name) for name in tensors}
        # T5's word embeddings may be there under three names
        once = {own: name for name, own in reversed(ours.items()) if own is not None}
        infos = {name: tensors.info(name) for name in once.values()}
        stored = [found.stored.info(name) for name in found.stored]
        config = found.config
        return Inspection(
            path=str(path),
            layout=LAYOUTS[found.layout.name],
            file_format=found.file_format,
            variant=_variant(found),
            parts=_parts(infos, ours),
            tensors=len(stored),
            parameters=sum(map(_count, infos.values())),
            stored_bytes=sum(info.nbytes for info in stored),
            head=_head(found),
            image_px=None if config is None else config.vision.image_size,
            tokenizer=has_tokenizer(found.folder) or (parts[1] is not None and has_tokenizer(parts[1])),
            problems=tuple(_problems(found, ours)),
            notes=tuple(_notes(found)),
        )


def stored_model(path: Path) -> tuple[Blip2Config | MatcherConfig, int, int]:
    """The settings of a model on this machine, its parameters (a tied head once), and the bytes of its file.

    Raises:
        CheckpointError, ConfigError: no model that can be built.
    """
    with open_checkpoint(path) as found:
        config = found.required()
        names = {own: name for name in found.tensors if (own := from_hugging_face(name)) is not None}
        tied = isinstance(config, Blip2Config) and config.language.tie_word_embeddings
        model = empty_model(config, found.tensors, names, tied=tied)
        stored = sum(found.stored.info(name).nbytes for name in found.stored)
        return config, sum(p.numel() for p in model.parameters()), stored


def _count(info: TensorInfo) -> int:
    return info.nbytes // info.dtype.itemsize


def _variant(found: Checkpoint) -> str:
    config = found.config
    if config is None:
        return "matcher (stage 1)" if found.is_matcher else "unknown"
    encoder = "CLIP ViT" if config.vision.pre_norm else "ViT"
    image = f"{encoder} {config.vision.hidden_size} wide, {config.vision.image_size} px"
    if isinstance(config, MatcherConfig):
        itg = any(name.startswith("itg_head.") for name in found.tensors)
        return f"matcher (stage 1{', with its text head' if itg else ''}), {image}"
    kind = "OPT" if isinstance(config.language, OptConfig) else "T5"
    return f"generator, {image}, {kind} {config.language.width} wide"


def _parts(infos: Mapping[str, TensorInfo], ours: Mapping[str, str | None]) -> dict[str, Part]:
    counts: dict[str, Counter[str]] = {}
    tensors: Counter[str] = Counter()
    for name, info in infos.items():
        own = ours[name]
        if own is None:
            continue
        part = _PARTS.get(own.split(".", 1)[0], "heads")
        tensors[part] += 1
        counts.setdefault(part, Counter())[str(info.dtype).removeprefix("torch.")] += _count(info)
    order = [*_PARTS.values(), "heads"]
    return {
        part: Part(tensors[part], counts[part].total(), dict(counts[part]))
        for part in order
        if part in counts
    }


def _head(found: Checkpoint) -> str:
    if found.is_matcher:
        return "none"
    words = any(from_hugging_face(name) in _WORDS for name in found.tensors)
    if _HEAD in found.tensors:
        return "stored" if words else "tied"
    return "tied" if words else "missing"


# --- what looks wrong -------------------------------------------------------------------------------------------------


def _problems(found: Checkpoint, ours: Mapping[str, str | None]) -> list[str]:
    problems = [] if found.problem is None else [str(found.problem)]
    spare = [name for name, own in ours.items() if own is None and name not in DROPPED]
    if spare:
        problems.append(f"names that belong to no BLIP-2 model: {_some(spare)}")
    odd = [name for name in found.tensors if found.tensors.info(name).dtype not in DTYPES.values()]
    if odd := [name for name in odd if ours[name] is not None]:
        problems.append(f"no weights of 16, 32 or 64 bit floats: {_some(odd)}")
    if found.config is None:
        return problems
    names = {own: name for name, own in ours.items() if own is not None}
    model = empty_model(found.config, found.tensors, names, tied=False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    here = {own: found.tensors.info(name).shape for name, own in ours.items() if own is not None}
    either = {"language.lm_head.weight", *_WORDS}
    tied = either if either & {*here} else set()
    missing = [hugging_face_name(name) for name in expected if name not in here and name not in tied]
    if missing:
        problems.append(f"missing: {_some(missing)}")
    unplaced = [hugging_face_name(name) for name in here if name not in expected]
    if unplaced:
        problems.append(f"no place for: {_some(unplaced)}")
    unfit = [
        f"{hugging_face_name(name)} {list(here[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in here and here[name] != shape
    ]
    if unfit:
        problems.append(f"shapes that do not fit the settings: {_some(unfit)}")
    return problems


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(sorted(names)[:5])}{more})"


def _notes(found: Checkpoint) -> list[str]:
    notes: list[str] = []
    config = found.config
    if config is None:
        return notes
    if not config.vision.pre_norm and config.vision.layer_norm_eps != 1e-6:
        notes.append(
            f"the image encoder's layer_norm_eps is {config.vision.layer_norm_eps:g}; it was trained with 1e-6, and "
            "older configs and Paddle's default say 1e-5: outputs differ slightly from the original's"
        )
    if isinstance(config, Blip2Config) and isinstance(config.language, OptConfig):
        ends = config.language.eos_token_id
        if config.language.vocab_size > _NEWLINE and _NEWLINE not in (
            ends if isinstance(ends, tuple) else (ends,)
        ):
            notes.append(
                f"eos_token_id is {ends}: captions end with a newline, {_NEWLINE}, in all published models"
            )
    said = (found.raw or {}).get("text_config")
    said = said.get("tie_word_embeddings") if isinstance(said, Mapping) else None
    if said and _head(found) == "stored" and found.layout is not LAVIS:
        notes.append("config.json says that the head is tied, but one is stored: what is stored counts")
    if found.layout is HUGGING_FACE and found.is_matcher and not _says_matcher(found.path):
        notes.append("config.json does not say that this is the stage-1 model; its tensors do")
    dtypes = {found.tensors.info(name).dtype for name in found.tensors if name.startswith("vision_model.")}
    if torch.float16 in dtypes:
        notes.append("an image encoder in fp16 can overflow when it computes in fp16: use bf16 or fp32")
    if not has_tokenizer(found.folder):
        notes.append("no tokenizer beside it: models that read text need one")
    return notes


def _says_matcher(path: Path) -> bool:
    try:
        text = ((path if path.is_dir() else path.parent) / "config.json").read_text(encoding="utf-8")
    except OSError:
        return False
    return "ImageTextRetrieval" in text
