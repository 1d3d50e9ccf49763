"""Names become paths: local ones as they are, the Hub's through huggingface_hub, whose answers are put plainly."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from blip2.checkpoint import CheckpointError, resolve_path
from blip2.checkpoint.hub import HUB_FILES, OLDER_FILES


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[dict[str, Any]]]:
    """Let the Hub answer with a path or an error; gives the list of calls made."""

    def answer(with_what: object) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(name: str, **options: Any) -> object:
            calls.append({"name": name, **options})
            if isinstance(with_what, Exception):
                raise with_what
            return with_what

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer


def test_local_paths(tmp_path: Path) -> None:
    assert resolve_path(tmp_path) == resolve_path(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="is a local path; revision='main' is for models on the Hub"):
        resolve_path(tmp_path, "main")
    for name in (
        "missing",
        "./a/b",
        "../a",
        "a/b/c",
        "/no/where",
        "https://host/a",
        tmp_path / "a",
        Path("a/b"),
    ):
        with pytest.raises(CheckpointError, match="no such file or folder, nor a name"):
            resolve_path(name)


def test_only_data_is_downloaded(hub: Callable[[object], list[dict[str, Any]]], tmp_path: Path) -> None:
    calls = hub(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert resolve_path("Salesforce/blip2-opt-2.7b", "abc") == tmp_path
    assert calls == [
        {"name": "Salesforce/blip2-opt-2.7b", "revision": "abc", "allow_patterns": list(HUB_FILES)}
    ]

    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "stem.safetensors").touch()  # no weights of the model
    assert resolve_path("facebook/opt-2.7b") == tmp_path
    assert calls[-1]["allow_patterns"] == [*HUB_FILES, *OLDER_FILES]
    assert resolve_path("facebook/opt-2.7b", only="calibration.json") == tmp_path
    assert len(calls) == 4 and calls[-1]["allow_patterns"] == ["calibration.json"]

    def wanted(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in HUB_FILES)

    assert wanted("model-00001-of-00002.safetensors")
    assert wanted("stem.safetensors") and wanted("LICENSE-efficientnet-lite")
    assert not any(
        wanted(f) for f in ("pytorch_model-00001-of-00002.bin", "modeling.py", "tf_model.h5", "README.md")
    )


def http(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # its constructor wants the server's answer
    error.args = ("details of the connection",)
    return error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            errors.LocalEntryNotFoundError("offline"),
            "not in the local cache and the Hugging Face Hub cannot be reached",
        ),
        (http(errors.GatedRepoError), "is gated; accept its terms"),
        (http(errors.RevisionNotFoundError), "has no revision 'x'"),
        (
            http(errors.RepositoryNotFoundError),
            "no such folder here and no such model on the Hugging Face Hub",
        ),
        (OSError("disk full"), "cannot be downloaded from the Hugging Face Hub: disk full"),
    ],
)
def test_what_the_hub_says_is_put_plainly(
    hub: Callable[[object], object], answer: Exception, message: str
) -> None:
    hub(answer)
    with pytest.raises(CheckpointError, match=message):
        resolve_path("someone/something", "x")


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub itself, set to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"someone/something is not in the local cache.*HF_HUB_OFFLINE"):
        resolve_path("someone/something")
