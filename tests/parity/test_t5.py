"""Ours beside transformers with T5 for a language model: logits, loss, gradient, decoding, folders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("transformers")
import reference
from reference import (
    CLOSE,
    IMAGE_TOKEN,
    QUERIES,
    T5_TEXT,
    ours_from,
    prompts,
    reopened,
    rewrite,
    their_t5,
    without_image_token,
)
from safetensors.torch import load_file
from test_decoding import OPTIONS, as_ours, check_batch, common_ids, draw_theirs, run_ours, run_theirs
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor, T5TokenizerFast
from transformers import T5Config as TheirT5Config
from transformers.models.t5.modeling_t5 import T5Attention

from blip2.checkpoint import CheckpointError, load_model, load_processors, open_tensors, save_model
from blip2.generation.decoding import generate, stream
from blip2.generation.logits import sampling_distribution
from blip2.generation.options import GenerationOptions
from blip2.images import ImageProcessor, to_pixels
from blip2.modeling.blip2 import Blip2
from blip2.modeling.config import T5Config, read_config
from blip2.modeling.t5 import position_buckets
from blip2.text import Tokenizer

SEEDS = (3, 5)
SHARED, HEAD = "language_model.shared.weight", "language_model.lm_head.weight"
# The kinds of T5 there are: FlanT5 as BLIP-2 has it, as published, and the first T5; and each part of it alone.
KINDS: dict[str, dict[str, Any]] = {
    "blip2": {},
    "flan": {"dense_act_fn": "gelu_new"},
    "first": {
        "head": False,
        "feed_forward_proj": "relu",
        "dense_act_fn": "relu",
        "tie_word_embeddings": True,
    },
    "tied, not scaled": {"head": False},
    "scaled, not tied": {"tie_word_embeddings": True},
    "more layers to write": {"num_decoder_layers": 3},
    "silu": {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"},
    "wide buckets": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
}


@cache
def models(seed: int, kind: str = "blip2") -> tuple[Blip2ForConditionalGeneration, Blip2]:
    with torch.inference_mode(False):  # they are kept for tests that want gradients
        theirs = their_t5(seed, **KINDS[kind])
        ours = ours_from(theirs)
    assert isinstance(ours.config.language, T5Config)
    return theirs, ours


def written(rows: int, length: int = 6) -> Tensor:
    """What a decoder has written: the start token, then words."""
    ids = torch.randint(8, 90, (rows, length), generator=torch.Generator().manual_seed(9))
    ids[:, 0] = 0
    return ids


# --- the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 12), (16, 200), (4, 5)])
def test_position_buckets(both_ways: bool, count: int, longest: int) -> None:
    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distance, both_ways, count, longest)
    ours = position_buckets(distance, count, longest, bidirectional=both_ways)
    assert torch.equal(ours, theirs)
    assert ours.unique().numel() == (count - 1 if both_ways else count)  # no distance of 0 after the query


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_with_padding(kind: str) -> None:
    theirs, ours = models(0, kind)
    batch, new = prompts((2, 17, 3)), written(3)
    expected = theirs(**batch.theirs(), decoder_input_ids=new).logits
    got = ours(batch.pixels, batch.ids, batch.mask, new)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert got.std() > 0.1


@torch.inference_mode()
def test_padding_changes_nothing() -> None:
    """On either side of the prompt, and between what is kept."""
    _, ours = models(0)
    batch, new = prompts((2, 9, 5)), written(3)
    together = ours(batch.pixels, batch.ids, batch.mask, new)
    for row in range(3):
        one = batch.row(row)
        alone = ours(one.pixels, one.ids, None, new[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], **CLOSE)
        for places in ((0, 0), (0, 4), (one.ids.shape[1], 3), (1, 2)):
            at, many = places
            ids = torch.cat([one.ids[:, :at], torch.full((1, many), 5), one.ids[:, at:]], dim=1)
            mask = torch.cat([one.mask[:, :at], torch.zeros(1, many).long(), one.mask[:, at:]], dim=1)
            torch.testing.assert_close(ours(one.pixels, ids, mask, new[row : row + 1]), alone, **CLOSE)


@pytest.mark.parametrize("kind", ["blip2", "first"])
def test_loss_and_gradient(kind: str) -> None:
    theirs, ours = models(1, kind)
    batch = prompts((2, 5, 3))
    labels = torch.randint(8, 90, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, 4:] = labels[2, 6:] = -100
    labels[1, 2] = -100  # in the middle too
    expected = theirs(**batch.theirs(), labels=labels).loss
    loss = ours.loss(batch.pixels, batch.ids, batch.mask, labels)
    torch.testing.assert_close(loss, expected, **CLOSE)
    named = {
        "query_tokens": ours.qformer.query_tokens,
        "language_model.shared.weight": ours.language.shared.weight,
        "language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            ours.language.encoder.relative_attention_bias.weight
        ),
        "language_model.decoder.block.1.layer.1.EncDecAttention.k.weight": (
            ours.language.decoder.layers[1].layer[1].EncDecAttention.k.weight
        ),
    }
    ours_grads = torch.autograd.grad(loss, list(named.values()))
    theirs_grads = torch.autograd.grad(expected, [theirs.get_parameter(name) for name in named])
    for got, wanted in zip(ours_grads, theirs_grads, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_decoder_ids_are_asked_for() -> None:
    _, ours = models(0)
    batch = prompts((2,))
    with pytest.raises(ValueError, match="decoder_input_ids"):
        ours(batch.pixels, batch.ids, batch.mask)


@torch.inference_mode()
def test_one_reading_serves_every_row() -> None:
    """Stepping from one reading, with rows reordered and prompts dropped, equals decoding it all again."""
    _, ours = models(0)
    batch = prompts((2, 5, 3))
    prefix = ours.embed_image(batch.pixels)
    decoding = ours.prefill(prefix, batch.ids, batch.mask, rows=2, max_new_tokens=4)
    start = torch.zeros(3, 1, dtype=torch.int64)
    first = ours(batch.pixels, batch.ids, batch.mask, start)[:, -1]
    torch.testing.assert_close(decoding.logits, first, **CLOSE)
    decoding.decode_step(torch.tensor([10, 11, 12, 13, 14, 15]))
    decoding.reorder_cache(torch.tensor([1, 0, 3, 3, 4, 5]))
    decoding.decode_step(torch.tensor([20, 21, 22, 23, 24, 25]))
    decoding.batch_select_indices(torch.tensor([0, 2]))
    logits = decoding.decode_step(torch.tensor([30, 31, 32, 33]))
    rows = torch.tensor([0, 0, 2, 2])
    new = torch.tensor([[0, 11, 20, 30], [0, 10, 21, 31], [0, 14, 24, 32], [0, 15, 25, 33]])
    again = ours(batch.pixels[rows], batch.ids[rows], batch.mask[rows], new)
    torch.testing.assert_close(logits, again[:, -1], **CLOSE)
    assert ours.prefill_prefix(prefix) is None
    keys, _ = decoding._prompt_cache.layers[0]
    assert len(keys) == 2  # one copy a prompt, whatever the rows


# --- decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_same_ids_and_scores(options: dict[str, Any]) -> None:
    """One end token and several; theirs in a padded batch, T5 having no rule that sees the prompt."""
    for count, seed in enumerate(SEEDS, 1):
        theirs, ours = models(seed)
        batch = prompts((2, 5, 3), seed)
        ends = common_ids(ours, batch)[:count]
        got = run_ours(ours, batch, as_ours(options, ends))
        ids, scores = run_theirs(theirs, batch, ends, options, start=0)
        assert got.ids == ids
        if scores is not None:
            assert got.scores == pytest.approx(scores, rel=1e-5, abs=1e-5)


def test_the_rules_see_the_start_token() -> None:
    """As in transformers, whose rules see what the decoder has read: its first id, and no prompt."""
    start = 0
    free = their_t5(SEEDS[0])
    free.language_model.lm_head.weight.data[start] *= 40  # now it likes to write the start token
    ours = ours_from(free)
    batch = prompts((2, 5, 3))
    cases = [{}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}]
    for options in cases:
        got = run_ours(ours, batch, as_ours(options, (7,))).ids
        assert got == run_theirs(free, batch, (7,), options, start)[0]
        if options.get("no_repeat_ngram_size") == 1:
            assert all(start not in row for row in got)
        if not options:
            assert any(start in row for row in got)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}, {"num_beams": 3}], ids=str)
def test_a_batch_changes_nothing(options: dict[str, Any]) -> None:
    _, ours = models(SEEDS[1])
    batch, chosen, together = check_batch(ours, options)
    if not options:
        with torch.no_grad():
            prefix = ours.embed_image(batch.pixels)
        steps = list(stream(ours, prefix, batch.ids, batch.mask, chosen))
        assert [[i for i in row if i is not None] for row in zip(*steps)] == together.ids
        assert generate(ours, prefix, *batch.padded_right(), chosen).ids == together.ids


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "num_beams"])
def test_log_probabilities_are_the_models(options: dict[str, Any]) -> None:
    _, ours = models(SEEDS[1])
    batch = prompts()
    rules = {"repetition_penalty": 1.5, "min_new_tokens": 5, "no_repeat_ngram_size": 2}
    got = run_ours(ours, batch, as_ours(options | rules, common_ids(ours, batch)))
    for i, (ids, logprobs) in enumerate(zip(got.ids, got.token_logprobs)):
        one = batch.row(i)
        with torch.no_grad():
            logits = ours(one.pixels, one.ids, None, torch.tensor([[0, *ids[:-1]]]))[0]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.8, "top_k": 20, "top_p": 0.6},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "top_p": 0.9},
    ],
    ids=str,
)
def test_same_sampling_distribution(options: dict[str, Any]) -> None:
    theirs, ours = models(SEEDS[0])
    batch, end = prompts((3, 5)), 7
    out = draw_theirs(theirs, batch, end, 0, options)
    new = out.sequences[:, 1:]
    assert new.shape[1] > 3
    mine = GenerationOptions(do_sample=True, **options)
    for step, scores in enumerate(out.scores):
        history = out.sequences[:, : step + 1]
        with torch.no_grad():
            logits = ours(batch.pixels, batch.ids, batch.mask, history)[:, -1]
        got = sampling_distribution(logits, history, mine, new_tokens=step, end_ids=torch.tensor([end]))
        running = ~(new[:, :step] == end).any(1)
        torch.testing.assert_close(got[running], scores.softmax(-1)[running], rtol=0.0, atol=1e-6)


# --- folders ---------------------------------------------------------------------------------------------------


def their_logits(theirs: Blip2ForConditionalGeneration) -> Tensor:
    return reference.their_logits(theirs, decoder_input_ids=written(2))


def our_logits(ours: Any) -> Tensor:
    return reference.our_logits(ours, written(2))


@pytest.mark.parametrize("kind", KINDS)
def test_their_folder_and_back(kind: str, tmp_path: Path) -> None:
    theirs, _ = models(0, kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    ours = load_model(tmp_path / "theirs")
    assert isinstance(ours, Blip2)
    assert (
        ours.language.tied == ours.config.language.tie_word_embeddings == (not KINDS[kind].get("head", True))
    )
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), **CLOSE)
    save_model(ours, tmp_path / "ours")
    back = reopened(tmp_path / "ours")
    torch.testing.assert_close(their_logits(back), our_logits(ours), **CLOSE)
    assert back.language_model.generation_config.decoder_start_token_id == 0
    assert back.generation_config.eos_token_id == 7
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(our_logits(again), our_logits(ours))


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_embeddings_once_and_thrice_and_heads(announced: bool, head: str, tmp_path: Path) -> None:
    theirs = their_t5(0, head=False, tie_word_embeddings=announced)
    theirs.save_pretrained(tmp_path)
    words = theirs.get_input_embeddings().weight.detach().clone()
    other = torch.randn(words.shape, generator=torch.Generator().manual_seed(1))
    if head != "absent":
        rewrite(tmp_path, **{HEAD: words if head == "equal" else other})
    expected = their_logits(reopened(tmp_path))
    copies = {f"language_model.{part}.embed_tokens.weight": words for part in ("encoder", "decoder")}
    for changes in ({}, copies, {SHARED: None}):
        rewrite(tmp_path, **changes)
        ours = load_model(tmp_path)
        assert ours.language.tied == (head != "different")
        torch.testing.assert_close(our_logits(ours), expected, **CLOSE)
    rewrite(tmp_path, **{"language_model.decoder.embed_tokens.weight": other})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*differ"):
        load_model(tmp_path)


def test_missing_and_spare_tensors(tmp_path: Path) -> None:
    name = "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    theirs, _ = models(0)
    theirs.save_pretrained(tmp_path)
    bias = "language_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    kept = load_file(tmp_path / "model.safetensors")[bias]
    rewrite(tmp_path, **{bias: None})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor .*encoder\.relative_attention_bias"):
        load_model(tmp_path)
    rewrite(tmp_path, **{bias: kept, name: kept})
    with pytest.raises(CheckpointError, match=r"EncDecAttention\.relative_attention_bias"):
        load_model(tmp_path)


@pytest.mark.parametrize("stored", ["tied", "scaled", "both", "neither"])
def test_configs_written_out_and_abridged(stored: str) -> None:
    """What newer files write out and older ones leave to be guessed reads as transformers reads it."""
    text = {k: v for k, v in T5_TEXT.items() if k not in ("tie_word_embeddings", "num_decoder_layers")}
    if stored in ("tied", "both"):
        text["tie_word_embeddings"] = False
    if stored in ("scaled", "both"):
        text["scale_decoder_outputs"] = False
    theirs = their_t5(0, **{"tie_word_embeddings": True, "num_decoder_layers": None} | text).config.to_dict()
    full, short = read_config(theirs), read_config(theirs | {"text_config": text})
    assert (
        full.language.scale_decoder_outputs == short.language.scale_decoder_outputs == (stored == "neither")
    )
    assert full.language.num_decoder_layers == short.language.num_decoder_layers == 2
    assert full.language.dense_act_fn == short.language.dense_act_fn == "gelu"
    assert full.image_token_id == IMAGE_TOKEN
    bare = read_config({"model_type": "blip-2", "text_config": {"model_type": "t5"}}).language
    published = TheirT5Config()
    for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "dense_act_fn"):
        assert getattr(bare, name) == getattr(published, name), name
    assert (bare.is_gated_act, bare.scale_decoder_outputs) == (False, True)
    gated = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    assert read_config({"model_type": "blip-2", "text_config": gated}).language.dense_act_fn == "gelu_new"


def test_configs_of_older_and_newer_files(tmp_path: Path) -> None:
    """No image token and the bare vocabulary, then the image token and a padded one: the same logits for its words."""
    theirs = their_t5()
    theirs.save_pretrained(tmp_path / "old")
    raw = without_image_token(tmp_path / "old")
    raw["text_config"]["tie_word_embeddings"] = False
    del raw["text_config"]["scale_decoder_outputs"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    old = load_model(tmp_path / "old")
    assert old.config.image_token_id is None
    rows = {name: torch.cat([tensor, torch.randn(28, 32)]) for name, tensor in
            load_file(tmp_path / "old" / "model.safetensors").items() if name in (HEAD, SHARED)}  # fmt: skip
    rewrite(tmp_path / "old", **rows)  # the config is not updated
    new = load_model(tmp_path / "old")
    assert new.config.language.vocab_size == 128
    torch.testing.assert_close(our_logits(new)[..., :100], our_logits(old), **CLOSE)


@torch.inference_mode()
def test_half_precision(tmp_path: Path) -> None:
    """In fp16 the matrices that would overflow stay in fp32, and what would overflow does not."""
    theirs = their_t5(0)
    for name, parameter in theirs.named_parameters():
        if name.endswith("DenseReluDense.wo.weight"):
            parameter.data *= 1e5
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype="fp16")
    for name, parameter in ours.named_parameters():
        assert (parameter.dtype == torch.float32) == name.endswith("DenseReluDense.wo.weight"), name
    half = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float16).eval()
    batch = prompts((4, 4))
    given = batch.theirs() | {"pixel_values": batch.pixels.half()}
    expected = half(**given, decoder_input_ids=written(2)).logits.float()
    got = our_logits(ours).float()
    assert got.isfinite().all()
    assert (got - expected).abs().max() < 0.1 * expected.std()
    hidden = ours.language.encoder.layers[1].layer[1].DenseReluDense(torch.ones(1, 1, 32).half())
    assert hidden.abs().max() > torch.finfo(torch.float16).max  # it would have been infinite

    for name, parameter in theirs.named_parameters():
        if name.endswith("DenseReluDense.wo.weight"):
            parameter.data /= 1e5
    theirs.half().save_pretrained(tmp_path / "half")
    stored = load_model(tmp_path / "half")  # as stored
    assert stored.language.shared.weight.dtype == torch.float16
    assert stored.language.encoder.layers[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    save_model(stored, tmp_path / "ours", dtype="fp16")
    with open_tensors(tmp_path / "ours") as tensors:
        assert {tensors.info(name).dtype for name in tensors} == {torch.float16}
    bf16 = load_model(tmp_path / "half", dtype="bf16")
    assert {parameter.dtype for parameter in bf16.parameters()} == {torch.bfloat16}
    exact = our_logits(load_model(tmp_path / "half", dtype="fp32"))
    assert (our_logits(stored).float() - exact).abs().mean() < 0.01 * exact.std()
    assert (our_logits(bf16).float() - exact).abs().mean() < 0.1 * exact.std()


# --- text ------------------------------------------------------------------------------------------------------


def their_tokenizer() -> T5TokenizerFast:
    trained = tokenizers.SentencePieceUnigramTokenizer()
    trained.train_from_iterator(
        ["a photo of a cat and a dog", "Question: what is it? Short answer: a red cat"] * 9,
        vocab_size=60,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    vocabulary = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=3)


def test_our_folder_has_a_processor(tmp_path: Path) -> None:
    """From an image and a prompt to text, each side with its own processor, from one folder."""
    tokenizer = their_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    their_t5(vocab_size=len(tokenizer) + 20).save_pretrained(tmp_path / "theirs")
    without_image_token(tmp_path / "theirs")  # found from the tokenizer when saving
    save_model(
        load_model(tmp_path / "theirs"),
        tmp_path / "ours",
        tokenizer=tmp_path / "tokenizer",
        image_processor=ImageProcessor(32, mean=(0.4, 0.5, 0.6)),
    )
    theirs, ours = reopened(tmp_path / "ours"), load_model(tmp_path / "ours")
    processor = Blip2Processor.from_pretrained(tmp_path / "ours")
    image = Image.linear_gradient("L").convert("RGB")
    texts = ["a photo of", "Question: what is it? Short answer:"]
    inputs = processor(images=[image] * 2, text=texts, padding=True, return_tensors="pt")
    assert inputs["input_ids"][0, :QUERIES].tolist() == [len(tokenizer)] * QUERIES
    image_processor, words = load_processors(tmp_path / "ours")
    pixels = to_pixels([image] * 2, image_processor)
    ids, mask = words.encode_batch(texts)
    options = GenerationOptions(num_beams=3, max_new_tokens=6, num_return_sequences=2)
    with torch.inference_mode():
        got = generate(ours, ours.embed_image(pixels), ids, mask, options)
    expected = theirs.generate(**inputs, num_beams=3, max_new_tokens=6, num_return_sequences=2)
    texts = [words.decode(row) for row in got.ids]
    assert texts == processor.batch_decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text",
    ["a photo of", "", " two  spaces ", "a cat\nand a dog\n", "Zebra!", "Question: what? Short answer:"],
)
def test_tokenizer(text: str, tmp_path: Path) -> None:
    their_tokenizer().save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.encode(text)[-1] == ours.special_id("eos_token") == theirs.eos_token_id
    assert (ours.pad_id, ours.special_id("bos_token"), len(ours)) == (theirs.pad_token_id, None, len(theirs))
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    typed = ours.encode(f"{text}</s> <extra_id_0><pad>", frame=False)
    assert not {0, 1, theirs.convert_tokens_to_ids("<extra_id_0>")} & {*typed}  # text is only text
    parsed = Tokenizer.load(tmp_path, parse_special=True).encode(f"{text}</s> <extra_id_0><pad>")
    assert parsed == theirs(f"{text}</s> <extra_id_0><pad>").input_ids
