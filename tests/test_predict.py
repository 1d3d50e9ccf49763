"""The predictor, on tiny random models: every way in gives the same, lists keep their order, pieces add up."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2 import loading, predict, registry
from blip2.generation.decoding import generate
from blip2.generation.options import GenerationOptions
from blip2.images import load_image, to_pixels
from blip2.predict import Predictor
from blip2.results import GeneratedText, detokenize_stream
from blip2.text import chat_prompt

ROOT = Path(__file__).parent.parent
QUESTIONS = ["what is it?", "what colour is the cat?", "are there two dogs?", "is it red?", "why?"]


@pytest.fixture(scope="module")
def model(generator_folder: Path, matcher_folder: Path) -> Predictor:
    return blip2.load(generator_folder, device="cpu", matcher=matcher_folder)


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> Predictor:
    return blip2.load(t5_folder, device="cpu")


# --- captions and answers ------------------------------------------------------------------------------------------


def test_a_caption_is_what_the_parts_underneath_give(model: Predictor, pictures: list[Path]) -> None:
    ours = model.caption(pictures[0])

    prefix = model.model.embed_image(to_pixels([load_image(pictures[0])], model.generator.image_processor))
    ids, mask = model.generator.tokenizer.encode_batch(["a photo of"])
    options = GenerationOptions(num_beams=5, max_new_tokens=30)
    expected = generate(model.model, prefix, ids, mask, options)
    tokens = [i for i in expected.ids[0] if i != model.model.config.language.eos_token_id]

    assert isinstance(ours, blip2.Caption)
    assert ours == model.generator.tokenizer.decode(tokens).strip()
    assert (ours.score, list(ours.tokens)) == (expected.scores[0], expected.ids[0])
    assert list(ours.token_logprobs) == expected.token_logprobs[0]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 1}, {"do_sample": True, "seed": 3}], ids=["num_beams", "greedy", "sampled"]
)
def test_many_images_give_what_each_gives_alone(
    model: Predictor, pictures: list[Path], options: dict[str, Any]
) -> None:
    alone = [model.caption(picture, max_new_tokens=8, **options) for picture in pictures]

    assert len(set(alone)) > 1, "the test needs images that get different texts"
    for batch_size in (1, 2, 8):
        together = model.caption(pictures, max_new_tokens=8, batch_size=batch_size, **options)
        assert together == alone
        assert [text.score for text in together] == pytest.approx([text.score for text in alone], abs=1e-4)


def test_questions_of_any_length_share_a_batch(model: Predictor, pictures: list[Path]) -> None:
    alone = [model.ask(picture, question, max_new_tokens=8) for picture, question in zip(pictures, QUESTIONS)]

    assert model.ask(pictures, QUESTIONS, max_new_tokens=8) == alone
    assert all(isinstance(answer, blip2.Answer) for answer in alone)
    assert model.ask(pictures[0], QUESTIONS[0], max_new_tokens=8) == alone[0]
    assert model.ask(pictures, QUESTIONS[0], max_new_tokens=8)[0] == alone[0]


def test_as_many_questions_as_images(model: Predictor, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="2 questions for 5 images"):
        model.ask(pictures, QUESTIONS[:2])


def test_every_way_in_gives_the_same(model: Predictor, pictures: list[Path]) -> None:
    path = pictures[1]
    pixels = np.asarray(load_image(path))
    with Image.open(path) as opened, path.open("rb") as file:
        ways = [path, str(path), path.read_bytes(), file, opened, pixels, model.encode(path)]
        captions = {str(model.caption(way, max_new_tokens=6)) for way in ways}
    assert len(captions) == 1


def test_a_turned_photo_is_turned_once(model: Predictor, pictures: list[Path], tmp_path: Path) -> None:
    upright = load_image(pictures[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = tmp_path / "turned.png"

    captions = {
        model.caption(way, max_new_tokens=8)
        for way in (upright, turned, load_image(turned), turned.read_bytes())
    }
    assert len(captions) == 1
    stored = load_image(turned, exif=False)
    assert model.encode(stored).size == upright.size[::-1] == load_image(stored).size


def test_no_images_give_no_captions(model: Predictor) -> None:
    assert model.caption([]) == model.encode([]) == model.ask([], "what?") == []


def test_several_texts_for_each_image(model: Predictor, pictures: list[Path]) -> None:
    three = model.caption(pictures[:2], num_return_sequences=3, max_new_tokens=6)

    assert [len(texts) for texts in three] == [3, 3]
    assert three[0] == model.caption(pictures[0], num_return_sequences=3, max_new_tokens=6)
    assert three[0][0] == model.caption(pictures[0], max_new_tokens=6)
    assert model.caption(pictures[0], num_return_sequences=1, max_new_tokens=6) == three[0][:1]
    assert model.ask(pictures[:2], "what is it?", num_return_sequences=1, max_new_tokens=6) == [
        [model.ask(picture, "what is it?", max_new_tokens=6)] for picture in pictures[:2]
    ]
    assert [text.score for text in three[1]] == sorted((text.score for text in three[1]), reverse=True)


def test_the_prompt_leads_and_is_not_part_of_the_caption(model: Predictor, pictures: list[Path]) -> None:
    with_default, other = model.caption(pictures[0]), model.caption(pictures[0], prompt="the red cat")

    assert with_default == model.caption(pictures[0], prompt="a photo of")
    assert with_default != other
    assert not other.startswith("the red cat")
    assert model.caption(pictures[0], prompt="", max_new_tokens=4).tokens


def test_a_text_ends_before_the_end_token(model: Predictor, pictures: list[Path]) -> None:
    end = model.model.config.language.eos_token_id
    ended = [
        text
        for text in model.caption(pictures * 4, do_sample=True, temperature=4.0, seed=1)
        if end in text.tokens
    ]

    assert ended, "the test needs a text that ends by itself"
    for text in ended:
        assert text.tokens[-1] == end
        assert text == model.generator.tokenizer.decode(text.tokens[:-1]).strip()


def test_unknown_and_contradicting_options_are_errors(model: Predictor, pictures: list[Path]) -> None:
    with pytest.raises(TypeError, match="beam_size"):
        model.caption(pictures[0], beam_size=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean 'num_beams'"):
        model.ask(pictures[0], "what is it?", beams=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="num_return_sequences"):
        model.chat(pictures[0]).send("what is it?", num_return_sequence=2)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="do_sample=False"):
        model.caption(pictures[0], do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="batch_size"):
        model.caption(pictures, batch_size=0)
    with pytest.raises(ValueError, match="expected a question, got NoneType"):
        model.ask(pictures[0], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="about one image"):
        model.chat(pictures)  # type: ignore[arg-type]


def test_a_bad_image_in_a_list_is_named(model: Predictor, pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image at all")

    with pytest.raises(blip2.ImageError, match=r"image 4: .*bad\.jpg"):
        model.caption([*pictures[:3], bad], batch_size=2)
    with pytest.raises(blip2.ImageError, match=r"absent\.jpg: no such file"):
        model.ask(tmp_path / "absent.jpg", "what is it?")


def test_a_caption_survives_pickling_and_copying(model: Predictor, pictures: list[Path]) -> None:
    caption = model.caption(pictures[0], max_new_tokens=4)
    for copied in (pickle.loads(pickle.dumps(caption)), copy.deepcopy(caption)):
        assert type(copied) is type(caption)
        assert (copied, copied.score, copied.tokens) == (caption, caption.score, caption.tokens)
    assert math.isnan(GeneratedText("typed by hand").score)


def test_shaping_asks_for_sampling_and_temperature_0_is_greedy(
    model: Predictor, pictures: list[Path]
) -> None:
    sampled = model.caption(pictures, temperature=3.0, seed=1, max_new_tokens=8)
    assert sampled == model.caption(pictures, do_sample=True, temperature=3.0, seed=1, max_new_tokens=8)
    assert sampled != model.caption(pictures, max_new_tokens=8)
    greedy = model.caption(pictures, num_beams=1, max_new_tokens=8)
    assert model.caption(pictures, temperature=0, top_p=0.5, max_new_tokens=8) == greedy


# --- encoded images ------------------------------------------------------------------------------------------------


def test_an_encoded_image_is_not_read_again(
    model: Predictor, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [model.ask(picture, "what is it?") for picture in pictures]
    encoded = model.encode(pictures, batch_size=2)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(model.model, "embed_image", refuse)
    monkeypatch.setattr(model.model, "prefill_prefix", refuse)
    assert model.ask(encoded, "what is it?") == expected
    assert model.ask(encoded[2], "what is it?") == expected[2]
    assert [image.size for image in encoded] == [load_image(picture).size for picture in pictures]


def test_encoded_and_other_images_share_a_list(model: Predictor, pictures: list[Path]) -> None:
    mixed = [model.encode(pictures[0]), pictures[1], model.encode(pictures[2])]
    assert model.caption(mixed, max_new_tokens=8) == model.caption(pictures[:3], max_new_tokens=8)


def test_an_encoding_of_another_model_is_refused(model: Predictor, pictures: list[Path]) -> None:
    encoded = model.encode(pictures[0])
    other = blip2.EncodedImage(torch.zeros(1, 4, 5), encoded.prompt_cache, encoded.size)
    with pytest.raises(ValueError, match="another model"):
        model.caption(other)


# --- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 5}, {"do_sample": True, "temperature": 3.0, "seed": 2}]
)
def test_pieces_add_up_to_the_text(model: Predictor, pictures: list[Path], options: dict[str, Any]) -> None:
    for picture in pictures:
        pieces = list(model.caption(picture, stream=True, **options))
        assert "".join(pieces) == model.caption(picture, num_beams=1, **options)
        assert all(pieces)
        answer = model.ask(model.encode(picture), "what is it?", stream=True, **options)
        assert "".join(answer) == model.ask(picture, "what is it?", num_beams=1, **options)


def test_a_stream_ends_where_the_text_does(model: Predictor, pictures: list[Path]) -> None:
    ids = model.caption(pictures[0], num_beams=1, max_new_tokens=12, eos_token_id=()).tokens
    for end in (ids[5], [ids[3], ids[7]], ()):
        text = model.caption(pictures[0], num_beams=1, max_new_tokens=12, eos_token_id=end)
        pieces = model.caption(pictures[0], stream=True, max_new_tokens=12, eos_token_id=end)
        assert "".join(pieces) == text


def test_what_cannot_stream_says_so_at_once(model: Predictor, pictures: list[Path]) -> None:
    for wrong in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ValueError, match="stream=True"):
            model.caption(pictures[0], stream=True, **wrong)
    with pytest.raises(ValueError, match="stream=True"):
        model.caption(pictures, stream=True)
    with pytest.raises(blip2.ImageError):
        model.caption("absent.jpg", stream=True)


def _decode(ids: list[int]) -> str:
    """Bytes as tokens: what a byte-level vocabulary does at its worst."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text",
    [
        " a dog",
        "ein Bär \U0001f43b isst €",
        "a  b \n c \n ",
        "   ",
        "",
        "e\u0301",
        "ab\ufffdcd",
        "ends in \ufffd",
    ],
)
def test_pieces_never_break_a_character(text: str) -> None:
    tokens = list(text.encode())
    pieces = list(detokenize_stream(_decode, tokens))

    assert "".join(pieces) == text.strip()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_bytes_that_are_no_text() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        tokens = random.choice([0x20, 0x41, 0xC3, 0xA4, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF], size=12).tolist()
        assert "".join(detokenize_stream(_decode, tokens)) == _decode(tokens).strip()


