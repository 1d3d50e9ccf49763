"""Draws contact sheets of scenes with their captions and questions: `python -m default_model.preview MATERIALS OUT`."""

from __future__ import annotations

import argparse
import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from default_model.language import language_of
from default_model.materials import Cutouts
from default_model.scenes import IMAGE_PX, Composer, Split

COLUMNS, ROWS = 9, 4
CELL = (IMAGE_PX + 12, IMAGE_PX + 66)


def sheet(composer: Composer, split: Split, first: int) -> Image.Image:
    """36 scenes from number `first` on, each with its caption and one question."""
    language = language_of(composer.cutouts.rows)
    page = Image.new("RGB", (COLUMNS * CELL[0], ROWS * CELL[1]), "white")
    draw = ImageDraw.Draw(page)
    for i in range(COLUMNS * ROWS):
        scene = composer.compose(first + i, split)
        rng = random.Random(first + i)
        question, answer = language.turns(scene, rng)[0]
        x, y = i % COLUMNS * CELL[0] + 6, i // COLUMNS * CELL[1] + 4
        page.paste(Image.fromarray(scene.image), (x, y))
        text = textwrap.wrap(language.caption(scene, rng), 26) + textwrap.wrap(f"{question} {answer}", 26)
        draw.multiline_text((x, y + IMAGE_PX + 2), "\n".join(text[:5]), "black", spacing=1, font_size=10)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="draw contact sheets of training and test scenes")
    parser.add_argument("materials", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    composer = Composer(Cutouts.load(args.materials))
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        sheet(composer, split, args.first).save(args.out / f"{split}.png")


if __name__ == "__main__":
    main()
