"""The scores against their official code: captions end to end with pycocoevalcap, VQA's rule by hand."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from blip2.evaluate.answers import exact_match, gqa_accuracy, normalise, normalised_match, vqa_accuracy
from blip2.evaluate.captions import caption_scores
from blip2.evaluate.retrieval import ranks, recalls

sys.path.insert(0, str(Path(__file__).parent))
from sentences import sentences

# What the official code (VQAEval.processPunctuation, then processDigitArticle) makes of answers.
OFFICIAL = [
    ("a dog", "dog"), ("The Dogs.", "dogs"), ("an apple, a pear", "apple pear"), ("two", "2"), ("Two men", "2 men"),
    ("TEN", "10"), ("twenty one", "twenty 1"), ("eleven", "eleven"), ("none", "0"),
    ("None of the above", "0 of above"), ("zero.", "0"), ("one hundred", "1 hundred"),
    ("10,000 people", "10000 people"), ("3.50 dollars", "3.50 dollars"), (".5", ".5"), ("5.", "5"), ("no.", "no"),
    ("U.S.A.", "usa"), ("p.m.", "pm"), ("4:30", "4 30"), ("4 : 30", "4 30"), ("4:30 pm", "4 30 pm"),
    ("red/white", "red white"), ("red / white", "red white"), ("black & white", "black & white"),
    ("t-shirt", "t-shirt"), ("dont know", "don't know"), ("don't know", "don t know"), ("cant tell", "can't tell"),
    ("isnt", "isn't"), ("it's", "it s"), ("its", "its"), ("thats", "that's"), ("theyre", "they're"),
    ("whats that", "what's that"), ("oclock", "o'clock"), ("3 o'clock", "3 o clock"), ("5 oclock", "5 o'clock"),
    ("yall", "y'all"), ("shouldve", "should've"), ("she's", "she s"), ("shes", "shes"), ("wont", "won't"),
    ("\"stop\"", "stop"), ("'yes'", "yes"), ("(left)", "left"), ("left (side)", "left side"), ("yes?", "yes"),
    ("yes ?", "yes"), ("what?!", "what !"), ("a", ""), ("The", ""), ("A.", ""), ("hello, world", "hello world"),
    ("one,two", "1 2"), ("1,2", "12"), ("50%", "50%"), ("$5", "$5"), ("no_parking", "no parking"),
    ("i @ home", "i home"), ("me@home", "me home"), ("a+b", "b"), ("2+2=4", "2 2 4"), ("x > y", "x y"),
    ("x>y", "x y"), ("`tick`", "tick"), ("semi;colon", "semi colon"), ("semi; colon", "semi colon"),
    ("  spaces   inside ", "spaces inside"), ("The the a", ""), ("none.", "0"), ("seven-eleven", "seven-eleven"),
    ("nine/ten", "9 10"), ("somebodys", "somebody's"), ("twas", "'twas"), ("let's", "let s"), ("im", "im"),
    ("notve", "not've"), ("maam", "ma'am"), ("rock 'n' roll", "rock n roll"), ("ROCK'N'ROLL", "rock n roll"),
    ("[brackets]", "brackets"), ("5 a.m.", "5 am"), ("100.000", "100.000"), ("...", ""), ("?", ""), ("'70s", "70s"),
    ("café", "café"),
]  # fmt: skip


def _set(images: int) -> tuple[list[list[str]], list[str]]:
    """Five references an image, and captions that share much with them."""
    texts, random_ = sentences(images * 6, seed=77), random.Random(0)
    references = [texts[i * 5 : i * 5 + 5] for i in range(images)]
    captions = []
    for own, other in zip(references, texts[images * 5 :]):
        words = random_.choice(own).split(" ") + other.split(" ")[: random_.randint(0, 4)]
        captions.append(" ".join(word for word in words if random_.random() < 0.85))
    return references, captions


def _theirs(references: list[list[str]], captions: list[str]) -> dict[str, float]:
    """pycocoevalcap as it is, Java tokenizer included."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    sets = (
        {i: [{"caption": text} for text in texts] for i, texts in enumerate(references)},
        {i: [{"caption": text}] for i, text in enumerate(captions)},
    )
    words = tuple(PTBTokenizer().tokenize(texts) for texts in sets)
    bleu, _ = Bleu(4).compute_score(*words, verbose=0)
    scores = {f"BLEU-{n + 1}": bleu[n] for n in range(4)}
    return scores | {"ROUGE-L": Rouge().compute_score(*words)[0], "CIDEr": Cider().compute_score(*words)[0]}


