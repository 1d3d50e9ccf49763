"""A checkpoint of any layout, opened: its tensors under Hugging Face's names, and what settings or shapes say it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.checkpoint.dialects import LANGUAGES, derive, from_paddle, read_json_file
from blip2.checkpoint.layouts import LAVIS, PADDLEMIX, Layout, recognise
from blip2.checkpoint.remap import Piece, as_hugging_face, joined, view
from blip2.modeling.config import Blip2Config, ConfigError, MatcherConfig, read_config
from blip2.quantization.formats import as_floats
from blip2.tensorfiles.open import open_tensors
from blip2.tensorfiles.tensors import CheckpointError, Tensors
from blip2.text import TextError, Tokenizer

_VISION, _LANGUAGE = "vision_model.", "language_model."
_HEADS = ("language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight")
# The image encoders LAVIS takes from elsewhere are a layer or two deeper than it uses them: width -> layers too many.
_UNUSED: Mapping[tuple[int, ...], tuple[int, ...]] = {(1408,): (39, 40), (1024,): (22, 23)}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    folder: where its settings and tokenizer are. stored: its tensors as the file names them. file_format: of these.
    tensors: the same under Hugging Face's names and in its shapes, with what came from elsewhere.
    raw: its settings in Hugging Face's spelling; config: the same, read. None where something is wrong: see problem.
    """

    path: Path
    folder: Path
    layout: Layout
    stored: Tensors
    tensors: Tensors
    file_format: str
    raw: Mapping[str, Any] | None
    config: Blip2Config | MatcherConfig | None
    problem: ValueError | None

    def required(self) -> Blip2Config | MatcherConfig:
        """The config. Raises what is wrong where there is none."""
        if self.config is None:
            assert self.problem is not None
            raise self.problem
        return self.config

    @property
    def is_matcher(self) -> bool:
        """Whether it is the stage-1 model."""
        return "itm_head.weight" in self.tensors or isinstance(self.config, MatcherConfig)


@contextmanager
def open_checkpoint(
    path: Path, *, vision: Path | None = None, language: Path | None = None
) -> Iterator[Checkpoint]:
    """Open a folder or a tensor file.

    Args:
        vision: the image encoder, where the checkpoint was saved without: a file or folder.
        language: the language model, likewise: a folder of OPT or T5, with its tokenizer.

    Raises:
        CheckpointError: no tensor file there that this package reads, or a broken one. What is wrong with its settings
            is in the checkpoint's `problem`.
    """
    with ExitStack() as stack:
        stored = stack.enter_context(open_tensors(path))
        layout = recognise({name: stored.info(name).shape for name in stored})
        tensors = as_floats(as_hugging_face(stored, layout))
        folder = path if path.is_dir() else path.parent
        if vision is not None:
            tensors = _with_vision(tensors, stack.enter_context(open_tensors(vision)))
        if language is not None:
            tensors = _with_language(tensors, stack.enter_context(open_tensors(language)))
        raw, config, problem = None, None, None
        try:
            raw = _settings(folder, layout, tensors, language)
            config = read_config(raw)
        except (CheckpointError, ConfigError) as error:
            problem = error
        kind = next((stored.file(name).format for name in stored), "empty")
        yield Checkpoint(path, folder, layout, stored, tensors, kind, raw, config, problem)


def _settings(folder: Path, layout: Layout, tensors: Tensors, language: Path | None) -> dict[str, Any]:
    """What config.json says, in Hugging Face's spelling; without one, what the shapes say."""
    beside = folder / "config.json"
    if beside.is_file() or layout not in (LAVIS, PADDLEMIX):
        raw = read_json_file(beside)
        if layout.transposed:
            raw = from_paddle(raw)
        if (
            "itm_head.weight" in tensors
        ):  # what is stored counts: files say it by `architectures`, or not at all
            raw["architectures"] = ["Blip2ForImageTextRetrieval"]
        return raw
    _check_parts(tensors)
    own, newline = None, None
    if language is not None:
        own = read_json_file((language if language.is_dir() else language.parent) / "config.json")
        newline = _newline(language)
    return derive(tensors, own, newline)


def _newline(language: Path) -> int | None:
    try:
        return Tokenizer.load(language if language.is_dir() else language.parent).token_id("Ċ")
    except TextError:
        return None


def _check_parts(tensors: Tensors) -> None:
    """Say which of a checkpoint's parts were left out when it was saved, and where to get them."""
    missing = []
    for part, where in (
        (
            "query_tokens",
            "its Q-Former: it is a part of a model, to be given as vision= or language= with another file",
        ),
        (
            "vision_model.encoder.layers.0.",
            "its image encoder (visual_encoder.*), which was frozen and left out; "
            "give it as vision= (--vision): EVA-CLIP's eva_vit_g.pth, or clip_vit_L.pth for a _vitL model",
        ),
    ):
        if not any(name.startswith(part) for name in tensors):
            missing.append(where)
    if "itm_head.weight" not in tensors:
        t5 = any(name.startswith("language_model.encoder.") for name in tensors)
        first = "language_model.decoder.block.0." if t5 else "language_model.model.decoder.layers.0."
        if not any(name.startswith(first) for name in tensors):
            projection = "language_projection.weight"
            shape = tensors.info(projection).shape if projection in tensors else ()
            fitting = [name for (width, _), name in LANGUAGES.items() if shape[:1] == (width,)]
            missing.append(
                "its language model (opt_model.* or t5_model.*), which was frozen and left out; "
                f"give it as language= (--language): the folder of {' or '.join(fitting) or 'OPT or T5'}"
            )
    if missing:
        raise CheckpointError(f"the file lacks {'; and '.join(missing)}")


# --- parts from elsewhere ---------------------------------------------------------------------------------------------


def _with_vision(tensors: Tensors, found: Tensors) -> Tensors:
    """Add the image encoder's tensors that are missing, no deeper than BLIP-2 uses it."""
    bare = not any(name.startswith(("visual_encoder.", "vision_model.")) for name in found)
    if bare:
        found = view(found, {f"visual_encoder.{name}": Piece(found.info(name), (name,)) for name in found})
    encoder = as_hugging_face(found, recognise({name: found.info(name).shape for name in found}))
    patches = "vision_model.embeddings.patch_embedding.weight"
    width = encoder.info(patches).shape[:1] if patches in encoder else ()
    unused = tuple(f"{_VISION}encoder.layers.{number}." for number in _UNUSED.get(width, ()))
    added = {
        name: (encoder, name) for name in encoder if name.startswith(_VISION) and not name.startswith(unused)
    }
    return joined({name: (tensors, name) for name in tensors}, added)


def _with_language(tensors: Tensors, found: Tensors) -> Tensors:
    """Add the language model's tensors that are missing. A head or its embeddings alone stand for both."""
    bare = "decoder.embed_positions.weight" in found  # OPT saved without its head
    prefix = f"{_LANGUAGE}model." if bare else _LANGUAGE
    added = {name if name.startswith(_LANGUAGE) else prefix + name: (found, name) for name in found}
    if any(name in tensors for name in _HEADS):
        added = {name: where for name, where in added.items() if name not in _HEADS}
    return joined({name: (tensors, name) for name in tensors}, added)
