"""Makes the default model: `python -m default_model.stages STAGE DIR`, one command a stage, each resumable.

    vision      image encoder, contrastively from scenes            -> DIR/vision
    queries     each query describes a part of the image            -> DIR/queries
    language    OPT that writes from frozen queries                 -> DIR/language
    stage1      ITC + ITM + ITG, image encoder frozen               -> DIR/stage1
    stage2      captions through the frozen language model          -> DIR/stage2
    stage2-raw  the same without stage 1, for the comparison        -> DIR/stage2-raw
    finetune    captions, questions and chat, all parts trained     -> DIR/finetune
    export      the two folders that ship with the package          -> DIR/default, DIR/default-matcher

DIR holds the output of `python -m default_model.materials DIR` and `python -m default_model.vocab DIR`.
A killed stage resumes from its last checkpoint when the command is repeated.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip2.checkpoint.save import save_model
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.layers import cpu_has_bf16
from blip2.modeling.opt import Opt
from blip2.modeling.qformer import QFormer
from blip2.modeling.vision import ImageEncoder
from blip2.train import FitOptions, Task, fit
from blip2.train.loop import Dataset
from blip2.train.tasks import Stage1, Stage2
from default_model import recipe
from default_model.batches import (
    CaptionBatches,
    InstructionBatches,
    MatchBatches,
    SceneBatches,
    Tokenizers,
    VisionBatches,
)
from default_model.colours import COLOURS
from default_model.language import standard
from default_model.pretrain import (
    ContrastivePretrain,
    ImageTextEncoders,
    WordBag,
    init_matching_heads,
    init_mimetic,
    init_weights,
    qformer_from_matcher,
)
from default_model.queries import (
    LanguagePretrain,
    QueryFinetune,
    QueryPretrain,
    QueryReaders,
    ReadModel,
    init_query_attention,
    init_word_embeddings,
)

WEIGHTS = "weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, help="instead of the recipe's number")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    STAGES[arguments.stage](arguments.folder, arguments.steps, arguments.device)


def _train(
    task: Task, data: Dataset, options: FitOptions, folder: Path, steps: int | None, device: str
) -> None:
    # On a CPU without native bfloat16 it takes ten times as long, on one with it half as long.
    precision: Literal["fp32", "bf16"] = "fp32" if device == "cpu" and not cpu_has_bf16() else "bf16"
    options = replace(options, steps=steps or options.steps, device=device, precision=precision)
    result = fit(task, data, options, folder)
    if not result.finished:
        raise SystemExit(f"stopped at step {result.step}; repeat the command to go on")
    save_file(
        {name: p.detach().cpu().clone() for name, p in task.module.state_dict().items()}, folder / WEIGHTS
    )


def _load(module: nn.Module, folder: Path, prefix: str = "") -> None:
    """Load a finished stage's weights, or those whose names begin with a prefix."""
    tensors = load_file(folder / WEIGHTS)
    module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def _load_queries(qformer: QFormer, folder: Path) -> None:
    """Load the query branch trained by the stage `queries`; a text branch stays unchanged."""
    tensors, prefix = load_file(folder / "queries" / WEIGHTS), "model.qformer."
    trained = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    qformer.load_state_dict({n: trained.get(n, t) for n, t in qformer.state_dict().items()})


def train_vision(folder: Path, steps: int | None, device: str) -> None:
    data = VisionBatches(folder, recipe.VISION_CROWDED, recipe.VISION_HALVED)
    encoders = ImageTextEncoders(ImageEncoder(recipe.VISION), WordBag(data.vocabulary, embedding=192))
    init_weights(encoders, seed=0)
    init_mimetic(encoders.vision, seed=0)
    _train(
        ContrastivePretrain(encoders, muon_scale=recipe.MUON_SCALE),
        data,
        recipe.VISION_OPTIONS,
        folder / "vision",
        steps,
        device,
    )


def read_model(folder: Path, words: Tokenizers) -> ReadModel:
    """The generating model and its queries' readers: the image encoder trained, the rest with initial weights."""
    language = recipe.language_config(len(words.language), words.newline)
    model = Blip2(recipe.generator_config(language, words.image))
    init_weights(model, seed=3)
    vocabulary = VisionBatches(folder, 0, 0).vocabulary
    encoders = ImageTextEncoders(model.vision, WordBag(vocabulary, embedding=recipe.VISION.hidden_size))
    _load(encoders, folder / "vision")
    readers = QueryReaders(encoders)
    init_weights(readers.shown, seed=4)
    return ReadModel(model, readers)


def train_queries(folder: Path, steps: int | None, device: str) -> None:
    both = read_model(folder, Tokenizers.load(folder))
    # scenes the encoder was not trained on
    samples = VisionBatches(folder, 0, 0)
    batches = [samples[recipe.VISION_OPTIONS.steps + i] for i in range(12)]
    with torch.inference_mode():
        features = torch.cat([both.model.vision(batch["pixels"])[:, 1:].flatten(0, 1) for batch in batches])
    middles = torch.cat([batch["places"].flatten(0, 1) for batch in batches])
    shown = torch.cat([batch["regions"].flatten() >= 0 for batch in batches])
    init_query_attention(both.model.qformer, features, middles, shown, seed=4)
    task = QueryPretrain(both, muon_scale=recipe.QFORMER_MUON_SCALE)
    _train(task, SceneBatches(folder), recipe.QUERIES_OPTIONS, folder / "queries", steps, device)


