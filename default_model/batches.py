"""Training batches of every stage, pure functions of a position: pictures as the stem sees them, texts about them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.modeling.stem import fold
from blip2.text import CAPTION_PROMPT, Tokenizer, question_prompt
from default_model import easyvqa
from default_model.corpus import imagined
from default_model.evidence import Evidence, Sight, stored
from default_model.features import Bank, scene_of
from default_model.language import Language, standard
from default_model.namer import CODE, standard_names
from default_model.photo import Photo
from default_model.recipe import PARTS
from default_model.scenes import Scene
from default_model.slots import (
    COLOUR_GAIN,
    EMPTY,
    NAME_GAIN,
    OBJECT,
    SCENE,
    Slot,
    SlotEncoder,
    photo_slots,
    scene_slots,
)
from default_model.wordings import typed

IGNORE_INDEX = -100
EASY_PARTS = (5, 6, 9, 10)  # of the imagined prefixes of easy-VQA's images: the middle ones
PROMPTED = 0.85  # of the captions follow the captioning prompt

Row = tuple[list[int], list[int]]  # ids, labels


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


def seeded(name: str, position: int) -> random.Random:
    """A random source for each position: the same position always gives the same batch."""
    return random.Random(f"{name} {position}")


@dataclass(frozen=True)
class Picture:
    """What a batch knows of one picture. cells: [768, 8, 8], None for one that only its facts describe.

    facts: a scene, a photograph as the stem sees it, or one of easy-VQA's images.
    patches: int64 [64], the object at each cell of a scene, -1 for none.
    """

    facts: Scene | Sight | easyvqa.EasyImage
    cells: Tensor | None = None

    def caption(self, language: Language, rng: random.Random) -> str:
        if isinstance(self.facts, easyvqa.EasyImage):
            return self.facts.caption
        return language.caption(self.facts.photo if isinstance(self.facts, Sight) else self.facts, rng)

    def turns(self, language: Language, rng: random.Random, most: int = 4) -> list[tuple[str, str]]:
        """Questions and their answers; some build on each other."""
        if isinstance(self.facts, easyvqa.EasyImage):
            drawn = rng.sample(self.facts.questions, min(len(self.facts.questions), rng.randint(2, most)))
            return [
                (typed(question, rng) if rng.random() < 0.3 else question, answer)
                for question, answer in drawn
            ]
        return language.turns(self.facts.photo if isinstance(self.facts, Sight) else self.facts, rng, most)

    def slots(self, rng: random.Random) -> list[Slot]:
        """What the queries are to say. Where easy-VQA's shape is, is not known: an imagined one is anywhere."""
        if isinstance(self.facts, Sight):
            return photo_slots(self.facts.photo, self.facts.nouns, self.facts.breeds)
        if isinstance(self.facts, Scene):
            return scene_slots(self.facts)
        slots = [Slot(EMPTY, {}, known=self.cells is None)] * PARTS + [Slot(SCENE, {})]
        if self.cells is None:
            words = self.facts.caption.split()
            shape = dict.fromkeys((word for word in words if word in easyvqa.SHAPES), NAME_GAIN)
            colour = dict.fromkeys((word for word in words if word in easyvqa.COLOURS), COLOUR_GAIN)
            part = rng.choice(EASY_PARTS)
            place = (part % 4 + rng.random()) / 4, (part // 4 + rng.random()) / 4
            slots[part] = Slot(OBJECT, shape | colour, place)
        return slots


class Imagined:
    """Pictures of which only the facts exist, for the language model alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def evidence(self) -> Evidence:
        return load_evidence(self.folder)

    @cached_property
    def easy(self) -> list[easyvqa.EasyImage]:
        return easyvqa.load(self.folder, "train")

    def draw(self, rng: random.Random) -> Picture:
        draw = rng.random()
        if draw < 0.04:
            return Picture(rng.choice(self.easy))
        if draw < 0.34:
            return Picture(self.evidence.sight(self.evidence.imagine(rng), rng))
        return Picture(imagined(standard(), rng))


class Pictures:
    """Stored pictures, and photographs whose evidence is imagined. Files are read at the first use, in the data
    process.
    """

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        """weights: of "scene", "easy", "photograph", "pasted" and "imagined"."""
        self.folder, self.weights = folder, weights

    @cached_property
    def banks(self) -> dict[str, Bank]:
        kinds = [kind for kind, weight in self.weights.items() if weight and kind != "imagined"]
        return {kind: Bank(self.folder, kind) for kind in kinds}

    @cached_property
    def evidence(self) -> Evidence:
        return load_evidence(self.folder)

    @cached_property
    def easy(self) -> list[easyvqa.EasyImage]:
        return easyvqa.load(self.folder, "train")

    @cached_property
    def codes(self) -> Tensor:
        """The stem's evidence matrix, [CODE, K + P]."""
        from safetensors import safe_open

        with safe_open(self.folder / "stem.safetensors", "pt") as file:
            matrix: Tensor = file.get_tensor("readout.evidence.weight").float()
        return matrix

    def draw(self, rng: random.Random) -> Picture:
        (kind,) = rng.choices(list(self.weights), list(self.weights.values()))
        if kind == "imagined":
            return self._imagined(rng)
        bank = self.banks[kind]
        i = rng.randrange(len(bank))
        facts, cells = bank.facts[i], bank.cells(i)
        if kind == "scene":
            return Picture(scene_of(facts), cells)
        if kind == "easy":
            return Picture(self.easy[facts["easy"]], cells)
        sight = self.evidence.sight(stored(facts), rng)
        if kind == "pasted":  # the truth is known
            noun = facts["noun"]
            photo = Photo(noun, None, self.evidence.categories[noun], facts["colour"] or None)
            sight = Sight(photo, {noun: 1.0}, {})
        return Picture(sight, cells)

    def _imagined(self, rng: random.Random) -> Picture:
        """A photograph's cells, or those of two scenes mixed, with the evidence of some noun."""
        probabilities = self.evidence.imagine(rng)
        if rng.random() < 0.5:
            cells = self.banks["photograph"].cells(rng.randrange(len(self.banks["photograph"])))
        else:
            scenes = self.banks["scene"]
            cells, other = (scenes.cells(rng.randrange(len(scenes))) for _ in range(2))
            channels = torch.from_numpy(np.random.default_rng(rng.getrandbits(32)).random(len(cells)) < 0.5)
            cells[channels] = other[channels]
        cells[-CODE:] = (self.codes @ self.evidence.vector(probabilities))[:, None, None]
        return Picture(self.evidence.sight(probabilities, rng), cells)


def load_evidence(folder: Path) -> Evidence:
    stored_ = json.loads((folder / "evidence.json").read_text())
    categories = {noun: entry.category for noun, entry in standard().nouns.items()}
    return Evidence(standard_names(), categories, stored_["alike"], stored_["patterns"])


def pixels_of(pictures: list[Picture]) -> Tensor:
    """[B, 3, 128, 128]."""
    return fold(torch.stack([picture.cells for picture in pictures if picture.cells is not None]))


class LanguageBatches:
    """For the language model alone: slots and texts of imagined pictures."""

    def __init__(self, folder: Path, words: Tokenizers, batch: int = 48) -> None:
        self.words, self.batch = words, batch
        self.pictures, self.slots = Imagined(folder), SlotEncoder(words.language)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("language", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        rows = text_rows(self.words, pictures, rng, captions=0.3, most=6)
        return rows | self.slots.encode([p.slots(rng) for p in pictures])


class InstructionBatches:
    """For fine-tuning: pictures with a caption and a conversation each, and what each query is to say."""

    def __init__(
        self,
        folder: Path,
        words: Tokenizers,
        weights: dict[str, float],
        name: str = "instruction",
        batch: int = 48,
    ) -> None:
        self.words, self.batch, self.name = words, batch, name
        self.pictures, self.slots, self.labels = (
            Pictures(folder, weights),
            SlotEncoder(words.language),
            Labels(),
        )

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded(self.name, position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        return {
            "pixels": pixels_of(pictures),
            **text_rows(self.words, pictures, rng),
            **self.slots.encode([p.slots(rng) for p in pictures]),
            **self.labels.of(pictures),
        }


class QueryBatches:
    """For image encoder and queries: pictures and what each cell and each query is to say."""

    def __init__(self, folder: Path, words: Tokenizers, weights: dict[str, float], batch: int = 96) -> None:
        self.batch = batch
        self.pictures, self.slots, self.labels = (
            Pictures(folder, weights),
            SlotEncoder(words.language),
            Labels(),
        )

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("queries", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        return {
            "pixels": pixels_of(pictures),
            **self.slots.encode([p.slots(rng) for p in pictures]),
            **self.labels.of(pictures),
        }


class MatchBatches:
    """For stage 1: pictures with a caption each."""

    def __init__(self, folder: Path, words: Tokenizers, weights: dict[str, float], batch: int = 64) -> None:
        self.words, self.batch, self.pictures = words, batch, Pictures(folder, weights)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("match", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        captions = [picture.caption(standard(), rng) for picture in pictures]
        ids, mask = self.words.matcher.encode_batch(captions, pad="right")
        return {
            "pixels": pixels_of(pictures),
            "ids": ids[:, :32],
            "mask": mask[:, :32],
            "image_ids": same(captions),
        }


class Labels:
    """Nouns and places of the cells of scenes."""

    @cached_property
    def nouns(self) -> dict[str, int]:
        return {noun: i for i, noun in enumerate(standard().all)}

    def of(self, pictures: list[Picture]) -> dict[str, Tensor]:
        """cell_nouns int64 [B, 64], -1 where there is no object, -2 where nothing is known; cell_places [B, 64, 2]."""
        nouns = torch.full((len(pictures), 64), -2)
        places = torch.full((len(pictures), 64, 2), 0.5)
        for row, place, picture in zip(nouns, places, pictures, strict=True):
            scene = picture.facts
            if isinstance(scene, Scene):
                row[:] = -1
                grid = torch.from_numpy(scene.patch_object.astype("int64")).flatten()
                for index, placed in enumerate(scene.objects):
                    left, top, right, bottom = placed.box
                    row[grid == index] = self.nouns[placed.noun]
                    place[grid == index] = torch.tensor([left + right, top + bottom]) / (2 * scene.side)
        return {"cell_nouns": nouns, "cell_places": places}


# --- texts -> rows of ids and labels ---------------------------------------------------------------------------------


def text_rows(
    words: Tokenizers, pictures: list[Picture], rng: random.Random, captions: float = 1.0, most: int = 4
) -> dict[str, Tensor]:
    """Questions, `most` at most, and for this share of the pictures a caption, as `Stage2` takes them."""
    rows, index = [], []
    for i, picture in enumerate(pictures):
        if rng.random() < captions:
            rows.append(caption_row(words, picture.caption(standard(), rng), rng))
            index.append(i)
        rows.append(chat_row(words, picture.turns(standard(), rng, most)))
        index.append(i)
    return pad(rows, words.language.pad_id) | {"image_index": torch.tensor(index)}


def caption_row(words: Tokenizers, caption: str, rng: random.Random) -> Row:
    prompt = words.language.encode(CAPTION_PROMPT if rng.random() < PROMPTED else "")
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


def same(texts: list[str]) -> Tensor:
    """int64 [B]: equal where the texts are."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(text, len(first)) for text in texts])
