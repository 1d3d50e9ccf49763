"""Training batches of every stage, pure functions of a position: pictures as the stem sees them, texts about them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from blip2.modeling.language import IGNORE_INDEX
from blip2.modeling.stem import fold
from blip2.stemfiles import STEM_FILE
from blip2.text import CAPTION_PROMPT, Tokenizer, question_prompt
from default_model import easyvqa
from default_model.corpus import imagined
from default_model.evidence import EVIDENCE_FILE, Evidence, Sight
from default_model.features import Bank, names_of, scene_of
from default_model.kinds import KINDS, Kind, Share
from default_model.language import Language, standard
from default_model.namer import CODE, standard_names
from default_model.photo import Photo
from default_model.recipe import PARTS
from default_model.scenes import GRID, Scene
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

EASY_PARTS = (5, 6, 9, 10)  # the middle four of 16, where an image of easy-VQA that is imagined has its shape
EASY_IMAGINED, PHOTOS_IMAGINED = (
    0.04,
    0.3,
)  # of the pictures for the language model alone; the others are scenes
EASY_TYPED = 0.3  # of easy-VQA's questions are written as people type them, the others as published
LANGUAGE_CAPTIONS, LANGUAGE_QUESTIONS = 0.3, 6  # captions a picture, and questions at most, for it alone
CELL_NOISE = 0.2  # the standard deviation of what is added to cells, beside 1 of their own
PROMPTED = 0.85  # of the captions follow the captioning prompt
NO_OBJECT, UNKNOWN = -1, -2  # in place of a cell's noun

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
    """The random numbers of a batch: the same at the same position, always."""
    return random.Random(f"{name} {position}")


@dataclass(frozen=True)
class Picture:
    """What a batch knows of one picture.

    facts: a scene, what the stem says of a photograph, or one of easy-VQA's images. cells: [768, 8, 8], the picture as
    the stem sees it; None where only the facts exist.
    """

    facts: Scene | Sight | easyvqa.EasyImage
    cells: Tensor | None = None

    def caption(self, language: Language, rng: random.Random) -> str:
        if isinstance(self.facts, easyvqa.EasyImage):
            return self.facts.caption
        return language.caption(self.facts.photo if isinstance(self.facts, Sight) else self.facts, rng)

    def turns(self, language: Language, rng: random.Random, most: int = 4) -> list[tuple[str, str]]:
        """Questions and their answers, `most` at most; some build on each other."""
        if isinstance(self.facts, easyvqa.EasyImage):
            drawn = rng.sample(self.facts.questions, min(len(self.facts.questions), rng.randint(2, most)))
            return [
                (typed(question, rng) if rng.random() < EASY_TYPED else question, answer)
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
            part, side = rng.choice(EASY_PARTS), math.isqrt(PARTS)
            place = (part % side + rng.random()) / side, (part // side + rng.random()) / side
            slots[part] = Slot(OBJECT, shape | colour, place)
        return slots


class Imagined:
    """Pictures of which only the facts exist, for the language model alone. Files are read at the first use, in the
    process that loads batches.
    """

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
        if draw < EASY_IMAGINED:
            return Picture(rng.choice(self.easy))
        if draw < EASY_IMAGINED + PHOTOS_IMAGINED:
            return Picture(self.evidence.sight(self.evidence.imagine(rng), rng))
        return Picture(imagined(standard(), rng))


class Pictures(Imagined):
    """Stored pictures, and stored ones whose evidence is replaced by an imagined one."""

    def __init__(self, folder: Path, shares: Mapping[Share, float]) -> None:
        """shares: of the kinds of stored pictures, and of "imagined"."""
        super().__init__(folder)
        self.shares = shares

    @cached_property
    def banks(self) -> dict[Kind, Bank]:
        shown = {share for share, weight in self.shares.items() if weight}
        if "imagined" in shown:  # it replaces the evidence of these
            shown |= {"photograph", "scene"}
        return {kind: Bank(self.folder, kind) for kind in KINDS if kind in shown}

    @cached_property
    def codes(self) -> Tensor:
        """The stem's evidence matrix, [CODE, K + P]."""
        with safe_open(self.folder / STEM_FILE, "pt") as file:
            matrix: Tensor = file.get_tensor("readout.evidence.weight").float()
        return matrix

    def draw(self, rng: random.Random) -> Picture:
        (kind,) = rng.choices(list(self.shares), list(self.shares.values()))
        if kind == "imagined":
            return self._imagined(rng)
        bank = self.banks[kind]
        i = rng.randrange(len(bank))
        facts, cells = bank.facts[i], bank.cells(i)
        if kind in ("scene", "varied"):
            return Picture(scene_of(facts), cells)
        if kind == "easy":
            return Picture(self.easy[facts["easy"]], cells)
        sight = self.evidence.sight(names_of(facts), rng)
        if kind == "pasted":  # the truth is known
            noun = facts["noun"]
            photo = Photo(noun, None, self.evidence.categories[noun], facts["colour"] or None)
            sight = Sight(photo, {noun: 1.0}, {})
        return Picture(sight, cells)

    def _imagined(self, rng: random.Random) -> Picture:
        """A photograph's cells, or those of two scenes mixed, with imagined evidence in place of theirs."""
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
    """What the stage names wrote: evidence.json."""
    content = json.loads((folder / EVIDENCE_FILE).read_text(encoding="utf-8"))
    return Evidence(standard_names(), standard().noun_categories, content["alike"], content["patterns"])


