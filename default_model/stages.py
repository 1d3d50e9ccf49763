"""Makes the default model: `python -m default_model.stages STAGE DIR`, one command a stage, each resumable.

    vision      image encoder, contrastively from scenes            -> DIR/vision
    see         image features of scenes, for the next but one      -> DIR/seen.safetensors
    queries     each query answers for a part of the image          -> DIR/queries
    language    OPT on pictures in words, and texts about them      -> DIR/language
    stage1      ITC + ITM + ITG, image encoder frozen               -> DIR/stage1
    stage2      captions through the frozen language model          -> DIR/stage2
    stage2-raw  the same without stage 1, for the comparison        -> DIR/stage2-raw
    spelling    the queries say pictures in these words             -> DIR/spelling
    seeing      the same with the image encoder trained too         -> DIR/seeing
    finetune    captions, questions and chat, all parts trained     -> DIR/finetune
    export      the two folders that ship with the package          -> DIR/default, DIR/default-matcher

DIR holds what `python -m default_model.materials DIR` and `python -m default_model.vocab DIR` have put there.
A stage that was killed goes on from its last checkpoint when the command is repeated.
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
from torch.utils.data import DataLoader
from tqdm import tqdm

from blip2.checkpoint.save import save_model
from blip2.config import QFormerConfig
from blip2.layers import processor_has_bf16
from blip2.model import Blip2, Blip2Matcher
from blip2.opt import Opt
from blip2.qformer import QFormer
from blip2.train import FitOptions, Task, fit
from blip2.train.loop import Dataset
from blip2.train.pretrain import (
    ContrastivePretrain,
    ImageTextEncoders,
    LanguagePretrain,
    WordBag,
    initialise,
    matching,
    mimetic,
    qformer_from_matcher,
)
from blip2.train.queries import QueryPretrain, QueryReaders, Spelling, SpellingModel, stand
from blip2.train.tasks import Finetune, Stage1, Stage2
from blip2.vision import ImageEncoder
from default_model import recipe
from default_model.batches import (
    EASY_SHARE,
    CaptionBatches,
    InstructionBatches,
    MatchBatches,
    SceneBatches,
    SeenBatches,
    TextBatches,
    Tokenizers,
    VisionBatches,
)
from default_model.spelling import Speller

WEIGHTS = "weights.safetensors"
SEEN = "seen.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    STAGES[arguments.stage](arguments.folder, arguments.steps, arguments.device)


def _train(
    task: Task, data: Dataset, options: FitOptions, folder: Path, steps: int | None, device: str
) -> None:
    # A CPU without bfloat16 of its own takes ten times as long in it, one that has it half as long.
    precision: Literal["fp32", "bf16"] = "fp32" if device == "cpu" and not processor_has_bf16() else "bf16"
    options = replace(options, steps=steps or options.steps, device=device, precision=precision)
    result = fit(task, data, options, folder)
    if not result.finished:
        raise SystemExit(f"stopped at step {result.step}; repeat the command to go on")
    save_file(
        {name: p.detach().cpu().clone() for name, p in task.module.state_dict().items()}, folder / WEIGHTS
    )


def _load(module: nn.Module, folder: Path, prefix: str = "") -> None:
    """Take a finished stage's weights, or the part of them under a prefix."""
    tensors = load_file(folder / WEIGHTS)
    module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def _load_queries(qformer: QFormer, folder: Path) -> None:
    """Take the query branch that the stage `queries` has trained; a text branch stays as it is."""
    tensors = {n.removeprefix("qformer."): t for n, t in load_file(folder / "queries" / WEIGHTS).items()}
    qformer.load_state_dict({n: tensors.get(n, t) for n, t in qformer.state_dict().items()})


def train_vision(folder: Path, steps: int | None, device: str) -> None:
    data = VisionBatches(folder, recipe.VISION_CROWDED, recipe.VISION_HALVED)
    encoders = ImageTextEncoders(ImageEncoder(recipe.VISION), WordBag(data.vocabulary, embedding=192))
    initialise(encoders, seed=0)
    mimetic(encoders.vision, seed=0)
    _train(
        ContrastivePretrain(encoders, muon_scale=recipe.MUON_SCALE),
        data,
        recipe.VISION_OPTIONS,
        folder / "vision",
        steps,
        device,
    )


def see(folder: Path, steps: int | None, device: str) -> None:
    """Image features of scenes, encoded once for the two stages that only train the queries."""
    data, encoder = SceneBatches(folder, Tokenizers.load(folder)), ImageEncoder(recipe.VISION).to(device)
    _load(encoder, folder / "vision", "vision.")
    seen: list[dict[str, Tensor]] = []
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        data,  # type: ignore[arg-type]  # what torch asks for is a class of its own
        sampler=range(steps or recipe.SEEN),
        batch_size=None,
        num_workers=1,
    )
    with torch.inference_mode():
        for batch in tqdm(loader, desc="features", mininterval=5):
            features = encoder(batch.pop("pixels").to(device)).cpu()
            seen.append({k: v.half() if v.is_floating_point() else v.short() for k, v in batch.items()})
            seen[-1]["features"] = features.half()
    save_file({key: torch.cat([batch[key] for batch in seen]) for key in seen[0]}, folder / SEEN)


