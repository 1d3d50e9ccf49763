"""What users' type checkers see: mypy --strict over files that use the package rightly and wrongly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent
USES, MISUSES = ROOT / "tests" / "typing" / "uses.py", ROOT / "tests" / "typing" / "misuses.py"


@pytest.fixture(scope="module")
def errors() -> list[tuple[str, int, str]]:
    """What mypy reports: (file's name, line, message)."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--no-pretty"]
    done = subprocess.run([*command, USES, MISUSES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, f"mypy found no error at all, or failed:\n{done.stdout}{done.stderr}"
    lines = re.findall(r"^(.+?):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return [(Path(file).name, int(line), message) for file, line, message in lines]


def test_each_door_has_the_type_that_it_promises(errors: list[tuple[str, int, str]]) -> None:
    assert USES.read_text(encoding="utf-8").count("assert_type(") >= 20
    assert [error for error in errors if error[0] != MISUSES.name] == []


def test_each_misuse_is_an_error(errors: list[tuple[str, int, str]]) -> None:
    lines = MISUSES.read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert len(marked) >= 8
    assert {line for name, line, _ in errors if name == MISUSES.name} == marked
