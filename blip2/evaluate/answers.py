"""The accuracy of answers: VQA's rule with ten annotators (Antol et al., 2015), normalised and exact match.

Normalisation and accuracy are those of VQA's official evaluation code, including its quirks: every full stop that no
digit follows is dropped, and other marks become spaces unless somewhere in the answer they are next to a space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ";:/'[]\"()=+\\_><@`,?"
_FULL_STOP = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# These are corrected if one of their apostrophes is missing.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _APOSTROPHES.split()
    for i, char in enumerate(word)
    if char == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """An answer as VQA compares it: lower case, without articles and marks, numbers up to ten as digits."""
    words = (_NUMBERS.get(word, word) for word in without_marks(answer).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def without_marks(answer: str) -> str:
    """An answer without its marks: the part of the normalisation that VQA applies to annotators' answers too."""
    text = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    together = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or together else " ")
    return _FULL_STOP.sub("", text)


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """0..1: the mean, over leaving out one annotator at a time, of min(1, the others who agree / 3)."""
    normalised, references = normalise(answer), list(annotators)
    if len(set(references)) > 1:
        references = [without_marks(reference) for reference in references]
    agree = [reference == normalised for reference in references]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def gqa_accuracy(answer: str, right: str) -> float:
    """1.0 if the normalised answer is the right one, else 0.0."""
    return float(normalise(answer) == right.strip().lower())


def normalised_match(answer: str, right: Sequence[str]) -> float:
    """1.0 if the answer is one of the right ones as VQA compares answers, else 0.0.

    Of an article alone, such as the letter of a choice, VQA leaves nothing: that is compared as it is.
    """
    normalised = normalise(answer)
    return float(normalised in map(normalise, right)) if normalised else exact_match(answer, right)


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1.0 if the answer is one of the right ones, ignoring case and spaces around it, else 0.0."""
    return float(answer.strip().lower() in {text.strip().lower() for text in right})