def train_language(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    both = read_model(folder, words)
    _load(both, folder / "queries")
    model, scenes = both.model, SceneBatches(folder)
    assert isinstance(model.language, Opt)
    init_matching_heads(model.language, seed=1)
    batches = [scenes[recipe.QUERIES_OPTIONS.steps + i] for i in range(16)]
    with torch.inference_mode():
        queries = torch.cat([model.qformer(model.vision(b["pixels"])) for b in batches]).flatten(0, 1)
        phrases = both.readers.phrases(batches[0]["phrase_ids"], batches[0]["phrase_mask"])  # [P, E]
    full = torch.cat([b["parts"].flatten() >= 0 for b in batches])
    names = name_vectors(scenes.parts.phrases, phrases)
    bags = [words.language.encode(f" {name}", frame=False) for name in names]
    init_word_embeddings(model, both.readers, queries, full, torch.stack(list(names.values())), bags)
    model.language.tie()
    task = LanguagePretrain(model, muon_scale=recipe.MUON_SCALE)
    data = InstructionBatches(folder, words, "language")
    _train(task, data, recipe.LANGUAGE_OPTIONS, folder / "language", steps, device)


def name_vectors(phrases: dict[str, int], vectors: Tensor) -> dict[str, Tensor]:
    """Every noun, in the singular and the plural, and every color -> the mean vector of the phrases with it."""
    nouns = standard().nouns

    def mean(selected: set[str]) -> Tensor:
        return vectors[[i for phrase, i in phrases.items() if phrase in selected]].mean(0)

    names: dict[str, Tensor] = {}
    for noun in nouns:
        coloured = {f"{colour} {noun}" for colour in COLOURS}
        names[noun] = names[nouns[noun].plural] = mean({noun} | coloured)
    for colour in COLOURS:
        if colour not in names:  # "orange" is a noun too
            names[colour] = mean({phrase for phrase in phrases if phrase.startswith(f"{colour} ")})
    return names


def train_stage1(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    init_weights(matcher, seed=2)
    _load(matcher.vision, folder / "vision", "vision.")
    _load_queries(matcher.qformer, folder)
    task = Stage1(matcher, words.dec, muon_scale=recipe.QFORMER_MUON_SCALE)
    _train(task, MatchBatches(folder, words), recipe.STAGE1_OPTIONS, folder / "stage1", steps, device)


def generator(folder: Path, words: Tokenizers) -> Blip2:
    """The generating model before stage 2: image encoder, queries and language model are trained."""
    model = Blip2(
        recipe.generator_config(recipe.language_config(len(words.language), words.newline), words.image)
    )
    _load(model, folder / "language")
    model.language.tie()
    return model


def train_stage2(folder: Path, steps: int | None, device: str, *, name: str = "stage2") -> None:
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    if name == "stage2":
        matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
        _load(matcher, folder / "stage1")
        qformer_from_matcher(matcher, model)
    _train(
        Stage2(model, muon_scale=recipe.QFORMER_MUON_SCALE),
        CaptionBatches(folder, words),
        recipe.STAGE2_OPTIONS,
        folder / name,
        steps,
        device,
    )


def train_stage2_raw(folder: Path, steps: int | None, device: str) -> None:
    train_stage2(folder, steps, device, name="stage2-raw")


def train_finetune(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    both = read_model(folder, words)
    _load(both, folder / "queries")
    _load(both.model, folder / "language")
    both.model.language.tie()
    # The language model is trained too: frozen, one as small as this cannot compensate for errors of the queries.
    task = QueryFinetune(
        both,
        language_muon_scale=recipe.FINETUNE_LANGUAGE_MUON_SCALE,
        vision_layer_decay=0.8,
        muon_scale=recipe.FINETUNE_MUON_SCALE,
    )
    data = InstructionBatches(folder, words)
    _train(task, data, recipe.FINETUNE_OPTIONS, folder / "finetune", steps, device)


def export(folder: Path, steps: int | None, device: str) -> None:
    """Write both models as they ship: fp16, in Hugging Face's layout, with their tokenizers."""
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    _load(model, folder / "finetune", "model.")
    model.language.tie()
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    _load(matcher, folder / "stage1")
    for name, part, tokenizer in (("default", model, "language"), ("default-matcher", matcher, "matcher")):
        save_model(part, folder / name, tokenizer=folder / f"tokenizer-{tokenizer}", dtype="fp16")


STAGES = {
    "vision": train_vision,
    "queries": train_queries,
    "language": train_language,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "stage2-raw": train_stage2_raw,
    "finetune": train_finetune,
    "export": export,
}

if __name__ == "__main__":
    main()
