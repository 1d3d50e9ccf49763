"""The words of captions equal those of Stanford's tokenizer: recorded for quick tests, live where Java is installed."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2.evaluate.tokenizer import PUNCTUATION, tokenize

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sentences import sentences  # noqa: E402

RECORDED = HERE / "fixtures/words.json.gz"  # made by this file: python tests/evaluate/test_tokenizer.py


def stanford(texts: list[str], folder: Path) -> list[str]:
    """As pycocoevalcap calls it, but with the file in a folder of the test."""
    import pycocoevalcap.tokenizer

    (jar,) = Path(pycocoevalcap.tokenizer.__path__[0]).glob("stanford-corenlp-*.jar")
    (folder / "sentences.txt").write_text("\n".join(texts), encoding="utf-8")
    command = [
        "java",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    done = subprocess.run([*command, str(folder / "sentences.txt")], capture_output=True, check=True)
    lines = done.stdout.decode("utf-8").split("\n")
    return [
        " ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATION) for line in lines[: len(texts)]
    ]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ('The "red" (old) bus -- it\'s parked...', "the red -lrb- old -rrb- bus it 's parked"),
        ("He works at Acme Corp.", "he works at acme corp."),
        ("1/2 cup at 5:30 p.m. costs $5.00", "1/2 cup at 5:30 p.m. costs $ 5.00"),
        ("I cannot; you're gonna!", "i can not you 're gon na"),
        ("caf\u00e9 na\u00efve \U0001f600 \u65e5\u672c", "caf\u00e9 na\u00efve \u65e5\u672c"),
        ("two\nlines\u2028and\x85more", "two lines and more"),
        ("", ""),
    ],
)
def test_words(caption: str, words: str) -> None:
    assert tokenize([caption]) == [words]


def test_every_sentence_has_its_line() -> None:
    assert tokenize(["a", "", "b\n", "", ""]) == ["a", "", "b", "", ""]
    assert tokenize([]) == []


def test_as_recorded() -> None:
    recorded = json.loads(gzip.decompress(RECORDED.read_bytes()))
    assert tokenize(sentences(len(recorded), seed=5)) == recorded and len(recorded) == 4000


@pytest.mark.full
@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
def test_200_000_sentences_as_stanford_splits_them(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    for seed in range(100, 110):
        texts = sentences(20_000, seed=seed)
        theirs = stanford(texts, tmp_path)
        wrong = [row for row in zip(texts, theirs, tokenize(texts)) if row[1] != row[2]]
        assert not wrong, (seed, len(wrong), wrong[:5])


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    words = stanford(sentences(4000, seed=5), Path("/tmp"))
    RECORDED.write_bytes(gzip.compress(json.dumps(words).encode("utf-8"), mtime=0))
