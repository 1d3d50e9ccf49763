"""Where the model looked: heat maps against derivatives taken by hand, and that looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2 import cli
from blip2.explain import SOFT, _cross_attention, split_words, spread
from blip2.images import load_image, to_pixels
from default_model.explained import words_for
from default_model.scenes import Noun


@pytest.fixture(scope="module", params=["opt", "t5"])
def model(request: pytest.FixtureRequest) -> blip2.Predictor:
    name = {"opt": "generator_folder", "t5": "t5_folder"}[request.param]
    return blip2.load(request.getfixturevalue(name), device="cpu")


def test_words_make_up_the_text_and_each_has_a_map(model: blip2.Predictor, pictures: list[Path]) -> None:
    explanation = model.explain(pictures[0], text="a photo of the red cat")
    assert explanation.text == "a photo of the red cat" == " ".join(word.text for word in explanation.words)
    for i, word in enumerate(explanation.words):
        assert word.heat.shape == (4, 4) and word.heat.dtype == np.float32
        assert word.heat.min() >= 0 and word.heat.max() in (0, 1)
        assert word.logprob < 0
        assert explanation.heat_map(i).shape == (40, 30)  # the picture's height and width
    # layers that read the image, heads, queries, rows, columns
    assert explanation.attention.shape == (1, 4, 4, 4, 4)
    assert explanation.attention.min() >= 0 and (explanation.attention.sum((-1, -2)) < 1).all()


def test_an_end_token_of_ones_own_is_no_word(model: blip2.Predictor, pictures: list[Path]) -> None:
    tokens = model.caption(pictures[0], num_beams=1, max_new_tokens=8).tokens
    for end in dict.fromkeys(tokens):
        text = model.caption(pictures[0], num_beams=1, max_new_tokens=8, eos_token_id=end)
        if text:
            assert model.explain(pictures[0], text=text).text == text


def test_its_own_caption_and_answer_have_their_own_probability(
    model: blip2.Predictor, pictures: list[Path]
) -> None:
    for own, explanation in (
        (model.caption(pictures[1]), model.explain(pictures[1])),
        (model.ask(pictures[1], "what is it?"), model.explain(pictures[1], question="what is it?")),
    ):
        assert explanation.text == own
        ended = model.model.config.language.eos_token_id == own.tokens[-1]
        total = sum(own.token_logprobs[: -1 if ended else None])
        # tokens of nothing but space belong to no word
        assert sum(word.logprob for word in explanation.words) >= total - 1e-3
    given = model.explain(pictures[1], question="what is it?", answer="a cat")
    assert given.text == "a cat"


def test_heat_is_the_derivative_where_the_encoder_mixes_nothing(
    generator_folder: Path, pictures: list[Path]
) -> None:
    model = blip2.load(generator_folder, device="cpu")
    for block in model.model.vision.layers:
        block.self_attn.projection.weight.data.zero_()
        block.self_attn.projection.bias.data.zero_()
    explanation = model.explain(pictures[2], text="cat")
    tokenizer, inner = model.generator.tokenizer, model.model.double()
    prompt, written = tokenizer.encode("a photo of"), tokenizer.encode(" cat", frame=False)
    pixels = to_pixels([load_image(pictures[2])], model.generator.image_processor)
    features = inner.vision(pixels.double()).detach()

    features.requires_grad_()
    logits = inner.logits_from_prefix(
        inner.project(inner.qformer(features)), torch.tensor([prompt + written])
    )
    logprobs = (logits[0, -len(written) - 1 : -1] / SOFT).log_softmax(-1)
    (slope,) = torch.autograd.grad(logprobs[torch.arange(len(written)), written].sum(), features)
    expected = slope[0, 1:].norm(dim=-1).view(4, 4).numpy()
    assert explanation.words[0].heat == pytest.approx(expected / expected.max(), abs=1e-3)


def test_looking_changes_nothing(generator_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder, device="cpu")
    pixels = to_pixels([load_image(pictures[0])], model.generator.image_processor)
    with torch.no_grad():
        features = model.model.vision(pixels)
        before = model.model.qformer(features)
        seen: list[torch.Tensor] = []
        with _cross_attention(model.model.qformer, seen):
            during = model.model.qformer(features)
    assert torch.equal(before, during) and seen[0].sum(-1).allclose(torch.ones(()))
    model.explain(pictures[0], text="a cat")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_attention_is_what_the_layer_used(generator_folder: Path, pictures: list[Path]) -> None:
    inner = blip2.load(generator_folder, device="cpu").model
    features = torch.randn(1, 17, 32)
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    layer = inner.qformer.layers[0].crossattention
    handle = layer.register_forward_hook(lambda module, args, out: given.extend((args[0], out)))
    with torch.no_grad(), _cross_attention(inner.qformer, seen):
        inner.qformer(features)
    handle.remove()
    value = layer.attention.value(features).unflatten(-1, (4, -1)).transpose(1, 2)
    again = layer.output((seen[0] @ value).transpose(1, 2).flatten(2), given[0])
    assert torch.allclose(again, given[1], atol=1e-5)


def test_a_word_is_all_tokens_it_has() -> None:
    pieces = [" a", " ca", "t", ",", " caf", b"\xc3", b"\xa9", " "]

    def decode(ids: list[int]) -> str:
        joined = b"".join(p if isinstance(p, bytes) else p.encode() for p in (pieces[i] for i in ids))
        return joined.decode(errors="replace")

    assert split_words(range(len(pieces)), decode) == [("a", [0]), ("cat,", [1, 2, 3]), ("café", [4, 5, 6])]


def test_names_of_several_words() -> None:
    words = tuple(SimpleNamespace(text=text) for text in ("a", "hot", "air", "balloon,", "and", "a", "bear."))
    explanation = SimpleNamespace(words=words)
    assert words_for(explanation, Noun("hot air balloon", "hot air balloons", "a", "")) == [1, 2, 3]  # type: ignore[arg-type]
    assert words_for(explanation, Noun("bear", "bears", "a", "")) == [6]  # type: ignore[arg-type]
    assert words_for(explanation, Noun("loon", "loons", "a", "")) == []  # type: ignore[arg-type]


def test_pictures(model: blip2.Predictor, pictures: list[Path]) -> None:
    explanation = model.explain(pictures[3], text="a photo of two dogs")
    one, all_of_them = explanation.image(1), explanation.image()
    assert one.mode == "RGB" and all_of_them.width == 4 * one.width
    assert len(one.getcolors(1 << 20)) > 50
    with pytest.raises(ValueError, match="words 0 to 4"):
        explanation.image(5)
    heat = np.zeros((4, 4), np.float32)
    heat[1, 3] = 1
    y, x = np.unravel_index(spread(heat, (400, 80)).argmax(), (80, 400))
    assert 20 <= y < 40 and 300 <= x < 400  # the patch, stretched as the picture is


def test_what_cannot_be_explained(generator_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder, device="cpu")
    with pytest.raises(ValueError, match="no word to explain"):
        model.explain(pictures[0], text="  ")
    with pytest.raises(ValueError, match="needs the question"):
        model.explain(pictures[0], answer="yes")
    with pytest.raises(ValueError, match="give the answer"):
        model.explain(pictures[0], text="a", question="b")
    with pytest.raises(ValueError, match="image itself"):
        model.explain(model.encode(pictures[0]))
    with pytest.raises(ValueError, match="too long"):
        model.explain(pictures[0], text="cat " * 200)
    with pytest.raises(blip2.ImageError):
        model.explain(pictures[0].with_name("absent.png"))
    with pytest.raises(ValueError, match="without quantize="):
        blip2.load(device="cpu", quantize="int8").explain(pictures[0], text="a cat")


def test_command_line(
    generator_folder: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    shared = ["--model", str(generator_folder), "--device", "cpu"]
    assert cli.main(["explain", str(pictures[0]), "--text", "a cat", "-o", str(out), "--json", *shared]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == "a cat" and [word["text"] for word in record["words"]] == ["a", "cat"]
    assert np.array(record["words"][0]["heat"]).shape == (4, 4)
    with Image.open(out) as image:
        assert image.width > 200
    assert cli.main(["explain", str(tmp_path / "absent.png"), "-o", str(out), *shared]) == 1
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["explain", str(pictures[0]), "-o", "out.doc", *shared]) == 2
    assert "must end with .png" in capsys.readouterr().err


def test_the_default_model_points_at_what_it_names() -> None:
    examples = Path(__file__).parent.parent / "examples"
    explanation = blip2.load(device="cpu").explain(
        examples / "swallow-and-balloon.jpg", text="a swallow and a hot air balloon"
    )
    width = explanation.picture.width
    swallow, balloon = explanation.heat_map(1).argmax() % width, explanation.heat_map(5).argmax() % width
    assert swallow < width * 0.55 < balloon
