"""Training batches of every stage, pure functions of a position: scenes and easy-VQA's training images, with texts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blip2.images import ImageProcessor, to_pixels
from blip2.text import CAPTION_PROMPT, Tokenizer, question_prompt
from default_model import easyvqa, language, recipe
from default_model.colours import COLOURS
from default_model.materials import Cutouts, read_table
from default_model.queries import UNKNOWN, assign_parts
from default_model.scenes import SHAPES, Composer, Scene
from default_model.wordings import typed

IGNORE_INDEX = -100
CROWDED = (12, 18, 28, 42)  # weights of 1 to 4 objects: more of them for the same computing
EASY_SHARE = 0.1  # of images, where a stage trains on easy-VQA too
# Column and row of every patch, [N - 1, 2].
PATCHES = torch.cartesian_prod(*[torch.arange(recipe.VISION.grid)] * 2).flip(1)
IMAGE_PROCESSOR = ImageProcessor(size=recipe.IMAGE_PX)


@dataclass(frozen=True)
class Tokenizers:
    """The language model's tokenizer and the matcher's."""

    language: Tokenizer
    matcher: Tokenizer

    @classmethod
    def load(cls, folder: Path) -> Tokenizers:
        return cls(
            Tokenizer.load(folder / "tokenizer-language"), Tokenizer.load(folder / "tokenizer-matcher")
        )

    @property
    def newline(self) -> int:
        """The language model's end of a caption or an answer."""
        (token,) = self.language.encode("\n", frame=False)
        return token

    @property
    def image(self) -> int:
        """The language model's placeholder for a query."""
        return _id(self.language, "<image>")

    @property
    def dec(self) -> int:
        """The matcher's token that begins a text to be generated."""
        return _id(self.matcher, "[DEC]")


def _id(tokenizer: Tokenizer, token: str) -> int:
    id_ = tokenizer.token_id(token)
    assert id_ is not None, token
    return id_


class _Seeded:
    """A random source for each position: the same position always gives the same batch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def at(self, position: int) -> random.Random:
        return random.Random(f"{self.name} {position}")


class Pictures:
    """Scenes and a share of easy-VQA's training images. Files are read at the first use, in the data process."""

    def __init__(
        self, folder: Path, easy_share: float, objects: tuple[int, int, int, int] | None = None
    ) -> None:
        """`objects`: weights of scenes with one to four objects; None: the composer's own."""
        self.folder, self.easy_share, self.objects = folder, easy_share, objects
        self.composer: Composer | None = None
        self.easy: list[easyvqa.EasyImage] = []

    def draw(self, rng: random.Random) -> Scene | easyvqa.EasyImage:
        if self.composer is None:
            self.composer = Composer(Cutouts.load(self.folder))
            self.easy = easyvqa.load(self.folder, "train") if self.easy_share else []
        if rng.random() < self.easy_share:
            return rng.choice(self.easy)
        objects = rng.choices((1, 2, 3, 4), self.objects)[0] if self.objects else None
        return self.composer.compose(rng.getrandbits(48), "train", objects=objects)


def pixels_of(pictures: list[Scene | easyvqa.EasyImage]) -> Tensor:
    """[B, 3, S, S]."""
    return to_pixels([Image.fromarray(p.image) for p in pictures], IMAGE_PROCESSOR)


