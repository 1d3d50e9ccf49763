"""What a checkpoint is and what looks wrong with it, from names, shapes and settings. No value is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from blip2.checkpoint.formats.lavis import LAVIS, NEWLINE_OF_OPT
from blip2.checkpoint.key_mapping import HEAD, HF_HEAD, WORD_EMBEDDINGS, from_hugging_face, to_hugging_face
from blip2.checkpoint.layouts import HUGGING_FACE
from blip2.checkpoint.load import DROPPED, empty_model, listed, mismatches
from blip2.checkpoint.source import Checkpoint, open_checkpoint
from blip2.images import stored_stem
from blip2.modeling.config import Blip2Config, MatcherConfig, StemFacts
from blip2.tensorfiles.tensors import TensorInfo

LAYOUTS = {"hf": "Hugging Face", "lavis": "LAVIS", "paddlenlp": "PaddleNLP", "paddlemix": "PaddleMIX"}
_COMPONENTS = {  # what our names begin with -> the component
    "vision": "image encoder",
    "qformer": "Q-Former",
    "projection": "projection",
    "language": "language model",
}


@dataclass(frozen=True)
class ComponentSummary:
    """A component of a model: its tensors and parameters, and how many parameters are stored in each dtype."""

    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as it is stored. `problems` keep it from loading, `notes` are worth knowing.

    stem: the network that images go through first; not counted in the sizes. image_px: side of what images become.
    head: "tied" (not stored, or stored in place of the embeddings), "stored" (equal or not shows when loading),
        "none" for the stage-1 model, "missing".
    """

    path: str
    layout: str
    file_format: str
    variant: str
    parts: Mapping[str, ComponentSummary]
    tensors: int
    parameters: int
    stored_bytes: int
    head: str
    image_px: int | None
    stem: StemFacts | None
    tokenizer: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All of it as one JSON object."""
        return asdict(self)


def inspect(
    path: str | Path, *, vision: str | Path | None = None, language: str | Path | None = None
) -> Inspection:
    """Look at a checkpoint; arguments as `load_model`'s.

    Raises:
        CheckpointError: there is no tensor file that this package reads.
    """
    with open_checkpoint(path, vision=vision, language=language) as checkpoint:
        tensors = checkpoint.tensors
        ours = {name: from_hugging_face(name) for name in tensors}
        # T5's word embeddings may be there under three names
        names = {own: name for name, own in reversed(ours.items()) if own is not None}
        infos = {own: tensors.info(name) for own, name in names.items()}
        config, stem, stem_problem = checkpoint.config, None, list[str]()
        try:
            stem = None if config is None else stored_stem(checkpoint.folder, config.vision.image_size)
        except ValueError as error:
            stem_problem.append(str(error))
        return Inspection(
            path=str(path),
            layout=LAYOUTS[checkpoint.layout.name],
            file_format=checkpoint.file_format,
            variant=_variant(checkpoint),
            parts=_parts(infos),
            tensors=len(checkpoint.stored),
            parameters=sum(info.numel for info in infos.values()),
            stored_bytes=checkpoint.stored.nbytes,
            head=_head(checkpoint),
            image_px=stem.image_px if stem else None if config is None else config.vision.image_size,
            stem=stem,
            tokenizer=checkpoint.tokenizer is not None,
            problems=(*_problems(checkpoint, ours, names), *stem_problem),
            notes=tuple(_notes(checkpoint)),
        )


def stored_model(path: Path) -> tuple[Blip2Config | MatcherConfig, int, int, StemFacts | None]:
    """The settings of a model on this machine, its parameters (a tied head once), the bytes of its file, and its stem,
    which is counted in both.

    Raises:
        CheckpointError, ConfigError, ImageError: no model that can be built.
    """
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.required()
        names = {own: name for name in checkpoint.tensors if (own := from_hugging_face(name)) is not None}
        tied = isinstance(config, Blip2Config) and config.language.tie_word_embeddings
        model = empty_model(config, checkpoint.tensors, names, tied=tied)
        parameters, size = sum(p.numel() for p in model.parameters()), checkpoint.stored.nbytes
        stem = stored_stem(checkpoint.folder, config.vision.image_size)
        if stem is not None:
            parameters, size = parameters + stem.parameters, size + stem.disk_bytes
        return config, parameters, size, stem


def _variant(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    if config is None:
        return "matcher (stage 1)" if checkpoint.is_matcher else "unknown"
    encoder = "CLIP ViT" if config.vision.pre_norm else "ViT"
    image = f"{encoder} {config.vision.hidden_size} wide, {config.vision.image_size} px"
    if isinstance(config, MatcherConfig):
        itg = any(name.startswith("itg_head.") for name in checkpoint.tensors)
        return f"matcher (stage 1{', with its text head' if itg else ''}), {image}"
    kind = "T5" if config.language.is_encoder_decoder else "OPT"
    return f"generator, {image}, {kind} {config.language.width} wide"


def _parts(infos: Mapping[str, TensorInfo]) -> dict[str, ComponentSummary]:
    counts: dict[str, Counter[str]] = {part: Counter() for part in (*_COMPONENTS.values(), "heads")}
    tensors: Counter[str] = Counter()
    for name, info in infos.items():
        part = _COMPONENTS.get(name.split(".", 1)[0], "heads")
        tensors[part] += 1
        counts[part][str(info.dtype).removeprefix("torch.")] += info.numel
    return {p: ComponentSummary(tensors[p], c.total(), dict(c)) for p, c in counts.items() if c}


def _head(checkpoint: Checkpoint) -> str:
    if checkpoint.is_matcher:
        return "none"
    embeddings = any(from_hugging_face(name) in WORD_EMBEDDINGS for name in checkpoint.tensors)
    if HF_HEAD in checkpoint.tensors:
        return "stored" if embeddings else "tied"
    return "tied" if embeddings else "missing"


def _problems(checkpoint: Checkpoint, ours: Mapping[str, str | None], names: Mapping[str, str]) -> list[str]:
    tensors, config = checkpoint.tensors, checkpoint.config
    model = None if config is None else empty_model(config, tensors, names, tied=False)
    missing, spare, shapes, odd = mismatches({} if model is None else model.state_dict(), tensors, names)
    unknown = [name for name, own in ours.items() if own is None and name not in DROPPED]
    lists = {"names that belong to no BLIP-2 model": unknown, "no weights of 16, 32 or 64 bit floats": odd}
    if model is not None:
        shared = {HEAD, *WORD_EMBEDDINGS}
        optional = shared if shared & names.keys() else set()
        lists |= {
            "missing": [to_hugging_face(name) for name in missing if name not in optional],
            "no place for": spare,
            "shapes that do not fit the settings": shapes,
        }
    problems = [] if checkpoint.problem is None else [str(checkpoint.problem)]
    return problems + [f"{what}: {len(some)} {listed(some, 5)}" for what, some in lists.items() if some]


def _notes(checkpoint: Checkpoint) -> list[str]:
    tensors, config, raw = checkpoint.tensors, checkpoint.config, checkpoint.raw
    if config is None or raw is None:
        return []
    notes: list[str] = []
    if not config.vision.pre_norm and config.vision.layer_norm_eps != 1e-6:
        notes.append(
            f"the image encoder's layer_norm_eps is {config.vision.layer_norm_eps:g}; it was trained with 1e-6, and "
            "older configs and Paddle's default say 1e-5: outputs differ slightly from the original's"
        )
    if isinstance(config, Blip2Config) and not config.language.is_encoder_decoder:
        language = config.language
        if language.vocab_size > NEWLINE_OF_OPT and NEWLINE_OF_OPT not in language.eos_token_ids:
            notes.append(
                f"eos_token_id is {language.eos_token_id}: captions end with a newline, {NEWLINE_OF_OPT}, in all "
                "published models"
            )
    text_config = raw.get("text_config")
    tied = text_config.get("tie_word_embeddings") if isinstance(text_config, Mapping) else None
    if tied and _head(checkpoint) == "stored" and checkpoint.layout is not LAVIS:
        notes.append("config.json says that the head is tied, but one is stored: what is stored counts")
    if checkpoint.layout is HUGGING_FACE and checkpoint.is_matcher and "ImageTextRetrieval" not in str(raw):
        notes.append("config.json does not say that this is the stage-1 model; its tensors do")
    dtypes = {tensors.info(name).dtype for name in tensors if name.startswith("vision_model.")}
    if torch.float16 in dtypes:
        notes.append("an image encoder in fp16 can overflow when it computes in fp16: use bf16 or fp32")
    if checkpoint.tokenizer is None:
        notes.append("no tokenizer beside it: models that read text need one")
    return notes
