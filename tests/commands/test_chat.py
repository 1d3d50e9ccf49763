"""A conversation at a prompt, in a real terminal too, and from a pipe."""

from __future__ import annotations

import builtins
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Done, Run

from blip2.predict import Chat

ROOT = Path(__file__).parents[2]
SHORT = ("--beams", "1", "--max-new-tokens", "4")


@pytest.fixture
def talk(run: Run, monkeypatch: pytest.MonkeyPatch, generator_folder: Path, pictures: list[Path]) -> Run:
    """Talk at a prompt: what is typed, and exceptions for what is pressed; at the end Ctrl-D."""

    def talk(*typed: str | type[BaseException], terminals: tuple[str, ...] = ("stdin", "stdout")) -> Done:
        events: Iterator[str | type[BaseException]] = iter(typed)

        def type_next(prompt: str) -> str:
            assert prompt == "> " * ("stdout" in terminals)
            event = next(events, EOFError)
            if isinstance(event, str):
                return event
            raise event

        monkeypatch.setattr(builtins, "input", type_next)
        done = run("chat", pictures[0], *SHORT, "--model", generator_folder, terminals=terminals)
        assert next(events, None) in (None, "left")
        return done

    return talk


@pytest.mark.parametrize("word", ["exit", "quit", "/bye", "/exit", " Exit ", "/QUIT", "bye"])
def test_words_that_end(word: str, talk: Run) -> None:
    done = talk("what?", word, "left")
    assert (done.status, len(done.lines)) == (0, 1)


@pytest.mark.parametrize("nothing", ["", "   ", "\t", KeyboardInterrupt])
def test_what_asks_nothing_is_passed_over(nothing: str, talk: Run) -> None:
    assert len(talk("what?", nothing, nothing, "why?").lines) == 2
    assert talk().status == 0


def test_commands_and_questions_that_look_like_them(talk: Run) -> None:
    for word in ("/help", "help", " /Help"):
        done = talk(word)
        assert done.out == b"" and "Ctrl-C" in done.err and "/bye" in done.err
    for word in ("/clear", "/exti", "/"):
        done = talk(word)
        assert done.out == b"" and f"there is no command {word}; /help lists them" in done.err
    for question in ("/what is it?", "exit where?", "is there an exit", "quit it"):
        assert len(talk(question).lines) == 1


def test_an_empty_question_is_refused_and_the_next_one_answered(talk: Run, run: Run) -> None:
    done = talk("\u200b", "what?", "\x07\u2060")
    assert (done.status, len(done.lines), done.err.count("holds only")) == (0, 1, 2)


def test_the_prompt_is_not_among_answers_in_a_file(talk: Run) -> None:
    done = talk("what?", terminals=("stdin",))
    assert len(done.lines) == 1 and b">" not in done.out and done.err.count("> ") == 2


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    talk: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, asked = Chat.send, []

    def interrupted(chat: Chat, text: str, **options: object) -> object:
        asked.append(text)
        if text == "long?":
            raise KeyboardInterrupt
        assert "long?" not in dict(chat.turns)
        return send(chat, text, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Chat, "send", interrupted)
    done = talk("what?", "long?", "why?")
    assert (done.status, len(done.lines), asked) == (0, 2, ["what?", "long?", "why?"])


@pytest.mark.parametrize("bad", [b"caf\xe9?", b"\xff\xfe", b"\xed\xa0\x80"])
def test_what_is_no_text_ends_a_pipe(
    bad: bytes, run: Run, generator_folder: Path, pictures: list[Path]
) -> None:
    command = ("chat", pictures[0], *SHORT, "--model", generator_folder)
    done = run(*command, stdin=b"what?\n\n  \nexit\n" + bad + b"\nwhy?\n")
    assert (done.status, len(done.lines)) == (1, 2)  # in a pipe "exit" is a question as any other
    assert done.err.startswith("blip2: standard input, line 5: byte 0x") and done.err.count("\n") == 1
    done = run(*command, stdin="what?\n\u200b\nwhy?\n".encode())
    assert (done.status, len(done.lines)) == (1, 2) and "holds only" in done.err


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
def test_in_a_real_terminal(generator_folder: Path, pictures: list[Path]) -> None:
    import pty

    terminal, end = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "blip2",
        "chat",
        str(pictures[0]),
        "--model",
        str(generator_folder),
        *SHORT,
    ]
    # Its controlling terminal, so that Ctrl-C is a signal.
    program = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        stdin=end, stdout=end, stderr=end, start_new_session=True, env=environment,
    )  # fmt: skip
    os.close(end)

    def until(expected: bytes) -> bytes:
        shown, deadline = b"", time.monotonic() + 60
        while expected not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096)
        return shown

    def until_it_waits() -> None:
        """Until the line editor waits for keys. It shows the prompt before: a Ctrl-C in between would be lost."""
        time.sleep(0.3)
        state = Path(f"/proc/{process.pid}/stat")  # of the main thread; on Linux
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)

    try:
        until(b"\r\n> ")
        for typed, expected in (
            (b"\r", b"\r\n> "),
            (b"/help\r", b"stop an answer\r\n> "),
            (b"/nonsense\r", b"no command /nonsense; /help lists them\r\n> "),
            (b"no question\x03", b"\r\n> "),
            (b"\x03", b"\r\n> "),
        ):
            until_it_waits()
            os.write(terminal, typed)
            until(expected)
        os.write(terminal, b"what?\r")
        assert until(b"\r\n> ").count(b"\r\n") == 2
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
