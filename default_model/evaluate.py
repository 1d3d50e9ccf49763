"""The default model's scores on what it has never seen: `python -m default_model.evaluate DIR`, DIR with the materials.

Everything goes through the public surface: `caption`, `ask`, `embed` and `match`. Prints a table with the goals; the
last line is one JSON object. `--model` and `--matcher` name other folders than the shipped ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm

import blip2
from blip2.predict import Predictor
from default_model import easyvqa, evaluation
from default_model.language import QA, Language, standard
from default_model.materials import Cutouts
from default_model.scenes import Composer, Scene

RERANKED = 32  # candidates of the contrast that matching scores again
GOALS = {
    "easy-VQA test, exact match": 0.99,
    "one stamp on an unseen background, named": 0.92,
    "scenes of 2-4 objects, every object named": 0.85,
    "unseen questions, exact match": 0.90,
    "text retrieval among 1,000, R@1": 0.85,
    "image retrieval among 1,000, R@1": 0.85,
}

Item = TypeVar("Item")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--matcher", type=Path)
    parser.add_argument("--limit", type=int, help="so many of each set, for a quick look")
    arguments = parser.parse_args()
    model = blip2.load(arguments.model, matcher=arguments.matcher)
    composer = Composer(Cutouts.load(arguments.folder))
    scores = evaluate(model, composer, standard(), arguments.folder, arguments.limit)
    for name, score in scores.items():
        goal = f"goal {GOALS[name]:.0%}" if name in GOALS else ""
        shown = f"{score:.3f}" if name == "scenes of 2-4 objects, CIDEr" else f"{score:.1%}"
        print(f"{name:48} {shown:>8}   {goal}")
    print(json.dumps({name: round(score, 4) for name, score in scores.items()}))


def evaluate(
    model: Predictor, composer: Composer, language: Language, folder: Path, limit: int | None = None
) -> dict[str, float]:
    """Every figure of the table, as shares; with `limit`, on the first so many items of each set."""
    scores = easy_vqa(model, folder, limit)
    scores |= singles(model, composer, limit)
    scores |= scenes(model, composer, language, limit)
    scores |= questions(model, composer, language, limit)
    return scores | retrieval(model, composer, language, limit)


def easy_vqa(model: Predictor, folder: Path, limit: int | None) -> dict[str, float]:
    """The official test split, every question."""
    asked = [
        (Image.fromarray(picture.image), question, answer)
        for picture in easyvqa.load(folder, "test")
        for question, answer in picture.questions
    ][:limit]
    right = 0
    for batch in _batches(asked, "easy-VQA"):
        answers = model.ask(
            [image for image, _, _ in batch], [question for _, question, _ in batch], max_new_tokens=10
        )
        right += sum(str(said) == answer for said, (_, _, answer) in zip(answers, batch, strict=True))
    return {"easy-VQA test, exact match": right / len(asked)}


def singles(model: Predictor, composer: Composer, limit: int | None) -> dict[str, float]:
    """One stamp on a background of a kind training never shows: does the caption name it?"""
    found = list(evaluation.stamp_singles(composer))[:limit]
    captions = _captions(model, found, "stamps")
    named = sum(
        evaluation.names_object(text, scene.objects[0].noun, composer.nouns)
        for text, scene in zip(captions, found, strict=True)
    )
    return {"one stamp on an unseen background, named": named / len(found)}


def scenes(model: Predictor, composer: Composer, language: Language, limit: int | None) -> dict[str, float]:
    """Scenes of two to four objects: does the caption name every one; are all numbers right; CIDEr."""
    found = list(evaluation.multi_scenes(composer))[:limit]
    captions = _captions(model, found, "scenes")
    nouns = composer.nouns
    every = sum(
        all(evaluation.names_object(text, o.noun, nouns) for o in scene.objects)
        for text, scene in zip(captions, found, strict=True)
    )
    exact = sum(
        evaluation.counts_right(text, scene, nouns) for text, scene in zip(captions, found, strict=True)
    )
    scores = {
        "scenes of 2-4 objects, every object named": every / len(found),
        "scenes of 2-4 objects, names and numbers right": exact / len(found),
    }
    references = [language.reference_captions(scene) for scene in found]
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        print("CIDEr is left out: pip install pycocoevalcap", file=sys.stderr)
        return scores
    cider, _ = Cider().compute_score(
        {i: [_words(text) for text in texts] for i, texts in enumerate(references)},
        {i: [_words(text)] for i, text in enumerate(captions)},
    )
    return scores | {"scenes of 2-4 objects, CIDEr": float(cider)}


def questions(
    model: Predictor, composer: Composer, language: Language, limit: int | None
) -> dict[str, float]:
    """Questions about unseen scenes, the five kinds in equal numbers."""
    asked = list(evaluation.unseen_questions(composer, language))[:limit]
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for batch in _batches(asked, "questions"):
        answers = model.ask(
            [Image.fromarray(scene.image) for scene, _ in batch],
            [qa.question for _, qa in batch],
            max_new_tokens=12,
        )
        for said, (_, qa) in zip(answers, batch, strict=True):
            total[qa.kind] += 1
            right[qa.kind] += _same(str(said), qa)
    scores = {"unseen questions, exact match": right.total() / total.total()}
    return scores | {f"  of which {kind}": right[kind] / total[kind] for kind in total}


def retrieval(
    model: Predictor, composer: Composer, language: Language, limit: int | None
) -> dict[str, float]:
    """Unseen pairs: the contrast (ITC) ranks all, matching (ITM) re-ranks the best; the score is the sum of the two."""
    pairs = list(evaluation.retrieval_pairs(composer, language))[:limit]
    images = [Image.fromarray(scene.image) for scene, _ in pairs]
    texts = [text for _, text in pairs]
    embedded = torch.cat([model.embed(batch) for batch in _batches(images, "images")])  # [N, Q, E]
    similarity = torch.einsum("nqe,te->ntq", embedded, model.embed_text(texts)).amax(-1)  # [N, N]
    tables = {"text": similarity, "image": similarity.T}
    # A pair is matched when the text is among the image's best candidates, or the image among the text's.
    count = min(RERANKED, len(pairs))
    paired = torch.zeros(len(pairs), len(pairs), dtype=torch.bool)
    paired.scatter_(1, similarity.topk(count).indices, True)
    paired.T.scatter_(1, similarity.T.topk(count).indices, True)
    summed = similarity.clone()
    for row, image in enumerate(tqdm(images, desc="matching", disable=None)):
        columns = paired[row].nonzero().flatten()
        matches = model.match(image, [texts[column] for column in columns.tolist()])
        summed[row, columns] += torch.tensor([match.probability for match in matches])
    ranked = {"text": summed, "image": summed.T}
    diagonal = torch.arange(len(pairs))
    shown = {f"{name} retrieval among 1,000, R@1": table for name, table in ranked.items()}
    shown |= {f"  {name} retrieval by contrast alone": table for name, table in tables.items()}
    return {name: float((table.argmax(1) == diagonal).float().mean()) for name, table in shown.items()}


def _captions(model: Predictor, found: Sequence[Scene], title: str) -> list[str]:
    images = [Image.fromarray(scene.image) for scene in found]
    return [str(text) for batch in _batches(images, title) for text in model.caption(batch)]


def _same(said: str, qa: QA) -> bool:
    return said.strip().lower() == qa.answer


def _words(text: str) -> str:
    """Words apart from commas, as the published scores' tokenizer leaves them."""
    return text.replace(",", " ")


def _batches(items: Sequence[Item], title: str, size: int = 64) -> Iterator[Sequence[Item]]:
    for start in tqdm(range(0, len(items), size), desc=title, disable=None):
        yield items[start : start + size]


if __name__ == "__main__":
    main()
