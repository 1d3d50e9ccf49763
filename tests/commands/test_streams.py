"""Standard streams of every kind, and names that would steer a terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from running import Run

from blip2.commands.streams import one_line, steers, visible, visible_json

ROOT = Path(__file__).parents[2]
SHORT = ("--beams", "1", "--max-new-tokens", "4")
# A name, and how it is shown.
STEERING = {
    "a\nb.png": r"a\nb.png",
    "\r\n.png": r"\r\n.png",
    "a\tb.png": r"a\tb.png",
    "\x1b[2J\x1b]0;x\x07.png": r"\x1b[2J\x1b]0;x\x07.png",
    "\x7f\x9b31m.png": r"\x7f\u009b31m.png",
    "\u202egnp.png": r"\u202egnp.png",
    "a\u2066b\u2069\u200f.png": r"a\u2066b\u2069\u200f.png",
    "a\u2028b\x85.png": r"a\u2028b\u0085.png",
    "\U000e0041.png": r"\U000e0041.png",
    "caf\udce9.png": r"caf\xe9.png",
    "\udcff\udc9b.png": r"\xff\x9b.png",
}
PLAIN = [
    "Bär 漢字.png",
    "a\xa0b\u3000\u202fPM.png",
    "👩\u200d🚀.png",
    "می\u200cخواهم.png",
    "e\u0301\ufe0f\ue000.png",
]


@pytest.mark.parametrize(("name", "shown"), STEERING.items())
def test_names_are_shown_and_do_not_steer(name: str, shown: str) -> None:
    assert visible(name) == shown
    assert not any(map(steers, visible_json({"x": name}))) and json.loads(visible_json({"x": name})) == {
        "x": name
    }
    assert not any(map(steers, one_line(name)))


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_any_language_are_shown_as_they_are(name: str) -> None:
    assert visible(name) == name and name in visible_json({"x": name})


@pytest.fixture
def names(pictures: list[Path], tmp_path: Path) -> list[str]:
    """A folder `d` of images with names of every kind, in the order in which they are printed."""
    (tmp_path / "d").mkdir()
    every = sorted(f"d/{name}" for name in (*STEERING, *PLAIN))
    for name in every:
        (tmp_path / name).write_bytes(pictures[0].read_bytes())
    return every


def test_a_line_an_image_whatever_its_name(run: Run, names: list[str], generator_folder: Path) -> None:
    Path("d/\x01\n\x1b[1m.png").write_bytes(b"damaged")
    done = run("caption", "d", *SHORT, "--model", generator_folder)
    assert (
        done.status == 1
        and done.err.startswith(r"blip2: d/\x01\n\x1b[1m.png: ")
        and done.err.count("\n") == 1
    )
    assert [line.split("\t")[0] for line in done.lines] == [visible(name) for name in names]
    assert not any(map(steers, done.out.decode().replace("\n", "").replace("\t", "")))
    done = run("caption", "d", *SHORT, "--json", "--model", generator_folder)
    records = [json.loads(line) for line in done.lines]
    assert [record["image"] for record in records] == ["d/\x01\n\x1b[1m.png", *names]
    assert "d/\x01\n\x1b[1m.png" in records[0]["error"] and done.err == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp1252", "cp932", "latin-1", "utf-16"])
def test_results_are_utf8(
    encoding: str, run: Run, names: list[str], generator_folder: Path, matcher_folder: Path
) -> None:
    Path("q é漢.txt").write_text("what é漢?\n")
    writes, matches = ["--model", generator_folder], ["--model", matcher_folder]
    for command in (
        ["caption", "d", "absent é漢", *SHORT, *writes],
        ["caption", "d", "absent é漢", *SHORT, *writes, "--json", "--suffix", " é漢"],
        ["ask", "d", "what é漢?", "--json", *SHORT, *writes],
        ["caption", "d", "--questions", "q é漢.txt", *SHORT, *writes],
        ["caption", f"d/{PLAIN[0]}", "--stream", "--max-new-tokens", 4, *writes],
        ["chat", f"d/{PLAIN[0]}", *SHORT, *writes, "--json"],
        ["match", "d", "é漢", *matches],
        ["embed", f"d/{PLAIN[0]}", "--text", "é漢", *matches],
        ["explain", f"d/{PLAIN[0]}", "--text", "é漢", "-o", "é漢.png", *writes, "--json"],
        ["inspect", "absent é漢"],
    ):
        stdin = "what é漢?\n".encode() * (command[0] == "chat")
        done = run(*command, stdin=stdin, encoding=encoding)
        expected = run(*command, stdin=stdin)
        assert (done.status, done.out) == (expected.status, expected.out) and done.status != 2 - (
            "absent" in command[1]
        )
        done.out.decode()


def test_a_terminal_of_few_characters(run: Run, names: list[str], generator_folder: Path) -> None:
    command = ["caption", "d", "absent 漢", *SHORT, "--model", generator_folder]
    for encoding in ("ascii", "cp1251", "cp932"):
        done = run(*command, encoding=encoding, terminals=("stdout", "stderr"))
        assert done.status == 1 and len(done.out.split(b"\n")) == len(names) + 1 and b"?" in done.out


def _shell(command: str) -> subprocess.CompletedProcess[str]:
    program = command.replace("blip2", shlex.join([sys.executable, "-m", "blip2"]), 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.skipif(os.name != "posix", reason="a shell closes them")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, generator_folder: Path, pictures: list[Path]) -> None:
    done = _shell(f"blip2 models {closed}")
    assert (done.returncode, bool(done.stdout), done.stderr) == (0, ">&-" not in closed.split(), "")
    assert _shell(f"blip2 inspect absent {closed}").returncode == 2
    if closed.startswith("<&-"):
        done = _shell(f"blip2 caption - {pictures[0]} absent --model {generator_folder} {closed}")
        assert done.returncode == 1 and "Error" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_an_error(generator_folder: Path, pictures: list[Path]) -> None:
    caption = f"caption {pictures[0]} {pictures[1]} --model {generator_folder}"
    for command in ("models", "--help", "caption --help", "--version", "completion zsh", caption):
        done = _shell(f"blip2 {command} > /dev/full")
        assert done.returncode == 2, command
        assert done.stderr == "blip2: standard output cannot be written (No space left on device)\n"
    assert _shell("blip2 inspect absent 2> /dev/full").returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell makes them")
def test_readers_that_leave(generator_folder: Path, pictures: list[Path]) -> None:
    status = "; echo ${PIPESTATUS[0]} >&3; } 3>&1 >&2"
    for command in ("--help", "models --json", "completion bash"):
        done = _shell(f"{{ blip2 {command} | true{status}")
        assert (done.stdout, done.stderr) == ("0\n", "")
    # Who no longer reads the errors still gets the results, and their status.
    command = f"caption absent {pictures[0]} absent {pictures[1]} --model {generator_folder} --batch-size 1"
    done = _shell(f"{{ blip2 {command} 2>&1 >&3 | true{status}")
    assert len(done.stdout.splitlines()) == 3 and done.stdout.endswith("\n1\n")


# --- warnings ------------------------------------------------------------------------------------------------------


def _warns(path: Path, kind: str) -> None:
    """Write a sound image that Pillow warns of."""
    entry = {"beyond": (0x010E, 2, 5000, 4000), "much": (0x0100, 2, 9000, 9000)}.get(kind)
    ifd = (
        struct.pack("<H", 1)
        + struct.pack("<HHII", *(entry or (0x010E, 2, 9, 60)))
        + bytes(4 * (kind != "cut"))
    )
    Image.new("RGB", (40, 40), "red").save(path, exif=b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + ifd)


@pytest.mark.parametrize("kind", ["beyond", "much", "cut"])
def test_warnings_name_their_image(kind: str, run: Run, generator_folder: Path, matcher_folder: Path) -> None:
    Path("d").mkdir()
    images = [Path("d/a.jpg"), Path("d/b\n.jpg"), Path("d/c.webp")]
    for image in images:
        _warns(image, kind)
    with tarfile.open("t.tar", "w") as archive:
        archive.add("d/a.jpg", "in.jpg")
    Path("l.txt").write_text("d/a.jpg\nd/c.webp\n")
    writes, matches = [*SHORT, "--model", generator_folder], ["--model", matcher_folder]
    for command, seen in (
        (["caption", "d", *writes], images),
        (["ask", "t.tar", "l.txt", "what?", *writes], ["t.tar/in.jpg", "d/a.jpg", "d/c.webp"]),
        (["caption", "d/a.jpg", "--stream", "--max-new-tokens", 4, *writes[4:]], ["d/a.jpg"]),
        (["match", "d", "a", *matches], images),
        (["embed", "d/a.jpg", *matches], ["d/a.jpg"]),
        (["chat", "d/a.jpg", *writes], ["d/a.jpg"]),
        (["explain", "d/a.jpg", "-o", "o.png", *matches[:1], generator_folder], ["d/a.jpg"]),
        (["caption", "d", "--out", "o.jsonl", "--quiet", *writes], images),
    ):
        done = run(*command)
        assert done.status == 0
        named = [re.fullmatch(r"blip2: warning: ([^:]*): .*\S", line) for line in done.err.splitlines()]
        assert sorted(found[1] for found in named if found) == sorted(visible(str(image)) for image in seen)
        assert None not in named


def test_a_warning_and_the_bar_have_lines_of_their_own(run: Run, generator_folder: Path) -> None:
    Path("d").mkdir()
    for i in range(12):
        _warns(Path(f"d/{i:02}.jpg"), "beyond")
    done = run("caption", "d", *SHORT, "--batch-size", 2, "--model", generator_folder, terminals=("stderr",))
    shown = [line.split("\r")[-1] for line in done.err.split("\n") if "warning" in line]
    assert sorted(line.split(":")[2].strip() for line in shown) == [f"d/{i:02}.jpg" for i in range(12)]
    assert all(line.startswith("blip2: warning: ") for line in shown) and "images/s" in done.err
