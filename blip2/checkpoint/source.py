"""A checkpoint of any layout, opened: its tensors under Hugging Face's names, its config from settings or shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.checkpoint.formats import detect_layout
from blip2.checkpoint.formats.lavis import LAVIS, UNUSED_LAYERS, check_parts, read_lavis_config
from blip2.checkpoint.formats.paddle import PADDLEMIX, read_paddle_config
from blip2.checkpoint.hub import resolve_path
from blip2.checkpoint.key_mapping import HF_HEAD, HF_OPT_EMBEDDINGS
from blip2.checkpoint.layouts import Layout
from blip2.checkpoint.remap import rename_tensors, to_hf_layout
from blip2.modeling.config import Blip2Config, ConfigError, MatcherConfig, read_config
from blip2.quantization.formats import as_floats
from blip2.tensorfiles.errors import CheckpointError
from blip2.tensorfiles.open import open_tensors
from blip2.tensorfiles.strict_json import read_json
from blip2.tensorfiles.tensors import Tensors
from blip2.text import TOKENIZER_FILES, TextError, Tokenizer

_VISION, _LANGUAGE = "vision_model.", "language_model."


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    folder: where its settings are. tokenizer: where its tokenizer is, None without one.
    stored: its tensors as the file names them. file_format: of these.
    tensors: the same under Hugging Face's names and in its shapes, with the parts from other files.
    raw: its settings in Hugging Face's spelling; config: the same, read. None where something is wrong: see problem.
    """

    folder: Path
    tokenizer: Path | None
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
    source: str | Path,
    revision: str | None = None,
    *,
    vision: str | Path | None = None,
    language: str | Path | None = None,
) -> Iterator[Checkpoint]:
    """Open a folder, a tensor file or a model on the Hub.

    Args:
        revision: branch, tag or commit of a model on the Hub.
        vision: the image encoder, where the checkpoint was saved without: a file, folder or name on the Hub.
        language: the language model, likewise: OPT or T5, with its tokenizer.

    Raises:
        CheckpointError: no tensor file there that this package reads, or a broken one. What is wrong with its settings
            is in the checkpoint's `problem`.
    """
    encoder, decoder = (None if part is None else resolve_path(part) for part in (vision, language))
    path = resolve_path(source, revision)
    with ExitStack() as stack:
        stored = stack.enter_context(open_tensors(path))
        layout = detect_layout({name: stored.info(name).shape for name in stored})
        tensors = as_floats(to_hf_layout(stored, layout))
        if encoder is not None:
            tensors = _with_vision(tensors, stack.enter_context(open_tensors(encoder)))
        if decoder is not None:
            tensors = _with_language(tensors, stack.enter_context(open_tensors(decoder)))
        folder = folder_of(path)
        raw, config, problem = None, None, None
        try:
            raw = _settings(folder, layout, tensors, decoder)
            # which model it is, its tensors show: files say it in `architectures`, or not at all
            marked = raw | {"architectures": ["Blip2ForImageTextRetrieval"]}
            config = read_config(marked if "itm_head.weight" in tensors else raw)
        except (CheckpointError, ConfigError) as error:
            problem = error
        file_format = next((stored.file(name).format for name in stored), "empty")
        tokenizer = next((p for p in (folder, decoder) if p is not None and has_tokenizer(p)), None)
        yield Checkpoint(folder, tokenizer, layout, stored, tensors, file_format, raw, config, problem)


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint that is given by it or by a file in it."""
    return path if path.is_dir() else path.parent


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds tokenizer files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _settings(folder: Path, layout: Layout, tensors: Tensors, language: Path | None) -> dict[str, Any]:
    """The settings in config.json, in Hugging Face's spelling; of LAVIS without one, those that shapes show."""
    file = folder / "config.json"
    if file.is_file() or layout not in (LAVIS, PADDLEMIX):
        raw = read_json(file)
        return read_paddle_config(raw) if layout.transposed else raw
    check_parts(tensors)
    if language is None:
        return read_lavis_config(tensors, None, None)
    return read_lavis_config(tensors, read_json(folder_of(language) / "config.json"), _newline(language))


def _newline(language: Path) -> int | None:
    try:
        return Tokenizer.load(folder_of(language)).token_id("Ċ")
    except TextError:
        return None


def _with_vision(tensors: Tensors, other: Tensors) -> Tensors:
    """Add the image encoder's tensors that are missing, no deeper than BLIP-2 uses it."""
    if not any(name.startswith(("visual_encoder.", "vision_model.")) for name in other):  # an encoder alone
        other = rename_tensors(other, {f"visual_encoder.{name}": name for name in other})
    encoder = to_hf_layout(other, detect_layout({name: other.info(name).shape for name in other}))
    patches = "vision_model.embeddings.patch_embedding.weight"
    width = encoder.info(patches).shape[:1] if patches in encoder else ()
    unused = tuple(f"{_VISION}encoder.layers.{number}." for number in UNUSED_LAYERS.get(width, ()))
    names = {name: name for name in encoder if name.startswith(_VISION) and not name.startswith(unused)}
    return _merged(tensors, rename_tensors(encoder, names))


def _with_language(tensors: Tensors, other: Tensors) -> Tensors:
    """Add the language model's tensors that are missing. A stored head or stored embeddings count for both."""
    bare = "decoder.embed_positions.weight" in other  # OPT saved without its head
    prefix = f"{_LANGUAGE}model." if bare else _LANGUAGE
    names = {name if name.startswith(_LANGUAGE) else prefix + name: name for name in other}
    shared = {HF_HEAD, HF_OPT_EMBEDDINGS}
    if any(name in tensors for name in shared):
        names = {new: old for new, old in names.items() if new not in shared}
    return _merged(tensors, rename_tensors(other, names))


def _merged(tensors: Tensors, added: Tensors) -> Tensors:
    """Both as one; of two tensors with one name the first counts."""
    return Tensors({n: (tensors if n in tensors else added).file(n) for n in (*tensors, *added)})
