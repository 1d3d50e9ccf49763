"""Where a model's files are: a local path as it is, a name on the Hugging Face Hub through its cache."""

from __future__ import annotations

import re
from pathlib import Path

from blip2.calibration import FILE as CALIBRATION
from blip2.stemfiles import STEM_FILES
from blip2.tensorfiles.errors import CheckpointError
from blip2.text import TOKENIZER_FILES

# Weights that are data alone, and the settings beside them: never code.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *STEM_FILES,
    CALIBRATION,
    *TOKENIZER_FILES,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)

# Where a model has no safetensors: pickles, which are read as data.
OLDER_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*-of-*.bin",
    "model_state.pdparams",
    "model_state.pdparams.index.json",
    "model_state-*-of-*.pdparams",
)


def resolve_path(name_or_path: str | Path, revision: str | None = None, *, only: str | None = None) -> Path:
    """The local path of a model: a path that exists as it is, else the Hub's files for that name, downloaded once.

    The cache and offline mode are huggingface_hub's own: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN.

    Args:
        revision: branch, tag or commit on the Hub.
        only: of a model on the Hub, fetch this file alone, where it has it.

    Raises:
        CheckpointError: no such path and no such model, or the Hub cannot be reached and the model is not in the cache.
    """
    try:
        path = Path(name_or_path).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, with a NUL
        raise CheckpointError(f"{str(name_or_path)[:200]!r} is no valid path ({error})") from error
    if exists:
        if revision is not None:
            raise CheckpointError(f"{path} is a local path; revision={revision!r} is for models on the Hub")
        return path
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(
            f"{name}: no such file or folder, nor a name on the Hugging Face Hub ('owner/model')"
        )

    from huggingface_hub import errors, snapshot_download  # imported here: local models need none of it

    which = name if revision is None else f"{name} at revision {revision!r}"
    try:
        files = list(HUB_FILES) if only is None else [only]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
        if only is None and not any(folder.glob("model*.safetensors")):
            patterns = [*HUB_FILES, *OLDER_FILES]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        return folder
    except (errors.HfHubHTTPError, OSError) as error:  # of these classes some are subclasses of others
        problems: dict[type[Exception], str] = {
            errors.LocalEntryNotFoundError: f"{which} is not in the local cache and the Hugging Face Hub cannot be "
            "reached; connect (or unset HF_HUB_OFFLINE), or give the path of a local folder",
            errors.GatedRepoError: f"{which} is gated; accept its terms on the Hub and log in with `hf auth login`",
            errors.RevisionNotFoundError: f"{name} has no revision {revision!r} on the Hugging Face Hub",
            errors.RepositoryNotFoundError: f"{name}: no such folder here and no such model on the Hugging Face Hub; "
            "check the spelling, or log in with `hf auth login` if it is private",
            Exception: f"{which} cannot be downloaded from the Hugging Face Hub: {error}",
        }
        problem = next(text for kind, text in problems.items() if isinstance(error, kind))
        raise CheckpointError(problem) from error