def test_pieces_come_as_soon_as_they_can() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in b"ab cd":
            taken.append(i)
            yield i

    pieces = detokenize_stream(_decode, source())
    assert next(pieces) == "a"
    assert len(taken) == 1


# --- how results show themselves -----------------------------------------------------------------------------------


def test_a_model_names_itself_its_device_and_its_precision(
    model: Predictor, generator_folder: Path, matcher_folder: Path, tmp_path: Path
) -> None:
    assert repr(model) == f"<blip2.Predictor {str(generator_folder)!r} on cpu, fp32>"
    for options, precision in (({"dtype": "bf16"}, "bf16"), ({"quantize": "int8"}, "int8")):
        other = blip2.load(matcher_folder, device="cpu", **options)
        assert repr(other) == f"<blip2.Predictor {str(matcher_folder)!r} on cpu, {precision}>"


def test_an_encoded_image_shows_its_size_not_its_tensors(model: Predictor, pictures: list[Path]) -> None:
    width, height = load_image(pictures[0]).size
    assert repr(model.encode(pictures[0])) == f"EncodedImage({width}x{height} px, 4 queries)"


def test_a_notebook_shows_an_explanation_as_its_image(model: Predictor, pictures: list[Path]) -> None:
    explanation = model.explain(pictures[0], text="a red cat")
    shown = explanation._repr_png_()
    assert shown is not None
    assert Image.open(io.BytesIO(shown)).size == explanation.image().size


