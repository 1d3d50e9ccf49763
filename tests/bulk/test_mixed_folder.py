"""What users have is captioned just where a caption is missing, and what they do to captions stays, run by run."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from mixed_folder import BLANK, MixedFolder, make, picture

from blip2.bulk.database import Row
from blip2.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names that Windows has not")
NUMBERS = [300, pytest.param(20_000, marks=pytest.mark.full)]
Go = Callable[..., str]


@pytest.fixture
def go(generator_folder: Path, capsys: pytest.CaptureFixture[str]) -> Go:
    """Runs `blip2 caption folder --out out` and gives what it prints on standard error."""

    def run(folder: Path, out: Path, *more: str, status: int = 1) -> str:
        capsys.readouterr()
        options = ["--model", str(generator_folder), "--max-new-tokens", "3", "--num-beams", "1"]
        assert (
            main(["caption", str(folder), "--out", str(out), *options, "--batch-size", "32", *more]) == status
        )
        return capsys.readouterr().err

    return run


def counts(printed: str) -> tuple[int, ...]:
    """Of the last line: captioned, failed, left alone, edited, added, removed, existing, written again."""
    found = {
        what: int(count.replace(",", ""))
        for count, what in re.findall(r"(\d[\d,]*) (\w+)", printed.splitlines()[-1])
    }
    names = ("captioned", "failed", "left", "edited", "added", "removed", "existing", "written")
    return tuple(found.get(name, 0) for name in names)


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """All files, but those of the state, with their times."""
    paths = [
        Path(place, name) for place, _, names in os.walk(folder) for name in names if ".blip2" not in place
    ]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths if path.is_file()}


def errors(state: Path) -> set[Path]:
    """The images that a run said it could not read."""
    return {Path(json.loads(line)["image"]) for line in (state / "errors.jsonl").read_text().splitlines()}


def is_told(mixed: MixedFolder, printed: str) -> bool:
    """Whether each kind that is not read is counted, and no other."""
    told = re.findall(r"(\d[\d,]*) (\.\w+)", printed)
    return {suffix: int(number.replace(",", "")) for number, suffix in told} == mixed.unreadable


@pytest.mark.parametrize("number", NUMBERS)
def test_text_files(number: int, tmp_path: Path, go: Go) -> None:
    rng, mixed = random.Random(1), make(tmp_path / "in", number)
    before = files(tmp_path)

    printed = go(mixed.root, mixed.root)
    kept, damaged, wanted = len(mixed.kept), len(mixed.damaged), len(mixed.wanted)
    assert counts(printed) == (wanted, damaged, kept, 0, 0, 0, kept, 0)
    assert is_told(mixed, printed) and errors(mixed.root / ".blip2") == mixed.damaged
    after = files(tmp_path)
    new = set(mixed.wanted.values())
    assert after.keys() == before.keys() | new and all(after[text][0].strip() for text in new)
    assert {path: after[path] for path in before.keys() - new} == {
        path: before[path] for path in before.keys() - new
    }

    # The user edits, deletes, empties, replaces, removes, adds and repairs.
    things = list(mixed.wanted.items())
    rng.shuffle(things)
    half, part = wanted // 2, wanted // 16
    edited, others = things[:half], things[half:]
    gone, emptied, replaced, removed = (others[i * part : (i + 1) * part] for i in range(4))
    for _, text in edited:
        text.write_bytes(
            rng.choice(
                [b"mine", b"\xff\xfem\0i\0", b"not \xff utf-8", after[text][0].replace(b"\n", b"\r\n")]
            )
        )
    for _, text in gone:
        text.unlink()
    for _, text in emptied:
        text.write_bytes(rng.choice(BLANK))
    for image, _ in replaced + edited[:part]:  # where the text is edited, the other picture changes nothing
        image.write_bytes(picture(rng, "PNG"))
    for image, _ in removed + edited[part : 2 * part]:
        image.unlink()
    for image in sorted(mixed.damaged)[::3]:
        image.write_bytes(picture(rng, "PNG"))
        mixed.damaged.remove(image)
    repaired = damaged - len(mixed.damaged)
    mine = sorted(mixed.kept)
    for text in mine[:3]:
        text.unlink()
    mine[3].write_bytes(b"mine, another time")
    for i in range(5):
        (mixed.root / f"new {i}.png").write_bytes(picture(rng, "PNG"))
    before = files(tmp_path)

    printed = go(mixed.root, mixed.root)
    left = half - part, kept - 3  # of removed pictures nothing is known
    assert counts(printed) == (
        part + repaired + 3 + 5, len(mixed.damaged), sum(left), left[0], 0, 0, left[1], 2 * part,
    )  # fmt: skip
    assert is_told(mixed, printed) and errors(mixed.root / ".blip2") == mixed.damaged
    last = files(tmp_path)
    changed = {path for path in last if last[path] != before.get(path)}
    made = {text for _, text in gone + emptied + replaced} | set(mine[:3])
    made |= {mixed.root / f"new {i}.txt" for i in range(5)}
    assert made <= changed and len(changed) == len(made) + repaired
    assert all(last[text][0] == after[text][0] for _, text in gone + emptied)

    printed = go(mixed.root, mixed.root)
    assert counts(printed) == (0, len(mixed.damaged), sum(left), left[0], 0, 0, left[1], 0)
    assert files(tmp_path) == last


def read(path: Path) -> list[Row]:
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return [json.loads(line) for line in text.split("\n")[:-1]]


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def texts(rows: list[Row]) -> dict[str, str]:
    return {row["image"]: row["caption"] for row in rows if row.get("caption")}


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
@pytest.mark.parametrize("number", NUMBERS)
def test_tables(number: int, name: str, tmp_path: Path, go: Go) -> None:
    rng, mixed, out = random.Random(2), make(tmp_path / "in", number), tmp_path / name
    before = files(mixed.root)
    printed = go(mixed.root, out)
    damaged = len(mixed.damaged)
    assert counts(printed) == (len(mixed.sound), damaged, *[0] * 6) and is_told(mixed, printed)
    assert files(mixed.root) == before
    first = read(out)
    assert set(texts(first)) == set(map(str, mixed.sound))
    assert {Path(row["image"]) for row in first if row.get("error")} == mixed.damaged

    # The user edits, removes and adds rows, puts them in another order, and changes pictures.
    rows = {row["image"]: row for row in rng.sample(first, len(first)) if not row.get("error")}
    names = list(rows)
    part = len(names) // 10
    edited, removed, twice, replaced = (names[i * part : (i + 1) * part] for i in range(4))
    for image in edited:
        rows[image] = rows[image] | {
            "caption": rng.choice(['"mine"', "ä, b\u2028", " two\nlines", rows[image]["caption"] + "."])
        }
    added = [rows[image] | {"caption": "one more"} for image in twice]
    added += [rows[names[0]] | {"image": f"elsewhere {i}.jpg"} for i in range(3)]
    for image in removed:
        del rows[image]
    write(out, [*rows.values(), *added, *(row for row in first if row.get("error"))])
    for image in replaced + edited[:2]:
        Path(image).write_bytes(picture(rng, "PNG"))
    for image in names[-part:]:
        Path(image).unlink()
    for i in range(5):
        (mixed.root / f"new {i}.png").write_bytes(picture(rng, "PNG"))

    printed = go(mixed.root, out)
    left = part, part + 3, part
    assert counts(printed) == (part + 2 + 5, damaged, sum(left), *left, 0, 0) and is_told(mixed, printed)
    second = read(out)
    new = [str(mixed.root / f"new {i}.png") for i in range(5)]
    assert {row["image"] for row in second} == {row["image"] for row in first + added} - set(removed) | set(
        new
    )
    assert len(second) == len(first) - part + part + 3 + 5
    there = [(row["image"], row.get("caption")) for row in second]
    assert all(
        (image, rows[image]["caption"]) in there
        for image in names[: 3 * part] + names[4 * part :]
        if image in rows
    )
    assert all((row["image"], row["caption"]) in there for row in added)

    last = files(tmp_path)
    assert counts(go(mixed.root, out)) == (0, damaged, sum(left), *left, 0, 0)
    assert files(tmp_path) == last
    out.unlink()
    assert counts(go(mixed.root, out)) == (0, damaged, sum(left), *left, 0, 1)
    assert out.read_bytes() == last[out][0]