def train_queries(folder: Path, steps: int | None, device: str) -> None:
    samples = VisionBatches(folder, 0, 0)
    encoders = ImageTextEncoders(ImageEncoder(recipe.VISION), WordBag(samples.vocabulary, embedding=192))
    _load(encoders, folder / "vision")
    config = replace(recipe.qformer_config(QFormerConfig().vocab_size), use_qformer_text_input=False)
    qformer = QFormer(config, recipe.QUERIES)
    initialise(qformer, seed=4)
    # batches the encoder was not trained on
    batches = [samples[recipe.VISION_OPTIONS.steps + i] for i in range(12)]
    with torch.inference_mode():
        features = torch.cat([encoders.vision(batch["pixels"])[:, 1:].flatten(0, 1) for batch in batches])
    middles = torch.cat([batch["places"].flatten(0, 1) for batch in batches])
    shown = torch.cat([batch["regions"].flatten() >= 0 for batch in batches])
    stand(qformer, features, middles, shown, seed=4)
    phrases = {"phrase_ids": samples.phrase_ids, "phrase_mask": samples.phrase_mask}
    data = SeenBatches(folder / SEEN, ("parts", "places"), phrases, "queries")
    task = QueryPretrain(QueryReaders(encoders, qformer), muon_scale=recipe.QFORMER_MUON_SCALE)
    _train(task, data, recipe.QUERIES_OPTIONS, folder / "queries", steps, device)


def train_language(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    language = Opt(recipe.language_config(len(words.language), words.newline))
    initialise(language, seed=1)
    matching(language, seed=1)
    task = LanguagePretrain(language, muon_scale=recipe.MUON_SCALE)
    _train(task, TextBatches(folder, words), recipe.LANGUAGE_OPTIONS, folder / "language", steps, device)


def train_stage1(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    initialise(matcher, seed=2)
    _load(matcher.vision, folder / "vision", "vision.")
    _load_queries(matcher.qformer, folder)
    task = Stage1(matcher, words.dec, muon_scale=recipe.QFORMER_MUON_SCALE)
    _train(task, MatchBatches(folder, words), recipe.STAGE1_OPTIONS, folder / "stage1", steps, device)


def generator(folder: Path, words: Tokenizers) -> Blip2:
    """The generating model before stage 2: image encoder and language model trained, the Q-Former's queries placed."""
    language = recipe.language_config(len(words.language), words.newline)
    model = Blip2(recipe.generator_config(language, words.image))
    initialise(model, seed=3)
    _load(model.vision, folder / "vision", "vision.")
    _load_queries(model.qformer, folder)
    _load(model.language, folder / "language")
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


def train_spelling(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    _load(model, folder / "stage2")
    model.language.tie()
    speller = SpellingModel(model)
    data = SeenBatches(folder / SEEN, ("spelled",), {"bags": Speller(words.language).bags}, "spelling")
    task = Spelling(speller, muon_scale=recipe.SPELLING_MUON_SCALE)
    _train(task, data, recipe.SPELLING_OPTIONS, folder / "spelling", steps, device)


def train_seeing(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    speller = SpellingModel(model)
    _load(speller, folder / "spelling")
    model.language.tie()
    data = SceneBatches(folder, words, {"bags": Speller(words.language).bags}, "seeing", 64, EASY_SHARE)
    task = Spelling(speller, train_vision=True, muon_scale=recipe.FINETUNE_MUON_SCALE)
    _train(task, data, recipe.SEEING_OPTIONS, folder / "seeing", steps, device)


def train_finetune(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    _load(model, folder / "seeing", "model.")
    model.language.tie()
    # The language model learns too: one as small as this, frozen, does not make up for what the queries leave open.
    task = Finetune(model, vision_layer_decay=0.8, train_language=True, muon_scale=recipe.FINETUNE_MUON_SCALE)
    _train(
        task, InstructionBatches(folder, words), recipe.FINETUNE_OPTIONS, folder / "finetune", steps, device
    )


def export(folder: Path, steps: int | None, device: str) -> None:
    """Write both models as they ship: fp16, in Hugging Face's layout, with their tokenizers."""
    words = Tokenizers.load(folder)
    model = generator(folder, words)
    _load(model, folder / "finetune")
    model.language.tie()
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    _load(matcher, folder / "stage1")
    for name, part, tokenizer in (("default", model, "language"), ("default-matcher", matcher, "matcher")):
        save_model(part, folder / name, tokenizer=folder / f"tokenizer-{tokenizer}", dtype="fp16")


STAGES = {
    "vision": train_vision,
    "see": see,
    "queries": train_queries,
    "language": train_language,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "stage2-raw": train_stage2_raw,
    "spelling": train_spelling,
    "seeing": train_seeing,
    "finetune": train_finetune,
    "export": export,
}

if __name__ == "__main__":
    main()