class VisionBatches:
    """For the image encoder: scenes, their objects, the noun phrase of each patch's object, and where that is.

    The vocabulary has the words of all nouns and colours, and every phrase as a word of its own.
    """

    def __init__(self, folder: Path, crowded: int, halved: int, batch: int = 64) -> None:
        """`crowded`: how many batches are of crowded scenes. `halved`: how many keep half of the patches, for speed."""
        self.batch, self.crowded, self.halved = batch, crowded, halved
        self.dense, self.seeded = Pictures(folder, 0.0, CROWDED), _Seeded("vision")
        self.plain = Pictures(folder, 0.0)
        named = {_phrase(row.noun, row.colour) for row in read_table()}
        named |= {_phrase(shape, colour) for shape in SHAPES for colour in COLOURS}
        self.phrases = {phrase: i for i, phrase in enumerate(sorted(named))}
        words = sorted({word for phrase in self.phrases for word in phrase.split()})
        self.words = {word: 1 + i for i, word in enumerate(words)}
        self.phrase_ids, self.phrase_mask = self._encode([[phrase] for phrase in self.phrases])

    @property
    def vocabulary(self) -> int:
        """How many word ids there are, the padding (0) included."""
        return 1 + len(self.words) + len(self.phrases)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = self.seeded.at(position)
        pictures = self.dense if position < self.crowded else self.plain
        scenes = [s for s in (pictures.draw(rng) for _ in range(self.batch)) if isinstance(s, Scene)]
        regions = torch.full((len(scenes), recipe.VISION.grid**2), -1)
        places = torch.stack([(PATCHES + 0.5) / recipe.VISION.grid] * len(scenes))  # [B, N - 1, 2]
        texts = [[_phrase(placed.noun, placed.colour) for placed in scene.objects] for scene in scenes]
        for row, place, scene, named in zip(regions, places, scenes, texts, strict=True):
            grid = torch.from_numpy(scene.patch_object.astype("int64")).flatten()
            for index, phrase in enumerate(named):
                left, top, right, bottom = scene.objects[index].box
                row[grid == index] = self.phrases[phrase]
                place[grid == index] = torch.tensor([left + right, top + bottom]) / (2 * scene.side)
        ids, mask = self._encode(texts)
        return {
            "pixels": pixels_of(list(scenes)),
            "ids": ids,
            "mask": mask,
            "text_ids": same([", ".join(text) for text in texts]),
            "phrase_ids": self.phrase_ids,
            "phrase_mask": self.phrase_mask,
            "regions": regions,
            "places": places,
            **({"keep": half(regions, rng)} if position < self.halved else {}),
        }

    def _encode(self, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Texts of phrases -> word ids and mask."""
        first = 1 + len(self.words)
        rows = [
            [first + self.phrases[phrase] for phrase in text]
            + [self.words[word] for phrase in text for word in phrase.split()]
            for text in texts
        ]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return ids, (ids != 0).long()


class Parts:
    """The object in each query's part of a picture. easy-VQA's images have no such labels."""

    def __init__(self, folder: Path) -> None:
        named = VisionBatches(folder, 0, 0)
        self.phrases = named.phrases
        self.same = {"phrase_ids": named.phrase_ids, "phrase_mask": named.phrase_mask}

    def of(self, pictures: list[Scene | easyvqa.EasyImage]) -> dict[str, Tensor]:
        """What `QueryPretrain` needs in a batch beside its pixels."""
        parts = torch.full((len(pictures), recipe.QUERIES), -1)
        places = torch.full((len(pictures), recipe.QUERIES, 2), 0.5)
        for part, place, picture in zip(parts, places, pictures, strict=True):
            if not isinstance(picture, Scene):
                part[:] = UNKNOWN
                continue
            boxes = torch.tensor([placed.box for placed in picture.objects])
            middles = (boxes[:, :2] + boxes[:, 2:]) / (2 * picture.side)
            owners = assign_parts(middles, recipe.QUERIES)
            part[owners] = torch.tensor([self.phrases[_phrase(o.noun, o.colour)] for o in picture.objects])
            place[owners] = middles
        return {"parts": parts, "places": places, **self.same}


class SceneBatches:
    """For the queries: pictures and the object in each query's part of them."""

    def __init__(self, folder: Path, batch: int = 128) -> None:
        self.batch, self.parts, self.seeded = batch, Parts(folder), _Seeded("queries")
        self.pictures = Pictures(folder, 0.0, (2, 3, 3, 3))

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = self.seeded.at(position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        return {"pixels": pixels_of(pictures), **self.parts.of(pictures)}


def _phrase(noun: str, colour: str | None) -> str:
    return f"{colour} {noun}" if colour else noun


class MatchBatches:
    """For stage 1: pictures with a caption each."""

    def __init__(self, folder: Path, words: Tokenizers, batch: int = 64) -> None:
        self.words, self.batch = words, batch
        self.pictures, self.seeded = Pictures(folder, EASY_SHARE / 2), _Seeded("match")

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = self.seeded.at(position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        captions = [caption_of(picture, rng) for picture in pictures]
        ids, mask = self.words.matcher.encode_batch(captions, pad="right")
        return {
            "pixels": pixels_of(pictures),
            "ids": ids[:, :32],
            "mask": mask[:, :32],
            "image_ids": same(captions),
        }


class CaptionBatches:
    """For stage 2: pictures with a caption each, most after the captioning prompt."""

    def __init__(self, folder: Path, words: Tokenizers, batch: int = 64) -> None:
        self.words, self.batch = words, batch
        self.pictures, self.seeded = Pictures(folder, EASY_SHARE / 2), _Seeded("caption")

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = self.seeded.at(position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        rows = [caption_row(self.words, caption_of(picture, rng), rng) for picture in pictures]
        return {"pixels": pixels_of(pictures), **pad(rows, self.words.language.pad_id)}


class InstructionBatches:
    """For language model and fine-tuning: pictures with a caption and a conversation each, and labels for queries."""

    def __init__(self, folder: Path, words: Tokenizers, name: str = "instruction", batch: int = 48) -> None:
        self.words, self.batch, self.parts = words, batch, Parts(folder)
        self.pictures, self.seeded = Pictures(folder, EASY_SHARE), _Seeded(name)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = self.seeded.at(position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        rows, index = [], []
        for i, picture in enumerate(pictures):
            rows.append(caption_row(self.words, caption_of(picture, rng), rng))
            rows.append(chat_row(self.words, turns_of(picture, rng)))
            index += [i, i]
        batch = pad(rows, self.words.language.pad_id)
        batch["image_index"] = torch.tensor(index)
        return {"pixels": pixels_of(pictures), **batch, **self.parts.of(pictures)}


# --- texts -> rows of ids and labels ---------------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # ids, labels


def caption_of(picture: Scene | easyvqa.EasyImage, rng: random.Random) -> str:
    return language.standard().caption(picture, rng) if isinstance(picture, Scene) else picture.caption


def turns_of(picture: Scene | easyvqa.EasyImage, rng: random.Random, most: int = 4) -> list[tuple[str, str]]:
    """Up to `most` questions with their answers; sometimes a conversation in which they build on each other."""
    if isinstance(picture, Scene):
        return language.standard().turns(picture, rng, most)
    drawn = rng.sample(picture.questions, min(len(picture.questions), rng.randint(2, most)))
    return [(typed(question, rng), answer) for question, answer in drawn]


def caption_row(words: Tokenizers, caption: str, rng: random.Random) -> Row:
    prompt = words.language.encode(CAPTION_PROMPT if rng.random() < 0.85 else "")
    target = words.language.encode(f" {caption}\n", frame=False)
    return prompt + target, [IGNORE_INDEX] * len(prompt) + target


def chat_row(words: Tokenizers, turns: list[tuple[str, str]]) -> Row:
    """A conversation; every answer is a target that ends with a newline, although a full stop follows it."""
    ids: list[int] = []
    labels: list[int] = []
    (stop,) = words.language.encode(".", frame=False)
    for i, (question, answer) in enumerate(turns):
        first, last = i == 0, i + 1 == len(turns)
        prompt = words.language.encode(("" if first else " ") + question_prompt(question), frame=first)
        target = words.language.encode(f" {answer}", frame=False)
        ids += prompt + target + [words.newline if last else stop]
        labels += [IGNORE_INDEX] * len(prompt) + target + [words.newline]
    return ids, labels


def pad(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """Rows padded on the right to the longest."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, (row, targets) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(targets)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def half(regions: Tensor, rng: random.Random) -> Tensor:
    """Half of every image's patches, int64 [B, N / 2]: those with an object first, but a quarter background."""
    rows = []
    for row in regions.tolist():
        shown = [i for i, phrase in enumerate(row) if phrase >= 0]
        empty = [i for i, phrase in enumerate(row) if phrase < 0]
        rng.shuffle(shown)
        rng.shuffle(empty)
        count = len(row) // 2
        spared = min(len(empty), count // 4)
        chosen = shown[: count - spared] + empty
        rows.append(sorted(chosen[:count]))
    return torch.tensor(rows)


def same(texts: list[str]) -> Tensor:
    """int64 [B]: equal where the texts are."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(text, len(first)) for text in texts])