def test_a_notebook_shows_text_and_figures_without_markup_of_their_own() -> None:
    caption = blip2.Caption("<b>a dog & a cat</b>", -0.25)
    assert caption._repr_html_() == (
        "<div>&lt;b&gt;a dog &amp; a cat&lt;/b&gt; <small>score -0.250</small></div>"
    )
    assert "score" not in blip2.Answer("typed by hand")._repr_html_()
    match = blip2.Match(probability=0.75, similarity=0.5)
    assert match._repr_html_() == "<div><small>probability 0.750, similarity 0.500</small></div>"
    assert "<div>&lt;i&gt; <small>probability" in blip2.Ranked("<i>", 0.5, -1.0)._repr_html_()


# --- conversation --------------------------------------------------------------------------------------------------


def test_a_conversation_reads_its_earlier_turns(model: Predictor, pictures: list[Path]) -> None:
    chat = model.chat(pictures[0])
    first, second = chat.send("what is it?", max_new_tokens=5), chat.send("why?", max_new_tokens=5)

    assert first == model.ask(pictures[0], "what is it?", max_new_tokens=5)
    assert chat.turns == (("what is it?", first), ("why?", second))
    prompt = chat_prompt([("what is it?", first)], "why?")
    assert second == model.caption(pictures[0], prompt=prompt, max_new_tokens=5, length_penalty=-1.0)


