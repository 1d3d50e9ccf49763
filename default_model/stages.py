"""Makes the default model: `python -m default_model.stages STAGE DIR`, one command a stage, each resumable.

    names       what the stem keeps of its maps, and the names it gives      -> DIR/stem.safetensors, DIR/evidence.json
    features    training's pictures as the stem sees them                    -> DIR/features
    language    OPT that reads what queries are to say; no images            -> DIR/language
    queries     image encoder and queries that say it                        -> DIR/queries
    finetune    captions, questions and chat, all parts trained              -> DIR/finetune
    stage1      ITC + ITM + ITG, the matcher                                 -> DIR/stage1
    stage2      captions through the frozen language model, from stage 1     -> DIR/stage2
    stage2-raw  the same without stage 1, for the comparison                 -> DIR/stage2-raw
    export      the two folders that ship with the package                   -> DIR/default, DIR/default-matcher

DIR holds the output of `python -m default_model.materials DIR` and `python -m default_model.vocab DIR`.
A killed stage resumes from its last checkpoint when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
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
from blip2.stemfiles import STEM_FILE
from blip2.storage import replace_file, write_file
from blip2.train import FitOptions, Task, fit
from blip2.train.loop import Dataset
from blip2.train.tasks import Stage1, Stage2
from default_model import recipe
from default_model.batches import InstructionBatches, LanguageBatches, MatchBatches, QueryBatches, Tokenizers
from default_model.colours import COLOURS
from default_model.evidence import EVIDENCE_FILE
from default_model.features import Painter, make_features, photograph_heads, specimen_features
from default_model.initial_weights import (
    init_matching_heads,
    init_mimetic,
    init_query_attention,
    init_weights,
    init_word_embeddings,
    qformer_from_matcher,
)
from default_model.language import standard
from default_model.namer import (
    alike,
    evidence_matrix,
    fit_coarse,
    fit_fine,
    fit_prototypes,
    name_codes,
    patterns,
    standard_names,
)
from default_model.queries import (
    CellReaders,
    QueryFinetune,
    QueryModel,
    QueryPretrain,
    SlotLanguage,
    SlotLosses,
)
from default_model.slots import NAME_GAIN, SlotPrefix, bag
from default_model.stem import (
    blank_readout,
    build_stem,
    fetch,
    fold_batch_norms,
    published_weights,
    share_stem,
    stem_tensors,
    write_stem,
)
from default_model.vocab import name_bags

WEIGHTS = "weights.safetensors"
FINE_CHANNELS = 120  # of the stem's map of stride 16


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
    weights = {name: p.detach().cpu().clone() for name, p in task.module.state_dict().items()}
    with replace_file(folder / WEIGHTS) as beside:
        save_file(weights, beside)


def _load(module: nn.Module, folder: Path, prefix: str = "") -> None:
    """Load a finished stage's weights, or those whose names begin with a prefix."""
    tensors = load_file(folder / WEIGHTS)
    module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def make_names(folder: Path, steps: int | None, device: str) -> None:
    """What the stem keeps of its maps, and the names it gives, from specimens of every cut-out; a few minutes."""
    if (folder / EVIDENCE_FILE).exists():
        return
    published = published_weights(fetch(folder))
    trunk, weight, bias = fold_batch_norms(published), published["_fc.weight"], published["_fc.bias"]
    blank = build_stem(stem_tensors(trunk, blank_readout(weight.shape[1], FINE_CHANNELS)))
    painter, names = Painter(folder), standard_names()
    pictures, nouns, positions = specimen_features(
        painter, blank, recipe.SPECIMENS * len(painter.everything.cutouts.rows)
    )
    labels = torch.tensor([names.learned.index(noun) for noun in nouns])
    photographs = photograph_heads(painter, blank, recipe.PHOTOGRAPH_PARTS)
    prototypes = fit_prototypes(pictures, labels, photographs, weight, bias)
    coarse, details = fit_coarse(pictures, labels, weight), fit_fine(positions)
    tensors = stem_tensors(
        trunk,
        {
            "classifier.weight": weight,
            "classifier.bias": bias,
            "prototypes.weight": prototypes[0],
            "prototypes.bias": prototypes[1],
            "coarse.weight": coarse[0],
            "coarse.bias": coarse[1],
            "fine.weight": details[0],
            "fine.bias": details[1],
            "evidence.weight": evidence_matrix(names, name_codes(standard().noun_categories)),
        },
    )
    write_stem(folder, tensors, fetch(folder))
    stem = build_stem(load_file(folder / STEM_FILE))
    content = {
        "alike": alike(names, pictures, labels, weight, bias),
        "patterns": patterns(stem.readout.probabilities(photographs), names.classes),
    }
    with replace_file(folder / EVIDENCE_FILE) as beside:
        write_file(beside, json.dumps(content))


