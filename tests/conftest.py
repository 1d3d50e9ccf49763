"""Tiny random models as saved folders, and a few pictures: what the tests of the package's upper half run on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from blip2.checkpoint import save_model
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import Blip2Config, MatcherConfig, OptConfig, QFormerConfig, T5Config, VisionConfig

PAD, END_OF_TEXT, NEWLINE = 1, 2, "Ċ"
WORDS = "a photo of the red cat and two dogs . Question: what is it? Answer: yes no"

torch.set_num_threads(1)


def make_visible(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter at random, none of them zero or one, so that the model says something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data = middle + 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def write_opt_tokenizer(folder: Path) -> int:
    """A byte-level BPE as OPT has one, every text beginning with </s>; returns the id of a newline."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return int(backend.token_to_id(NEWLINE))


def write_bert_tokenizer(folder: Path) -> int:
    """A WordPiece vocabulary as BERT has one; returns its size."""
    letters = "abcdefghijklmnopqrstuvwxyz?:."
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        "[DEC]",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return len(vocabulary)


def write_t5_tokenizer(folder: Path) -> int:
    """A unigram model as T5 has one, every text ending with </s>; returns how many ids there are."""
    words = sorted({f"▁{word}" for word in WORDS.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(word, -2.0) for word in words] + [(chr(i), -6.0) for i in range(33, 127)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return len(pieces)


VISION = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)


QFORMER = QFormerConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
    encoder_hidden_size=VISION.hidden_size,
    use_qformer_text_input=False,
)


def _opt(newline: int, *, tied: bool = True) -> OptConfig:
    return OptConfig(
        vocab_size=304,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=96,
        bos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
        eos_token_id=newline,
        tie_word_embeddings=tied,
    )


def _t5(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4
    )


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `Blip2` in Hugging Face's layout, fp16 as the default model is stored."""
    base = tmp_path_factory.mktemp("generator")
    newline = write_opt_tokenizer(base / "tokenizer")
    config = Blip2Config(VISION, QFORMER, _opt(newline), num_query_tokens=4)
    model = make_visible(Blip2(config), seed=1)
    model.projection.weight.data *= 4  # what is written must depend on the image
    return save_model(model, base / "model", tokenizer=base / "tokenizer", dtype="fp16")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with T5."""
    base = tmp_path_factory.mktemp("t5")
    vocabulary = write_t5_tokenizer(base / "tokenizer")
    config = Blip2Config(VISION, QFORMER, _t5(vocabulary), num_query_tokens=4)
    model = make_visible(Blip2(config), seed=4)
    model.projection.weight.data *= 4
    return save_model(model, base / "model", tokenizer=base / "tokenizer")


@pytest.fixture(scope="session")
def matcher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `Blip2Matcher` in Hugging Face's layout."""
    base = tmp_path_factory.mktemp("matcher")
    vocabulary = write_bert_tokenizer(base / "tokenizer")
    qformer = replace(QFORMER, vocab_size=vocabulary, use_qformer_text_input=True)
    config = MatcherConfig(VISION, qformer, num_query_tokens=4, image_text_hidden_size=16)
    model = make_visible(Blip2Matcher(config), seed=2)
    return save_model(model, base / "model", tokenizer=base / "tokenizer")


VARIANTS = ("opt", "opt-untied", "t5", "clip", "matcher", "matcher-itg")

# Widths by which the attention heads of EVA-CLIP (88) and of CLIP and BERT (64) are recognized.
_EVA = replace(VISION, hidden_size=88, num_attention_heads=1)
_CLIP = replace(_EVA, hidden_size=64, hidden_act="quick_gelu", layer_norm_eps=1e-5, pre_norm=True)
_BERT = replace(QFORMER, hidden_size=64, num_hidden_layers=3, num_attention_heads=1)


def _make(variant: str, newline: int, bert_words: int) -> Blip2 | Blip2Matcher:
    """The model of a variant, every parameter drawn at random."""
    model: Blip2 | Blip2Matcher
    vision = _CLIP if variant == "clip" else _EVA
    qformer = replace(_BERT, encoder_hidden_size=vision.hidden_size)
    if variant.startswith("matcher"):
        qformer = replace(qformer, vocab_size=bert_words, use_qformer_text_input=True)
        config = MatcherConfig(vision, qformer, num_query_tokens=4, image_text_hidden_size=16)
        model = Blip2Matcher(config, itg=variant == "matcher-itg")
    else:
        language = _t5(304) if variant == "t5" else _opt(newline, tied=variant != "opt-untied")
        model = Blip2(Blip2Config(vision, qformer, language, num_query_tokens=4))
    make_visible(model, seed=VARIANTS.index(variant))
    if variant == "opt":
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):  # as EVA-CLIP has it: nothing is added to keys
                parameter.data.chunk(3)[1].zero_()
    if variant == "t5":
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):  # T5 does not scale its scores: its queries are small instead
                parameter.data *= _t5(304).d_kv ** -0.5
    return model


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered of files of weights stays among the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant of the family, tiny and random: its name -> its folder in Hugging Face's layout."""
    base = tmp_path_factory.mktemp("variants")
    newline, bert_words = write_opt_tokenizer(base / "words"), write_bert_tokenizer(base / "bert")
    folders = {}
    for variant in VARIANTS:
        model = _make(variant, newline, bert_words)
        words = base / ("bert" if variant.startswith("matcher") else "words")
        folders[variant] = save_model(model, base / variant, tokenizer=words)
    return folders


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five pictures, every one different: PNG, JPEG and WebP, wide, tall and square."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i, (suffix, size) in enumerate(
        [("png", (40, 30)), ("jpg", (30, 50)), ("webp", (32, 32)), ("png", (9, 70)), ("png", (64, 64))]
    ):
        path = folder / f"{i}.{suffix}"
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths
