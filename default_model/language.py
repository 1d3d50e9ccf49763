"""Text about pictures, scenes and photographs: captions, questions with answers, conversations, and plain text.

Everything is derived from what is known about the picture, so every sentence is true. Captions and answers are lower
case and say "color"; questions are as people type them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from default_model.asking import Asker
from default_model.captions import photo_caption, scene_caption
from default_model.corpus import text_corpus
from default_model.grammar import Grammar
from default_model.imagenet import ImageNetClass, read_imagenet
from default_model.materials import PICTURES, ObjectRow, read_table
from default_model.photo import Photo
from default_model.photo_questions import PhotoQuestions
from default_model.plain_questions import PLAIN_KINDS, plain_question
from default_model.qa import QA
from default_model.scene_questions import SceneQuestions
from default_model.scenes import Noun, Scene, nouns_of
from default_model.wordings import Split, typed

# Kinds of questions in training: highest for what takes longest to learn.
SCENE_KINDS = {
    "presence": 9, "position": 8, "count": 6, "object": 4, "color": 3, "category": 3, "description": 1, "breed": 0.5,
    "nonsense": 0.8,
}  # fmt: skip
PHOTO_KINDS = {
    "object": 5, "presence": 3, "category": 3, "breed": 3, "color": 2, "description": 2, "count": 0.7, "position": 0.4,
    "nonsense": 0.8,
}  # fmt: skip
CONVERSATIONS = 0.3  # of the rows of questions: the others are independent of one another
PLAIN = 0.1  # of the independent questions about scenes


class Language(Grammar):
    """Writes about scenes and photographs of known nouns. All randomness comes from the `rng` arguments."""

    def __init__(
        self,
        nouns: Mapping[str, Noun],
        colours: Mapping[str, tuple[str, ...]] | None = None,
        breeds: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """colours, breeds: for a noun, those its pictures have."""
        super().__init__(nouns, breeds)
        self.colours = dict(colours or {})

    @property
    def noun_categories(self) -> dict[str, str]:
        """The category of every noun."""
        return {noun: entry.category for noun, entry in self.nouns.items()}

    # -- captions

    def caption(self, picture: Scene | Photo, rng: random.Random) -> str:
        """A caption for training, the continuation of "a photo of".

        A scene's names every noun with its number, and varies in colour words and in relations.
        """
        if isinstance(picture, Photo):
            return photo_caption(self, picture, rng)
        style = {"colour": rng.random() < 0.35, "relate": rng.random() < 0.7, "reverse": rng.random() < 0.15}
        return scene_caption(self, picture, **style)

    def canonical_caption(self, scene: Scene) -> str:
        """The plainest caption: relation where there is one, colours for plain shapes only."""
        return scene_caption(self, scene, colour=False, relate=True, reverse=False)

    def reference_captions(self, scene: Scene, n: int = 5) -> list[str]:
        """The canonical caption and other true ones, n in all (repeated if a scene has fewer)."""
        styles = [
            (False, True, False),
            (False, False, False),
            (True, True, False),
            (False, True, True),
            (True, False, False),
        ]
        captions = list(
            dict.fromkeys(scene_caption(self, scene, colour=c, relate=r, reverse=v) for c, r, v in styles)
        )
        return [captions[i % len(captions)] for i in range(n)]

    # -- questions

    def question(
        self, picture: Scene | Photo, rng: random.Random, kind: str, split: Split = "train"
    ) -> QA | None:
        """A question of one of `qa.KINDS` in lower case, as the first about a picture; None if that allows none."""
        return self._asker(picture, rng, split).question(kind)

    def turns(
        self, picture: Scene | Photo, rng: random.Random, most: int = 4, split: Split = "train"
    ) -> list[tuple[str, str]]:
        """One to `most` questions with their answers, in the order they are asked, for one row of training.

        Some are conversations, in which "it" is what an earlier turn named. In the split "train" the questions are
        typed as people do (`wordings.typed`), in "test" in lower case, with wordings that training never has.
        """
        asker = self._asker(picture, rng, split)
        if rng.random() < CONVERSATIONS:
            drawn = asker.conversation()[:most]
        else:
            drawn = self._independent(asker, picture, rng, rng.randint(min(2, most), most))
        pairs = {typed(qa.question, rng) if split == "train" else qa.question: qa.answer for qa in drawn}
        return list(pairs.items())

    def _independent(self, asker: Asker, picture: Scene | Photo, rng: random.Random, count: int) -> list[QA]:
        weights = PHOTO_KINDS if isinstance(picture, Photo) else SCENE_KINDS
        drawn: list[QA] = []
        for kind in rng.choices(list(weights), list(weights.values()), k=count):
            if (
                kind in PLAIN_KINDS
                and isinstance(picture, Scene)
                and asker.split == "train"
                and rng.random() < PLAIN
            ):
                qa = plain_question(self, picture, rng, kind)
            else:
                qa = asker.question(kind, opening=not drawn)
            if qa is not None:
                drawn.append(qa)
        description = asker.question("description")
        assert description is not None
        return drawn or [description]

    def _asker(self, picture: Scene | Photo, rng: random.Random, split: Split) -> Asker:
        if isinstance(picture, Photo):
            return PhotoQuestions(self, picture, rng, split)
        return SceneQuestions(self, picture, rng, split)

    # -- plain text

    def text_corpus(self, rng: random.Random) -> Iterator[str]:
        """Endless lines for the language model, each ending in a newline, in the formats it will read later."""
        return text_corpus(self, rng)


def language_of(rows: Iterable[ObjectRow], classes: Iterable[ImageNetClass] = ()) -> Language:
    """The language of a table's nouns and of the colours its pictures have, and of ImageNet's classes."""
    rows, classes = list(rows), list(classes)
    colours: dict[str, set[str]] = {}
    for row in rows:
        if row.colour:
            colours.setdefault(row.noun, set()).add(row.colour)
    breeds: dict[str, set[str]] = {}
    for entry in classes:
        if entry.breed:
            breeds.setdefault(entry.noun, set()).add(entry.breed)
    nouns = {entry.noun: Noun(entry.noun, entry.plural, entry.article, entry.category) for entry in classes}
    return Language(
        nouns | nouns_of(rows),
        {noun: tuple(sorted(names)) for noun, names in colours.items()},
        {noun: tuple(sorted(names)) for noun, names in breeds.items()},
    )


@lru_cache(maxsize=1)
def standard() -> Language:
    """The language of objects.csv, pictures.csv and imagenet.csv."""
    return language_of((*read_table(), *read_table(PICTURES)), read_imagenet())