def make_all_features(folder: Path, steps: int | None, device: str) -> None:
    """The pictures of every kind, by two processes."""
    context = torch.multiprocessing.get_context("spawn")
    halves = [context.Process(target=_make_features, args=(folder, i, 2)) for i in range(2)]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process ended with {process.exitcode}; repeat the command to go on")


def _make_features(folder: Path, part: int, parts: int) -> None:
    torch.set_num_threads(1)
    stem = build_stem(load_file(folder / STEM_FILE)).pack()
    for kind, count in recipe.PICTURES.items():
        make_features(folder, stem, kind, count, (part, parts))


def generator(words: Tokenizers) -> Blip2:
    """The generating model with initial weights."""
    language = recipe.language_config(len(words.language), words.newline)
    model = Blip2(recipe.generator_config(language, words.image))
    init_weights(model, seed=3)
    init_mimetic(model.vision, seed=0)
    assert isinstance(model.language, Opt)
    init_matching_heads(model.language, seed=1)
    return model


def train_language(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    model = generator(words)
    assert isinstance(model.language, Opt)
    codes = name_codes(standard().noun_categories | dict.fromkeys(COLOURS, "color"))
    singular = {entry.plural: noun for noun, entry in standard().nouns.items()}
    vectors: list[Tensor] = []
    bags: list[list[int]] = []
    for name, forms in name_bags(standard(), lambda text: words.language.encode(text, frame=False)).items():
        bags += forms
        vectors += [codes[name if name in codes else singular[name]]] * len(forms)
    init_word_embeddings(model.language, torch.stack(vectors), bags, seed=7)
    model.language.tie()
    slots = SlotPrefix(model.language.config.hidden_size)
    init_weights(slots, seed=5, std=0.03)  # a place then is about as long as a word
    task = SlotLanguage(model, slots, muon_scale=recipe.MUON_SCALE)
    _train(task, LanguageBatches(folder, words), recipe.LANGUAGE_OPTIONS, folder / "language", steps, device)


def query_model(folder: Path, words: Tokenizers) -> QueryModel:
    """The generating model with the trained language model, and what its queries are to say."""
    model = generator(words)
    slots = SlotPrefix(model.config.language.width)
    _load(nn.ModuleDict({"model": model, "slots": slots}), folder / "language")
    model.language.tie()
    bags = [bag(words.language, noun) for noun in standard().all]
    ids = torch.zeros(len(bags), max(map(len, bags)), dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for row, weight, tokens in zip(ids, weights, bags, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
        weight[: len(tokens)] = NAME_GAIN
    readers = CellReaders(recipe.VISION.hidden_size, model.config.language.width)
    init_weights(readers, seed=4)
    return QueryModel(model, readers, SlotLosses(slots, ids, weights))


def train_queries(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    both = query_model(folder, words)
    data = QueryBatches(folder, words, recipe.QUERY_SHARES)
    batch = data[-1]
    with torch.inference_mode():
        features = both.model.vision(batch["pixels"])[:, 1:].flatten(0, 1)
    grid = (torch.arange(recipe.VISION.grid) + 0.5) / recipe.VISION.grid
    middles = torch.cartesian_prod(grid, grid).flip(1).repeat(len(batch["pixels"]), 1)
    shown = batch["cell_nouns"].flatten() >= 0
    init_query_attention(both.model.qformer, features, middles, shown, seed=4)
    task = QueryPretrain(both, muon_scale=recipe.QFORMER_MUON_SCALE)
    _train(task, data, recipe.QUERIES_OPTIONS, folder / "queries", steps, device)


def train_finetune(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    both = query_model(folder, words)
    _load(both, folder / "queries")
    both.model.language.tie()
    # The language model is trained too: frozen, one as small as this cannot compensate for errors of the queries.
    task = QueryFinetune(
        both,
        language_muon_scale=recipe.FINETUNE_LANGUAGE_MUON_SCALE,
        vision_layer_decay=0.8,
        muon_scale=recipe.FINETUNE_MUON_SCALE,
    )
    data = InstructionBatches(folder, words, recipe.TEXT_SHARES)
    _train(task, data, recipe.FINETUNE_OPTIONS, folder / "finetune", steps, device)


def train_stage1(folder: Path, steps: int | None, device: str) -> None:
    words = Tokenizers.load(folder)
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    init_weights(matcher, seed=2)
    _load(matcher.vision, folder / "finetune", "model.vision.")
    trained = load_file(folder / "queries" / WEIGHTS)
    ours = {n.removeprefix("model.qformer."): t for n, t in trained.items()}
    state = matcher.qformer.state_dict()
    matcher.qformer.load_state_dict({n: ours.get(n, t) for n, t in state.items()})
    task = Stage1(matcher, words.dec, muon_scale=recipe.QFORMER_MUON_SCALE)
    data = MatchBatches(folder, words, recipe.MATCH_SHARES)
    _train(task, data, recipe.STAGE1_OPTIONS, folder / "stage1", steps, device)


def train_stage2(folder: Path, steps: int | None, device: str, *, name: str = "stage2") -> None:
    words = Tokenizers.load(folder)
    both = query_model(folder, words)
    _load(both, folder / "queries")
    model = both.model
    model.language.tie()
    if name == "stage2":
        matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
        _load(matcher, folder / "stage1")
        qformer_from_matcher(matcher, model)
    task = Stage2(model, muon_scale=recipe.QFORMER_MUON_SCALE)
    data = InstructionBatches(folder, words, recipe.TEXT_SHARES, "caption")
    _train(task, data, recipe.STAGE2_OPTIONS, folder / name, steps, device)


def train_stage2_raw(folder: Path, steps: int | None, device: str) -> None:
    train_stage2(folder, steps, device, name="stage2-raw")


def export(folder: Path, steps: int | None, device: str) -> None:
    """Write both models as they ship: fp16, in Hugging Face's layout, with tokenizers and the stem, stored once."""
    words = Tokenizers.load(folder)
    model = generator(words)
    _load(model, folder / "finetune", "model.")
    model.language.tie()
    matcher = Blip2Matcher(recipe.matcher_config(len(words.matcher)))
    _load(matcher, folder / "stage1")
    processor = write_stem(folder, load_file(folder / STEM_FILE), fetch(folder))
    for name, part, tokenizer in (("default", model, "language"), ("default-matcher", matcher, "matcher")):
        save_model(
            part,
            folder / name,
            tokenizer=folder / f"tokenizer-{tokenizer}",
            image_processor=processor,
            dtype="fp16",
        )
    share_stem(folder / "default-matcher", "default")


STAGES = {
    "names": make_names,
    "features": make_all_features,
    "language": train_language,
    "queries": train_queries,
    "finetune": train_finetune,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "stage2-raw": train_stage2_raw,
    "export": export,
}

if __name__ == "__main__":
    main()
