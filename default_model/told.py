"""What the language model says when it is told in words what is in a picture: `python -m default_model.told DIR`.

Its captions and answers from a perfect description are the most that the queries of an image can bring it to. DIR holds
the materials, the tokenizers and the finished stage `language`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from blip2.generate import GenerationOptions, generate
from blip2.opt import Opt
from blip2.text import CAPTION_PROMPT, question_prompt
from blip2.train.pretrain import bag_embeddings, say
from default_model import evaluation, stages
from default_model.batches import Tokenizers
from default_model.language import standard
from default_model.materials import Cutouts
from default_model.scenes import Composer, Scene
from default_model.spelling import Speller

GREEDY = GenerationOptions(beams=1, max_new_tokens=30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="so many scenes, and as many questions")
    arguments = parser.parse_args()
    words = Tokenizers.load(arguments.folder)
    model = stages.generator(arguments.folder, words).eval()
    assert isinstance(model.language, Opt)
    speller = Speller(words.language)
    spoken = bag_embeddings(model.language, speller.bags).detach()
    composer = Composer(Cutouts.load(arguments.folder))

    @torch.inference_mode()
    def said(scene: Scene, prompt: str) -> str:
        prefix = say(spoken, torch.tensor([speller.spell(scene)]))  # [1, Q, W]
        ids = torch.tensor([words.language.encode(prompt)])
        written = generate(model, prefix, ids, None, GREEDY)
        return words.language.decode(written.ids[0]).strip()

    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for scene in evaluation.multi_scenes(composer, arguments.limit):
        caption = said(scene, CAPTION_PROMPT)
        total["captions, every object named"] += 1
        right["captions, every object named"] += all(
            evaluation.names_object(caption, each.noun, composer.nouns) for each in scene.objects
        )
    for scene, qa in evaluation.unseen_questions(composer, standard(), arguments.limit):
        total[f"questions, {qa.kind}"] += 1
        right[f"questions, {qa.kind}"] += said(scene, question_prompt(qa.question)) == qa.answer
    for name in total:
        print(f"{name:32} {right[name] / total[name]:6.1%}")


if __name__ == "__main__":
    main()