def test_a_conversation_streams(model: Predictor, pictures: list[Path]) -> None:
    spoken, streamed = model.chat(model.encode(pictures[0])), model.chat(pictures[0])
    for question in ("what is it?", "why?"):
        answer = spoken.send(question, num_beams=1, max_new_tokens=5)
        assert "".join(streamed.send(question, stream=True, max_new_tokens=5)) == answer
    assert streamed.turns == spoken.turns


def test_a_long_conversation_forgets_its_beginning(model: Predictor, pictures: list[Path]) -> None:
    chat = model.chat(pictures[0])
    for i in range(12):
        chat.send(f"what is it? {i}", max_new_tokens=5)
    assert len(chat.turns) == 12


def test_a_conversation_goes_on_with_one_answer(model: Predictor, pictures: list[Path]) -> None:
    chat = model.chat(pictures[0])
    with pytest.raises(ValueError, match="one answer"):
        chat.send("what is it?", num_return_sequences=2)  # type: ignore[call-overload]
    assert not chat.turns


def test_a_question_that_cannot_fit_is_an_error(model: Predictor, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="positions"):
        model.chat(pictures[0]).send("what is it? " * 40)


# --- T5 ------------------------------------------------------------------------------------------------------------


def test_t5_has_its_own_question_prompt(t5: Predictor, pictures: list[Path]) -> None:
    options = {"num_beams": 1, "max_new_tokens": 6}
    published = t5.caption(pictures[0], prompt="Question: what is it? Short answer:", **options)
    assert t5.ask(pictures[0], "what is it?", **options) == published
    assert published != t5.caption(pictures[0], prompt="Question: what is it? Answer:", **options)
    chat = t5.chat(pictures[0])
    first = chat.send("what is it?", **options)
    assert first == t5.caption(pictures[0], prompt="Question: what is it? Answer:", **options)
    second = chat.send("why?", **options)
    assert second == t5.caption(pictures[0], prompt=chat_prompt(chat.turns[:1], "why?"), **options)


def test_t5_takes_every_way_in(t5: Predictor, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [t5.ask(*pair, max_new_tokens=5) for pair in zip(pictures, QUESTIONS)]
    assert len(set(alone)) > 1
    assert t5.ask(pictures, QUESTIONS, max_new_tokens=5) == alone
    encoded = t5.encode(pictures)
    assert t5.ask([*encoded[:2], *pictures[2:]], QUESTIONS, max_new_tokens=5) == alone
    monkeypatch.setattr(t5.model.vision, "forward", None)  # nothing encoded is read again
    assert t5.ask(encoded, QUESTIONS, max_new_tokens=5) == alone
    pieces = list(t5.ask(encoded[0], QUESTIONS[0], max_new_tokens=5, stream=True))
    assert "".join(pieces) == t5.ask(encoded[0], QUESTIONS[0], num_beams=1, max_new_tokens=5)


def test_t5_forgets_the_beginning_of_a_long_conversation(t5: Predictor, pictures: list[Path]) -> None:
    chat = t5.chat(pictures[0])
    chat._turns = [("what is it?", "a red cat " * 200), ("why?", "yes")]
    assert t5.chat_prompt(chat.turns, "really?", 10) == chat_prompt(chat._turns[1:], "really?")


# --- matching ------------------------------------------------------------------------------------------------------


def test_match_takes_one_or_many_of_each(model: Predictor, pictures: list[Path]) -> None:
    texts = ["a red cat", "two dogs and a house", "it"]
    table = model.match(pictures, texts, batch_size=2)

    assert [len(row) for row in table] == [3] * 5
    one = model.match(pictures[1], texts[2])
    assert isinstance(one, blip2.Match)
    assert model.match(pictures[1], [texts[2]])[0] == one
    pairs = [
        *zip(model.match(pictures, texts[2]), [row[2] for row in table], strict=True),
        *zip(model.match(pictures[1], texts), table[1], strict=True),
        (table[1][2], one),
    ]
    for cell, expected in pairs:
        near = pytest.approx((expected.probability, expected.similarity), abs=1e-5)
        assert (cell.probability, cell.similarity) == near
    assert all(0 <= cell.probability <= 1 and -1 <= cell.similarity <= 1 for row in table for cell in row)


@pytest.mark.parametrize("text", ["", " \n", "\u200b\x1b"])
def test_an_empty_text_is_refused_by_every_method(model: Predictor, text: str, pictures: list[Path]) -> None:
    image, chat = pictures[0], model.chat(pictures[0])
    calls: list[Callable[[], object]] = [
        lambda: model.ask(image, text),
        lambda: model.ask([image, image], ["what?", text]),
        lambda: model.ask(image, text, stream=True),
        lambda: model.rank(image, text, ["yes"]),
        lambda: model.rank(image, "what?", ["yes", text]),
        lambda: model.explain(image, question=text),
        lambda: model.explain(image, text=text),
        lambda: model.match(image, text),
        lambda: model.match([image], ["a cat", text]),
        lambda: model.embed_text(text),
        lambda: model.embed_text(["a cat", text]),
        lambda: chat.send(text),
        lambda: chat.send(text, stream=True),
        lambda: model.explain(image, question="what?", answer=text),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"empty|holds only"):
            call()
    assert chat.turns == ()
    with pytest.raises(ValueError, match="question number 2 "):
        calls[1]()


def test_arguments_of_another_kind_are_refused_in_words(
    model: Predictor, generator_folder: Path, pictures: list[Path]
) -> None:
    image, wrong, load = pictures[0], [None, 5, b"yes"], partial(blip2.load, generator_folder)
    calls: list[tuple[Callable[..., object], list[Any], str]] = [
        (lambda answers: model.rank(image, "what?", answers), ["yes", "", b"yes", []], "none of them empty"),
        (lambda text: model.rank(image, "what?", ["yes", text]), wrong, "none of them empty"),
        (lambda text: model.explain(image, text=text), [5, b"yes", ["yes"]], "expected a text"),
        (
            lambda text: model.explain(image, question="what?", answer=text),
            [5, ["yes"]],
            "expected (a )?text",
        ),
        (
            lambda size: model.caption(image, batch_size=size),
            ["3", 1.5, 0],
            "batch_size must be a whole number",
        ),
        (lambda name: blip2.load(name), [""], "name is empty"),
        (lambda name: load(matcher=name), [""], "matcher is empty"),
        (lambda name: load(vision=name), [""], "vision is empty"),
    ]
    for call, arguments, says in calls:
        for argument in arguments:
            with pytest.raises(ValueError, match=says):
                call(argument)


def test_similarity_is_the_best_product_of_embeddings(model: Predictor, pictures: list[Path]) -> None:
    texts = ["a red cat", "two dogs"]
    images, words = model.embed(pictures, batch_size=2), model.embed_text(texts)

    assert (images.shape, words.shape) == ((5, 4, 16), (2, 16))
    assert torch.allclose(images.norm(dim=-1), torch.ones(5, 4))
    assert torch.allclose(model.embed(pictures[3]), images[3], atol=1e-5)
    assert torch.allclose(model.embed_text(texts[1]), words[1], atol=1e-5)
    best = (images @ words.T).amax(1)
    for row, similarities in zip(model.match(pictures, texts), best.tolist()):
        assert [cell.similarity for cell in row] == pytest.approx(similarities, abs=1e-5)
    assert model.embed([]).shape == (0, 4, 16)
    assert model.embed_text([]).shape == (0, 16)


def test_a_limit_of_pixels(generator_folder: Path, matcher_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder, device="cpu", matcher=matcher_folder, max_pixels=1_000)
    for use in (
        model.caption,
        model.encode,
        model.explain,
        model.embed,
        lambda image: model.match(image, "a"),
    ):
        with pytest.raises(blip2.ImageError, match=r"30x40 px is 1,200 pixels, the limit is 1,000"):
            use(pictures[0])
    assert model.encode(pictures[1]).size == (25, 15)  # a JPEG of 50x30 px, at half its scale
    for value in (0, 10**9, "many", 1.5):
        with pytest.raises(blip2.ImageError, match=r"max_pixels is .*, expected a whole number from 1 to"):
            blip2.load(max_pixels=value)  # type: ignore[arg-type]


def test_a_matcher_alone_matches_and_does_not_write(matcher_folder: Path, pictures: list[Path]) -> None:
    matcher = blip2.load(matcher_folder)
    assert 0 <= matcher.match(pictures[0], "a cat").probability <= 1
    for writes in (matcher.caption, matcher.encode, matcher.chat):
        with pytest.raises(ValueError, match="load one that writes"):
            writes(pictures[0])


def test_without_a_matcher_matching_says_what_to_do(generator_folder: Path, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="matcher='itm'"):
        blip2.load(generator_folder).match(pictures[0], "a cat")
    with pytest.raises(ValueError, match="writes text"):
        blip2.load(generator_folder, matcher=generator_folder).match(pictures[0], "a cat")


def test_the_matcher_wants_the_image_itself(model: Predictor, pictures: list[Path]) -> None:
    with pytest.raises(ValueError, match="its own encoder"):
        model.match(model.encode(pictures[0]), "a cat")


# --- loading -------------------------------------------------------------------------------------------------------


def test_the_default_model_and_its_matcher(
    generator_folder: Path, matcher_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (registry, predict):
        monkeypatch.setattr(module, "DEFAULT_FOLDER", generator_folder)
        monkeypatch.setattr(module, "DEFAULT_MATCHER_FOLDER", matcher_folder)
    for model in (blip2.load(), blip2.load("default")):
        assert model.caption(pictures[0], max_new_tokens=3).tokens
        assert model.match(pictures[0], "a cat").probability > 0
    with pytest.raises(ValueError, match="revision"):
        blip2.load(revision="main")


def test_an_installation_without_the_default_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "DEFAULT_FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match="no default model"):
        blip2.load()


def test_dtypes(generator_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert blip2.load(generator_folder).model.projection.weight.dtype == torch.float32  # fp16 in the file
    half = blip2.load(generator_folder, dtype="bf16")
    assert half.model.projection.weight.dtype == torch.bfloat16
    assert half.caption(pictures[:2], max_new_tokens=3)
    assert list(half.chat(pictures[0]).send("what?", max_new_tokens=3, stream=True)) is not None
    monkeypatch.setattr(loading, "default_dtype", lambda parameters: "bf16" if parameters > 1000 else "fp32")
    assert blip2.load(generator_folder).model.projection.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int3"):
        blip2.load(generator_folder, dtype="int3")


@pytest.mark.parametrize(
    ("old", "new"),
    [("Encoded", "EncodedImage"), ("Decoding", None), ("loads", "load"), ("predictor", "Predictor")],
)
def test_a_name_the_package_does_not_have(old: str, new: str | None) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{old}'") as raised:
        getattr(blip2, old)
    assert ("did you mean" in str(raised.value)) == (new is not None)
    assert new is None or f"did you mean '{new}'?" in str(raised.value)


def test_devices_that_are_not_here(generator_folder: Path) -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or mps"):
        blip2.load(generator_folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no NVIDIA GPU"):
            blip2.load(generator_folder, device="cuda")


def test_an_alias_is_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []

    def find(name: Any, revision: str | None) -> Path:
        requests.append((name, revision))
        raise ValueError("not today")

    monkeypatch.setattr(loading, "resolve_path", find)
    for name in ("opt-6.7b-coco", "Salesforce/blip2-opt-6.7b-coco"):
        with pytest.raises(ValueError, match="not today"):
            blip2.load(name, revision="main")
    assert requests == [("Salesforce/blip2-opt-6.7b-coco", "main")] * 2


def test_offline_and_not_cached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in the local cache"):
        blip2.load("Salesforce/blip2-opt-2.7b")
    with pytest.raises(ValueError, match="nonesuch"):
        blip2.load("nonesuch")


def test_the_first_caption_needs_no_compiler(generator_folder: Path, pictures: list[Path]) -> None:
    program = (
        f"import sys, blip2; blip2.load({str(generator_folder)!r}).caption({str(pictures[0])!r}, max_new_tokens=2)\n"
        "assert 'torch._dynamo' not in sys.modules, 'importing it takes as long as all of torch'"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bytes_and_files_are_read_once(model: Predictor, pictures: list[Path]) -> None:
    stream = io.BytesIO(pictures[0].read_bytes())
    assert model.caption(stream, max_new_tokens=4) == model.caption(pictures[0], max_new_tokens=4)
