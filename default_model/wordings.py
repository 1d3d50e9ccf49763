"""How people ask: wordings of every form of question, read from the files in questions/, and how people type them.

A file is a kind of question, a section "[form]" a form of it, a line a wording: (a|b) is either, <name> any of the
words in `WORDS`, {slot} is filled in when a question is made. A line that begins with "*" is kept for the test:
training never draws it. Every wording of a form is used with every answer the form has, so that none betrays it.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

from blip2.evaluate.scenes import LETTER_CASES, in_case

Split = Literal["train", "test"]
FOLDER = Path(__file__).with_name("questions")
WORDS = {
    "pic": "picture|image|photo|photograph",
    "whats": "what is|what's|whats",
    "color": "color|colour",
    "things": "objects|things|items",
    "thing": "object|thing|item",
    "tell": "tell me|can you tell me|could you tell me|please tell me|say",
}
POLITE = (
    "please,", "hi,", "hello,", "hey,", "ok,", "okay,", "so", "now", "well,", "excuse me,", "sorry,",
    "here is a picture.",
)  # fmt: skip
BRIEF = ("answer in one word.", "answer briefly.", "be brief.", "keep it short.", "no long answer please.")
THANKS = ("please", "thanks", "thank you", "for me", "in your opinion", "exactly", "now")
CASE_WEIGHTS = (40, 35, 10, 15)  # of LETTER_CASES in training
POLITE_SHARE, MARK_DROPPED, MISTAKES, GREY = 0.12, 0.3, 0.04, 0.3


@lru_cache(maxsize=1)
def wordings() -> dict[tuple[str, Split], tuple[tuple[str, ...], ...]]:
    """("kind.form", split) -> its lines, each with all its variants as format strings.

    Raises:
        ValueError: a line outside any section, or a section without wordings for one of the splits.
    """
    lines: dict[tuple[str, Split], list[tuple[str, ...]]] = {}
    for path in sorted(FOLDER.glob("*.txt")):
        form = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                form = f"{path.stem}.{line.strip('[]')}"
                lines |= {(form, "train"): [], (form, "test"): []}
            elif line and not line.startswith("#"):
                if not form:
                    raise ValueError(f"{path}: {line!r} is in no section; put one, such as [one], above it")
                split: Split = "test" if line.startswith("*") else "train"
                lines[form, split].append(_variants(line.removeprefix("*").strip()))
    for (form, split), found in lines.items():
        if not found:
            raise ValueError(f"{FOLDER}: {form} has no wording for the {split} split; add a line")
    return {key: tuple(found) for key, found in lines.items()}


def _variants(line: str) -> tuple[str, ...]:
    """All texts that a line stands for."""
    line = re.sub(r"<(\w+)>", lambda match: f"({WORDS[match[1]]})", line)
    choice = re.search(r"\(([^()]*\|[^()]*)\)", line)
    if choice is None:
        return (line,)
    before, after = line[: choice.start()], line[choice.end() :]
    variants = (text for option in choice[1].split("|") for text in _variants(f"{before}{option}{after}"))
    return tuple(dict.fromkeys(variants))


def ask(form: str, rng: random.Random, split: Split = "train", **slots: str) -> str:
    """A question of a form, "color.one", with its slots filled, in lower case; now and then mistyped in training."""
    wording = rng.choice(rng.choice(wordings()[form, split]))
    if split == "train" and rng.random() < MISTAKES:
        wording = _mistyped(wording, rng)
    text = wording.format(**slots)
    return text.replace("gray", "grey") if "gray" in text and rng.random() < GREY else text


def typed(question: str, rng: random.Random) -> str:
    """The question as somebody may type it: politely, with an instruction, without its mark, in any letter case."""
    mark = question[-1:] if question[-1:] in ("?", ".", "!") else ""
    words = question.removesuffix(mark)
    draw = rng.random() if words else 1.0
    if draw < 0.6 * POLITE_SHARE:
        words = f"{rng.choice(POLITE)} {words}"
    elif draw < 0.8 * POLITE_SHARE:
        words = f"{words} {rng.choice(THANKS)}"
    elif draw < POLITE_SHARE:
        words, mark = f"{words}{mark} {rng.choice(BRIEF)}".removesuffix("."), "."
    draw = rng.random()
    if draw < MARK_DROPPED:
        mark = ""
    elif draw < MARK_DROPPED + 0.04:
        mark *= 2
    elif draw < MARK_DROPPED + 0.07:
        mark = f" {mark}" if words else mark
    (case,) = rng.choices(LETTER_CASES, CASE_WEIGHTS)
    return in_case(words + mark, case)


def _mistyped(wording: str, rng: random.Random) -> str:
    """The wording with two letters of a word swapped, or one lost or doubled; slots stay whole."""
    words = [match.span() for match in re.finditer(r"(?<![{\w])[a-z]{4,}(?![}\w])", wording)]
    if not words:
        return wording
    start, end = rng.choice(words)
    at = rng.randrange(start + 1, end - 1)
    first, second = wording[at], wording[at + 1]
    lost = (
        first if at == start + 1 else second
    )  # never a word's second letter: without it one word is an insult
    return wording[:at] + rng.choice((second + first, lost, first + first + second)) + wording[at + 2 :]
