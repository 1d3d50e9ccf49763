"""Hostile tokenizer files: a typed error or a tokenizer that works, in two seconds and 256 MB, never a crash."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import tokenizers
from hostile_tokenizers import Files, charsmap, honest, hostile

from blip2.text import MAX_TEXT, TextError, Tokenizer

Cases = Callable[[], Iterator[tuple[str, Files]]]
MOST_S, MOST_BYTES = 2.0, 256 << 20
TEXTS = (
    "a", "", " ", "a" * MAX_TEXT, "ab " * (MAX_TEXT // 3), " " * MAX_TEXT, "A B C é", "\ufdfa" * MAX_TEXT,
    "</s><pad>[DEC]\0\n", "".join(map(chr, range(1, 0xD800, 7))), "\U0001f469\u200d\U0001f469" * 300, "a\u0301" * 9999,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux does")
FORK = multiprocessing.get_context("fork")
Result = tuple[str, str, float, int]  # the case, what came of it, processor time, memory


def _peak() -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _use(folder: Path) -> tuple[str, float, int]:
    """Load, encode and decode."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, outcome, text = _peak(), time.process_time(), "works", ""
    try:
        tokenizer = Tokenizer.load(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids[:50])
        tokenizer.largest_id()
    except TextError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error} ({text[:9]!r})"
    return outcome, time.process_time() - begun, _peak() - before


def _use_all(cases: Cases, start: int, folder: Path, answers: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic of the library reports itself there
    for name, files in itertools.islice(cases(), start, None):
        for path in folder.iterdir():
            path.unlink()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        answers.send((name, *_use(folder)))


def results(cases: Cases, folder: Path) -> list[Result]:
    """What comes of each case, in a process of its own that goes on after the one that ended it."""
    done: list[Result] = []
    total = sum(1 for _ in cases())
    while len(done) < total:
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_use_all, args=(cases, len(done), folder, theirs))
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while ours.poll(60):
                done.append(ours.recv())
        process.kill()
        process.join()
        if len(done) < total:
            done.append((f"case {len(done)}", f"ended with {process.exitcode}", 0.0, 0))
    return done


@pytest.mark.parametrize("cases", [honest, hostile])
def test_all(cases: Cases, tmp_path: Path) -> None:
    done = results(cases, tmp_path)
    wrong = [
        f"{name}: {outcome[:200]} ({seconds:.1f} s, {size >> 20} MB)"
        for name, outcome, seconds, size in done
        if not (outcome == "works" or outcome.startswith("refused"))
        or not (seconds < MOST_S and size < MOST_BYTES and len(outcome) < 900)
    ]
    assert not wrong, "\n".join(wrong[:40])
    refused = [name for name, outcome, *_ in done if outcome != "works"]
    assert (refused == []) if cases is honest else (len(done) > 1000 and len(refused) > 700)


def test_a_panic_is_an_error_of_ours(capfd: pytest.CaptureFixture[str]) -> None:
    """A table whose units point beyond it, which the library follows; given to it past all checks."""
    table = bytearray(charsmap({"A": "a"}))
    table[4:8] = (0x3FFFFF << 10 & 0xFFFFFFFF).to_bytes(4, "little")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.normalizer = tokenizers.normalizers.Precompiled(bytes(table))
    with pytest.raises(TextError, match="the text cannot be encoded: index out of bounds"):
        Tokenizer(backend).encode("A")


def test_texts_have_an_end(tmp_path: Path) -> None:
    files = dict(honest())["t5"]
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(TextError, match=r"the text has 32,769 characters, over 32,768"):
        tokenizer.encode("a" * (MAX_TEXT + 1))
    assert len(tokenizer.encode("a b " * MAX_TEXT, max_length=7)) == 7  # it is cut anyway