def pixels_of(pictures: list[Picture], rng: random.Random) -> Tensor:
    """The folded images of pictures that have cells, with a little noise: [B, 3, 128, 128].

    The evidence has none, which would drown names that are not sure.
    """
    cells = torch.stack([picture.cells for picture in pictures if picture.cells is not None])
    source = torch.Generator().manual_seed(rng.getrandbits(32))
    maps = cells[:, :-CODE]
    maps += CELL_NOISE * torch.randn(maps.shape, generator=source)
    return fold(cells)


class LanguageBatches:
    """For the language model alone: slots and texts of imagined pictures."""

    def __init__(self, folder: Path, words: Tokenizers, batch: int = 48) -> None:
        self.words, self.batch = words, batch
        self.pictures, self.slots = Imagined(folder), SlotEncoder(words.language)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("language", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        rows = text_rows(self.words, pictures, rng, LANGUAGE_CAPTIONS, LANGUAGE_QUESTIONS)
        return rows | self.slots.encode([p.slots(rng) for p in pictures])


class InstructionBatches:
    """For fine-tuning: pictures with a caption and a conversation each, and what each query is to say."""

    def __init__(
        self,
        folder: Path,
        words: Tokenizers,
        shares: Mapping[Share, float],
        name: str = "instruction",
        batch: int = 48,
    ) -> None:
        """`name`: batches of another name are others."""
        self.words, self.batch, self.name = words, batch, name
        self.pictures, self.targets = Pictures(folder, shares), QueryTargets(words.language)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded(self.name, position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        texts = text_rows(self.words, pictures, rng)
        return {"pixels": pixels_of(pictures, rng)} | texts | self.targets.of(pictures, rng)


class QueryBatches:
    """For image encoder and queries: pictures and what each cell and each query is to say."""

    def __init__(
        self, folder: Path, words: Tokenizers, shares: Mapping[Share, float], batch: int = 96
    ) -> None:
        self.batch = batch
        self.pictures, self.targets = Pictures(folder, shares), QueryTargets(words.language)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("queries", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        return {"pixels": pixels_of(pictures, rng)} | self.targets.of(pictures, rng)


class MatchBatches:
    """For stage 1: pictures with a caption each, as `Stage1` takes them."""

    def __init__(
        self, folder: Path, words: Tokenizers, shares: Mapping[Share, float], batch: int = 64
    ) -> None:
        self.words, self.batch, self.pictures = words, batch, Pictures(folder, shares)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        rng = seeded("match", position)
        pictures = [self.pictures.draw(rng) for _ in range(self.batch)]
        captions = [picture.caption(standard(), rng) for picture in pictures]
        ids, mask = self.words.matcher.encode_batch(captions, pad="right")
        return {
            "pixels": pixels_of(pictures, rng),
            "ids": ids[:, :32],
            "mask": mask[:, :32],
            "image_ids": same(captions),
        }


class QueryTargets:
    """What each query and each cell of pictures is to say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.slots = SlotEncoder(tokenizer)

    @cached_property
    def nouns(self) -> dict[str, int]:
        return {noun: i for i, noun in enumerate(standard().all)}

    def of(self, pictures: list[Picture], rng: random.Random) -> dict[str, Tensor]:
        """Slots as `SlotEncoder.encode` gives them, and what `cells` gives."""
        return self.slots.encode([picture.slots(rng) for picture in pictures]) | self.cells(pictures)

    def cells(self, pictures: list[Picture]) -> dict[str, Tensor]:
        """Noun and middle of the object that each of a scene's C = 64 cells shows, row by row.

        Returns:
            cell_nouns: int64 [B, C], by its number among all nouns; NO_OBJECT, or UNKNOWN where it is no scene.
            cell_places: [B, C, 2], column and row as shares of the image's side.
        """
        nouns = torch.full((len(pictures), GRID**2), UNKNOWN)
        places = torch.full((len(pictures), GRID**2, 2), 0.5)
        for row, place, picture in zip(nouns, places, pictures, strict=True):
            scene = picture.facts
            if isinstance(scene, Scene):
                row[:] = NO_OBJECT
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
    """Questions for every picture, `most` at most, and for the share `captions` of them a caption.

    As `Stage2` takes them; image_index says which picture a row is about.
    """
    rows, index = [], []
    for i, picture in enumerate(pictures):
        if rng.random() < captions:
            rows.append(caption_row(words, picture.caption(standard(), rng), rng))
            index.append(i)
        rows.append(chat_row(words, picture.turns(standard(), rng, most)))
        index.append(i)
    return pad(rows, words.language.pad_id) | {"image_index": torch.tensor(index)}


def caption_row(words: Tokenizers, caption: str, rng: random.Random) -> Row:
    """A caption is a target that ends with a newline, mostly after the captioning prompt."""
    prompt = words.language.encode(CAPTION_PROMPT if rng.random() < PROMPTED else "")
    target = words.language.encode(f" {caption}\n", frame=False)
    return prompt + target, [IGNORE_INDEX] * len(prompt) + target


def chat_row(words: Tokenizers, turns: list[tuple[str, str]]) -> Row:
    """A conversation; every answer is a target that ends with a newline, although a full stop follows it in the ids."""
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