@pytest.mark.skipif(shutil.which("java") is None, reason="their tokenizer needs Java")
@pytest.mark.parametrize("images", [60, pytest.param(5000, marks=pytest.mark.full)])
def test_captions_score_as_in_pycocoevalcap(images: int) -> None:
    pytest.importorskip("pycocoevalcap")
    references, captions = _set(images)
    ours = caption_scores(references, captions)
    theirs = _theirs(references, captions)
    assert ours.total == pytest.approx(theirs, abs=1e-6) and 0.1 < theirs["BLEU-4"] < 0.9
    assert len(ours.per_image) == images and set(ours.per_image[0]) == set(theirs)


def test_what_cannot_be_scored_is_refused() -> None:
    for references, captions in (([], []), ([["a"]], ["a", "b"]), ([[]], ["a"])):
        with pytest.raises(ValueError, match="each image needs one caption"):
            caption_scores(references, captions)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs.", "2 dogs"), ("Yes!", "yes!"), ("1,000", "1000"), ("a/b", "b"), ("a / b", "b"),
        ("dont", "don't"), ("None", "0"), ("isn't", "isn t"), ("3.5", "3.5"), (" red\n", "red"),
        ("he said: no", "he said no"), ("somebody'd", "somebody d"), ("x-ray", "x-ray"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_in_vqa(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_own_answers_compare_as_vqa_normalises_them() -> None:
    assert len(OFFICIAL) >= 80
    for answer, normal in OFFICIAL:
        assert normalise(answer) == normal, answer
        if normal:
            assert normalised_match(answer, ["none such", normal.upper()]) == (normalise(normal) == normal), (
                answer
            )
        assert normalised_match(answer, ["other", answer]) == normalised_match(f" {answer}\n", [answer]) == 1
    for answer, right in (("a", "the"), ("", "the"), ("A", "an"), ("two", "3"), ("", "yes"), ("B", "a")):
        assert normalised_match(answer, [right]) == 0, (answer, right)


@pytest.mark.parametrize(
    ("references", "captions", "undefined"),
    [
        ([["a red rose in a vase"]], ["a rose in a vase"], {"CIDEr"}),
        ([["a rose", "the rose"]], ["a rose"], {"CIDEr", "BLEU-3", "BLEU-4"}),
        ([["a rose"], ["a rose"], ["a rose"]], ["a rose by a vase", "rose", ""], {"CIDEr"}),
        ([["a red rose"], ["a dog"]], ["", ""], {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"}),
        ([["a red rose"], ["a dog"]], ["a red rose", "dog"], {"BLEU-4"}),
        ([["a red rose"], ["a dog"]], ["a rose and a vase", "a dog"], set()),
    ],
)
def test_scores_that_are_not_defined_say_so(
    references: list[list[str]], captions: list[str], undefined: set[str]
) -> None:
    pytest.importorskip("pycocoevalcap")
    scores = caption_scores(references, captions)
    assert {name for name, value in scores.total.items() if value is None} == undefined
    assert {note.partition(" ")[0] for note in scores.left_out} == undefined
    assert all("is not defined here: " in note for note in scores.left_out)
    for row, caption in zip(scores.per_image, captions):
        assert (row["CIDEr"] is None) == ("CIDEr" in undefined)
        assert [row[f"BLEU-{n}"] is None for n in range(1, 5)] == [
            len(caption.split()) < n for n in range(1, 5)
        ]


def test_vqa_accuracy_by_ten_annotators() -> None:
    for agree, accuracy in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        annotators = ["yes"] * agree + ["no"] * (10 - agree)
        assert vqa_accuracy("Yes.", annotators) == pytest.approx(accuracy)
    assert vqa_accuracy("it's", ["it's"] * 10) == 0  # one answer by all is compared as it was given
    assert gqa_accuracy("The Dog.", "dog") == 1 and gqa_accuracy("cat", "dog") == 0
    assert exact_match(" Yes ", ["yes", "yeah"]) == 1 and exact_match("y", ["yes"]) == 0


def test_recalls() -> None:
    table = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.5, 0.6], [0.3, 0.2, -torch.inf]])
    assert ranks(table, [[0], [1, 2], [2]]) == [0, 1, 3]
    assert recalls(table, [[0], [1, 2], [2]], (1, 2)) == pytest.approx({"R@1": 1 / 3, "R@2": 2 / 3})
    for columns in (1, 4, 5, 6, 10, 11):  # a recall that could not fail is none
        values = recalls(torch.rand(3, columns), [[0]] * 3)
        assert [value is None for value in values.values()] == [columns <= k for k in (1, 5, 10)]
