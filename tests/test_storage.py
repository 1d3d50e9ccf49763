"""Files and folders appear complete or not at all, and a lock lasts as long as its process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2.cli import main
from blip2.evaluate.protocols import Protocol
from blip2.evaluate.report import write
from blip2.evaluate.run import Report
from blip2.storage import UNFINISHED, OutputError, lock_file, new_folder, replace_file
from blip2.tensorfiles.errors import CheckpointError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 250)  # a name as long as names may be
    with replace_file(path) as beside:
        beside.write_text("one")
        assert not path.exists()
        assert beside.name.endswith(UNFINISHED)
    with pytest.raises(RuntimeError, match="half-way"), replace_file(path) as beside:
        beside.write_text("half")
        raise RuntimeError("half-way")
    assert path.read_text() == "one"
    with replace_file(path, sync_name=False) as beside:
        beside.write_text("two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


PLACES: dict[str, Callable[[Path], Any]] = {
    "a link that leads to no file": lambda path: path.symlink_to("nowhere"),
    "that leads to no file; remove it": lambda path: path.symlink_to(path),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "is a folder": lambda path: path.mkdir(),
    "no regular file": os.mkfifo if hasattr(os, "mkfifo") else None,  # type: ignore[dict-item]
    "a link to no regular file": lambda path: (os.mkfifo(path.with_name("f")), path.symlink_to("f")),
    "is a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("message", PLACES)
def test_only_a_regular_file_is_replaced(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Path], capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("x.png")
    PLACES[message](path)
    before = path.lstat()
    message = message.replace("is a socket", "a socket")
    with pytest.raises(OutputError, match=message), replace_file(path):
        raise AssertionError
    # A door that reports it before the model is looked for, and one that writes when all is done.
    assert main(["explain", str(pictures[0]), "-o", str(path), "--model", "no model"]) == 2
    assert message in capsys.readouterr().err
    path.rename("results.json") if not path.is_symlink() else Path("results.json").symlink_to(path.readlink())
    with pytest.raises(OutputError):
        write(Report("captions", "", "m", {}, {}, Protocol(name="x"), [], [], ""), Path())
    assert Path("results.json").lstat().st_mode == before.st_mode


@pytest.mark.skipif(os.name != "posix", reason="links and permissions")
def test_of_a_link_the_file_is_replaced(tmp_path: Path) -> None:
    target, link, other = tmp_path / "deep" / "a", tmp_path / "b", tmp_path / "c"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o604)
    link.symlink_to("deep/a")
    other.symlink_to(link)
    for i, path in enumerate((link, other, target)):
        with replace_file(path) as beside:
            assert beside.parent == target.parent  # the same file system
            beside.write_text(str(i))
        assert (target.read_text(), link.is_symlink(), other.is_symlink()) == (str(i), True, True)
    assert target.stat().st_mode & 0o777 == 0o604 and len(list(tmp_path.rglob("*"))) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_new_file_has_the_usual_permissions_whoever_writes_it(tmp_path: Path) -> None:
    before = os.umask(0o026)
    try:
        for mode in (0o600, 0o666):
            with replace_file(tmp_path / f"{mode}") as beside:
                (private := tmp_path / "private").write_text("by another library")
                private.chmod(mode)
                private.replace(beside)  # as safetensors writes
            assert (tmp_path / f"{mode}").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a").write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(OutputError, match="read-only"), replace_file(path):
        raise AssertionError


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as beside:
        (beside / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "x"
    for target in ("nowhere", "real/x", "loop"):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to(target)
        with (
            pytest.raises(CheckpointError, match="a link that leads to no folder"),
            new_folder(tmp_path / "loop"),
        ):
            raise AssertionError


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No space left on device\); nothing was saved"):  # noqa: SIM117
        with new_folder(tmp_path / "new") as beside:
            (beside / "half").write_text("half")
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks files")
@pytest.mark.parametrize("inherited", [True, False])
def test_one_process_has_a_lock(inherited: bool, tmp_path: Path) -> None:
    def child_gets_it() -> bool:
        child = os.fork()
        if child == 0:
            with (tmp_path / "lock").open("ab") as other:
                os._exit(int(lock_file(other, inherited=inherited)))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    with (tmp_path / "lock").open("ab") as file:
        assert lock_file(file, inherited=inherited)
        assert not child_gets_it()
    assert child_gets_it()
