"""Files and folders appear complete or not at all, and a lock lasts as long as its process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blip2.storage import UNFINISHED, lock_file, new_folder, replace_file
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
