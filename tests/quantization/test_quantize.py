"""Quantized weights: what the layers compute, and that a quantized model writes what the model writes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blip2
from blip2.checkpoint import (
    CheckpointError,
    convert,
    count_parameters,
    load_model,
    open_tensors,
    quantize_checkpoint,
    save_model,
)
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import MODES, Mode, T5Config
from blip2.modeling.layers import cpu_has_bf16
from blip2.quantization import apply, linear
from blip2.quantization.formats import GROUP, Int4Weight, Int8Weight
from blip2.quantization.linear import (
    Int4Linear,
    Int8Embedding,
    Int8ImageLinear,
    Int8Linear,
    max_activation_level,
    onednn_multiplies,
    openvino_multiplies,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, inputs: int) -> Tensor:
    """Activations as OPT has them: some channels of every token are far larger than the rest."""
    x = drawn(rows, inputs, seed=5)
    x[:, 3] *= 60
    x[:, 40] *= 20
    return x


# --- weights ---------------------------------------------------------------------------------------------------------


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    weight = drawn(8, 50) * torch.logspace(-3, 2, 8)[:, None]
    quantized = Int8Weight.of(weight)
    assert quantized.values.dtype == torch.int8
    assert ((quantized.float() - weight).abs() <= 0.5001 * quantized.scale[:, None]).all()
    assert torch.equal(Int8Weight.of(torch.zeros(2, 4)).float(), torch.zeros(2, 4))


def test_four_bits_hold_sixteen_values_a_group() -> None:
    weight = drawn(6, 3 * GROUP) + 2.0
    quantized = Int4Weight.of(weight)
    assert quantized.values.shape == (6, 3 * GROUP // 2) and quantized.scales.shape == (6, 3)
    assert int(quantized.unpacked().max()) == 15 and int(quantized.unpacked().min()) == 0
    error = (quantized.float() - weight).square().mean() / weight.var()
    assert error < 0.01
    exact = torch.arange(16.0).repeat(2, GROUP // 16) - 4  # sixteen values, evenly apart: nothing is lost
    assert torch.equal(Int4Weight.of(exact).float(), exact)


def test_cutting_an_extreme_off_quantizes_a_group_better() -> None:
    weight = drawn(200, GROUP)
    groups = weight.float()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    cut = Int4Weight.of(weight).float()
    assert (cut - weight).square().mean() < 0.95 * (plain - weight).square().mean()


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hi_lo", [False, True])
def test_the_product_is_that_of_quantized_weights_and_quantized_tokens(hi_lo: bool) -> None:
    weight, bias, x = Int8Weight.of(drawn(20, 64)), drawn(20, seed=1), drawn(7, 64, seed=2)
    level = max_activation_level() or 127
    largest = x.abs().amax(1, keepdim=True)
    scaled = x / (largest / level)  # in the layer's order: a value close to halfway would round the other way
    hi = scaled.round()
    lo = ((scaled - hi) * (2 * level)).round() if hi_lo else torch.zeros_like(hi)
    tokens = (hi.double() + lo.double() / (2 * level)) * largest.double() / level
    expected = tokens @ weight.float().double().mT + bias
    ours = Int8Linear(weight, bias, hi_lo=hi_lo, outlier_ratio=0)(x)  # every token is split
    if max_activation_level():
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.shape == (7, 20) and ours.dtype == torch.float32


def test_a_hi_lo_split_keeps_what_is_beside_outliers() -> None:
    if not max_activation_level():
        pytest.skip("this processor quantizes no activations")
    weight, x = Int8Weight.of(drawn(30, 64)), outliers(9, 64)
    weight.values[:, [3, 40]] = 0  # so that only what is beside them is left
    exact = x @ weight.float().mT
    errors = [
        float((Int8Linear(weight, None, hi_lo=hi_lo)(x) - exact).norm() / exact.norm())
        for hi_lo in (False, True)
    ]
    assert errors[0] > 0.1 and errors[1] < 0.005


def test_only_outlier_tokens_are_split() -> None:
    if max_activation_level() != 127:
        pytest.skip("this processor splits every token, or none")
    weight, x = Int8Weight.of(drawn(30, 256)), drawn(9, 256)
    x[4] = outliers(1, 256)
    outputs = [Int8Linear(weight, None, hi_lo=hi_lo)(x) for hi_lo in (False, True)]
    same = [torch.equal(one, two) for one, two in zip(*outputs, strict=True)]
    assert same == [row != 4 for row in range(9)]
    assert torch.equal(Int8Linear(weight, None, outlier_ratio=0)(x)[4], outputs[1][4])


needs_onednn = pytest.mark.skipif(
    not onednn_multiplies(), reason="images are encoded with oneDNN on x86 with VNNI"
)


@needs_onednn
def test_an_image_s_tokens_are_quantized_over_their_own_range() -> None:
    weight, bias, x = Int8Weight.of(drawn(20, 64)), drawn(20, seed=1), drawn(7, 64, seed=2)
    x[1], x[2], x[3] = 0, 2.5, x[3] * 1e-3 + 100
    low, step = (
        x.amin(1, keepdim=True),
        (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).clamp(1e-30) / 255,
    )
    tokens = ((x - low) / step).round().double() * step.double() + low.double()
    ours = Int8ImageLinear(weight, bias)(x)
    expected = tokens @ weight.float().double().mT + bias
    off = (ours.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (off < 0.002).all()  # a value close to halfway may be quantized the other way
    assert Int8ImageLinear(weight, None, torch.bfloat16)(x).dtype == torch.bfloat16


@needs_onednn
def test_what_gelu_gives_is_quantized_twice_as_finely() -> None:
    weight, x = Int8Weight.of(drawn(30, 512)), nn.functional.gelu(drawn(9, 512, seed=1))
    exact = x.double() @ weight.float().double().mT
    errors = [
        (layer(x) - exact).norm()
        for layer in (Int8Linear(weight, None, hi_lo=False), Int8ImageLinear(weight, None))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_four_bits_compute_with_the_weights_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "openvino_multiplies", lambda: False)
    weight, bias, x = Int4Weight.of(drawn(32, 2 * GROUP)), drawn(32, seed=1), drawn(2, 5, 2 * GROUP, seed=2)
    ours = Int4Linear(weight, bias)(x)
    torch.testing.assert_close(ours, x.bfloat16().float() @ weight.float().mT + bias, rtol=0.01, atol=0.05)
    assert ours.shape == (2, 5, 32)


needs_openvino = pytest.mark.skipif(
    not openvino_multiplies(),
    reason="OpenVINO multiplies 4 bit weights where it is installed, on x86 with VNNI",
)


@needs_openvino
def test_openvino_multiplies_four_bits_with_activations_in_eight() -> None:
    weight, bias = Int4Weight.of(drawn(32, 2 * GROUP) + 0.5), drawn(32, seed=1)
    assert len(weight.zeros.unique()) > 1
    x = outliers(70, 2 * GROUP)  # more rows than go at once
    groups = x.unflatten(1, (2, GROUP))
    step = groups.abs().amax(-1, keepdim=True) / 127  # an outlier costs its own group only
    tokens = ((groups / step).round() * step).flatten(1)
    ours = Int4Linear(weight, bias)(x)
    expected = tokens.double() @ weight.float().double().mT + bias
    off = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    assert (off < 0.002).all()  # a value close to halfway may be quantized the other way
    exact = x @ weight.float().mT + bias
    assert (ours - exact).norm() / exact.norm() > 0.002


@needs_openvino
def test_a_weight_that_openvino_has_packed_takes_its_memory_once(tmp_path: Path) -> None:
    """Its values stay in a file: one of their own, or the one they were mapped from, which may be gone by then."""
    written = Int4Weight.of(drawn(512, 1024))
    path = tmp_path / "values"
    path.write_bytes(written.values.numpy().tobytes())
    values = torch.from_file(str(path), size=written.values.numel(), dtype=torch.uint8).view(512, 512)
    path.unlink()
    x = drawn(3, 1024, seed=1)
    expected = Int4Linear(written, None)(x)
    layer = Int4Linear(replace(written, values=values, mapped=True), None)
    assert torch.equal(layer(x), expected) and torch.equal(values, written.values)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    with pytest.raises(TypeError, match="cannot be pickled; load the model where it is needed"):
        pickle.dumps(layer)


@needs_openvino
def test_several_threads_may_use_one_product() -> None:
    layer = Int4Linear(Int4Weight.of(drawn(256, 512)), None)
    rows = [drawn(3, 512, seed=seed) for seed in range(40)]
    expected = [layer(x) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(layer, rows), expected))


@pytest.mark.parametrize("kind", ["int8", "int8 image", "int4", "int4 by torch"])
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "int8 image" and not onednn_multiplies():
        pytest.skip("images are encoded with oneDNN on x86 with VNNI")
    if kind == "int4 by torch":
        monkeypatch.setattr(linear, "openvino_multiplies", lambda: False)
    weight, bias = drawn(48, 2 * GROUP), drawn(48, seed=1)
    if kind.startswith("int4"):
        layer: nn.Module = Int4Linear(Int4Weight.of(weight), bias)
    elif kind == "int8":
        layer = Int8Linear(Int8Weight.of(weight), bias)
    else:
        layer = Int8ImageLinear(Int8Weight.of(weight), bias)
    x = outliers(33, 2 * GROUP)
    x[::2] = drawn(17, 2 * GROUP, seed=3)  # some tokens are split, some are not
    x[0, :-1] = (
        torch.linspace(-127, 127, 2 * GROUP - 1).mul(2).round().div(2)
    )  # values halfway between two steps
    x[0, -1] = 127
    together = layer(x)
    assert all(torch.equal(layer(x[i : i + 1]), together[i : i + 1]) for i in range(33))
    assert torch.equal(layer(x[3:20]), together[3:20])


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_elsewhere_weights_are_widened_for_a_product(
    kind: type[Int8Weight] | type[Int4Weight], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on GPUs, and on processors that FBGEMM does not know."""
    weight, bias, x = kind.of(drawn(48, 2 * GROUP)), drawn(48, seed=1), drawn(5, 2 * GROUP, seed=2)
    exact = x.double() @ weight.float().double().mT + bias
    monkeypatch.setattr(linear, "max_activation_level", lambda: 0)
    if isinstance(weight, Int8Weight):
        assert not onednn_multiplies()
        layer: Int8Linear | Int4Linear = Int8Linear(weight, bias)
    else:
        layer = Int4Linear(weight, bias)
        layer._plain = weight
    assert layer._plain is weight
    for dtype, least in ((torch.float32, 0.005), (torch.bfloat16, 0.01)):
        ours = layer(x.to(dtype))
        assert ours.dtype == dtype and (ours - exact).norm() / exact.norm() < least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    weight = drawn(16, GROUP)
    for layer in (Int8Linear(Int8Weight.of(weight), None), Int4Linear(Int4Weight.of(weight), None)):
        out = layer(drawn(3, GROUP, seed=1).to(dtype))
        assert out.dtype == dtype and bool(out.isfinite().all())


def test_a_quantized_table_gives_the_embeddings_it_stands_for() -> None:
    weight, ids = drawn(50, 64), torch.tensor([[3, 49, 3], [0, 7, 1]])
    assert torch.equal(Int8Embedding(Int8Weight.of(weight))(ids), Int8Weight.of(weight).float()[ids])


def test_a_token_of_zeros_gives_the_bias() -> None:
    bias = drawn(16, seed=1)
    assert torch.equal(Int8Linear(Int8Weight.of(drawn(16, 64)), bias)(torch.zeros(1, 64))[0], bias)


# --- models ----------------------------------------------------------------------------------------------------------


def outputs(model: Blip2 | Blip2Matcher) -> Tensor:
    size = model.config.vision.image_size
    pixels, ids = drawn(2, 3, size, size, seed=9), torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    with torch.inference_mode():
        if isinstance(model, Blip2Matcher):
            return model.qformer.encode_multimodal(model.vision(pixels), ids, torch.ones_like(ids))
        return model(pixels, ids, None, ids if model.config.language.is_encoder_decoder else None)


@pytest.mark.parametrize("variant", ["opt", "opt-untied", "t5", "clip", "matcher", "matcher-itg"])
@pytest.mark.parametrize("mode", MODES)
def test_every_model_can_be_quantized(variants: dict[str, Path], variant: str, mode: Mode) -> None:
    exact, quantized = (
        load_model(variants[variant], dtype="fp32"),
        load_model(variants[variant], quantize=mode),
    )
    floats = {name for name, part in quantized.vision.layers.named_modules() if isinstance(part, nn.Linear)}
    assert floats == {"0.mlp.fc1", "0.mlp.fc2"}
    assert not any(isinstance(part, nn.Linear) for part in quantized.qformer.layers.modules())
    expected, ours = outputs(exact), outputs(quantized)
    # models of random weights are rough: every layer doubles what the one before was off
    assert (ours - expected).norm() / expected.norm() < 0.3
    assert not torch.equal(ours, expected)


@pytest.mark.parametrize("variant", ["opt", "t5"])
def test_four_bits_are_for_the_inner_layers_of_the_language_model(
    variants: dict[str, Path], variant: str
) -> None:
    base = load_model(variants[variant], dtype="fp32")
    assert isinstance(base, Blip2)
    language = (
        replace(base.config.language, d_model=GROUP, num_layers=4)
        if isinstance(base.config.language, T5Config)
        else replace(base.config.language, hidden_size=GROUP, num_hidden_layers=4)
    )
    with torch.device("meta"):
        model = Blip2(replace(base.config, language=language))
    fours = {name for name, _, kind in apply.quantized_layers(model, "int4") if kind is Int4Weight}
    stacks = {".".join(name.split(".")[: 3 if variant == "opt" else 4]) for name in fours}
    inner = {"opt": ["language.layers.1", "language.layers.2"]}.get(
        variant, ["language.encoder.layers.1", "language.encoder.layers.2", "language.decoder.layers.1"]
    )
    assert stacks == set(inner)
    assert not any(kind is Int4Weight for _, _, kind in apply.quantized_layers(model, "int8"))


def test_the_default_model_writes_nearly_the_same_in_eight_bits() -> None:
    exact, quantized = blip2.load(), blip2.load(quantize="int8")
    # pictures of what it knows: of others every caption is about as likely as the next
    images = sorted(path for path in EXAMPLES.glob("*.[jp][pn]g") if path.stem != "cat-photograph")
    assert len(images) == 8
    pairs = list(zip(quantized.caption(images), exact.caption(images), strict=True))
    same = [(mine, theirs) for mine, theirs in pairs if mine == theirs]
    assert len(same) >= 7  # two captions may be all but equally likely
    assert all(abs(mine.score - theirs.score) < 0.05 for mine, theirs in same)


@pytest.mark.skipif(not cpu_has_bf16(), reason="weights are packed where the processor has bf16")
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_quantized_is_packed_in_bf16_unless_another_dtype_is_given(mode: Mode) -> None:
    for dtype, expected in ((None, torch.bfloat16), ("fp32", torch.float32)):
        first = blip2.load(quantize=mode, dtype=dtype).model.vision.layers[0]
        assert {layer.weight.dtype for layer in (first.mlp.fc1, first.mlp.fc2)} == {expected}
        with torch.inference_mode():
            assert first(drawn(1, 65, 192)).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_model_in_fp16_and_its_copy_write_the_same(mode: Mode) -> None:
    model, image = blip2.load(quantize=mode, dtype="fp16"), EXAMPLES / "rose.jpg"
    caption = model.caption(image)
    assert "rose" in caption
    if mode == "int8":
        encoder = model.model.vision
        pixels = torch.rand(1, 3, 128, 128)
        with torch.inference_mode():
            assert torch.equal(copy.deepcopy(encoder)(pixels), encoder(pixels))


@pytest.mark.parametrize("mode", MODES)
def test_an_image_gets_the_same_caption_alone_and_in_a_batch(mode: Mode) -> None:
    model = blip2.load(quantize=mode)
    images = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".jpg", ".png"))[:4]
    assert model.caption(images, max_new_tokens=8) == [
        model.caption(image, max_new_tokens=8) for image in images
    ]


def test_a_model_runs_in_eight_bits_where_no_kernel_for_them_is(
    generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(load_model(generator_folder, dtype="fp32"))
    monkeypatch.setattr(linear, "max_activation_level", lambda: 0)
    model = load_model(generator_folder, quantize="int8")
    assert not any(isinstance(part, Int8ImageLinear) for part in model.modules())
    ours = outputs(model)
    assert (ours - expected).norm() / expected.norm() < 0.3


def test_a_model_quantized_while_loading_is_the_model_quantized_afterwards(generator_folder: Path) -> None:
    loaded = load_model(generator_folder, quantize="int8")
    later = load_model(generator_folder, dtype="fp32")
    apply.quantize_model(later, "int8")
    assert torch.equal(outputs(loaded), outputs(later))


def test_bad_modes_are_refused(generator_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize is 'int3'; choose one of int8, int4"):
        blip2.load(generator_folder, quantize="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode 'int3' is not known"):
        quantize_checkpoint(generator_folder, tmp_path / "new", "int3")  # type: ignore[arg-type]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["opt", "opt-untied", "t5", "matcher-itg"])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantized_folder_is_the_quantized_model(
    variants: dict[str, Path], variant: str, mode: Mode, tmp_path: Path
) -> None:
    written = quantize_checkpoint(variants[variant], tmp_path / "new", mode)
    assert written.written_bytes < written.read_bytes
    assert torch.equal(
        outputs(load_model(written.folder)), outputs(load_model(variants[variant], quantize=mode))
    )
    assert count_parameters(written.folder) == count_parameters(variants[variant])


def test_a_quantized_folder_converts_to_the_floats_it_stands_for(
    variants: dict[str, Path], tmp_path: Path
) -> None:
    quantize_checkpoint(variants["opt"], tmp_path / "small", "int8")
    convert(tmp_path / "small", tmp_path / "hf", to="hf")
    quantized, kept = (f"vision_model.encoder.layers.{layer}.mlp.fc1.weight" for layer in (1, 0))
    with open_tensors(tmp_path / "hf") as tensors, open_tensors(variants["opt"]) as before:
        assert set(tensors) == set(before)
        assert torch.equal(tensors[quantized], Int8Weight.of(before[quantized]).float())
        assert torch.equal(tensors[kept].float(), before[kept].float())


def test_what_is_quantized_is_not_quantized_again_nor_saved_as_floats(
    generator_folder: Path, tmp_path: Path
) -> None:
    small = quantize_checkpoint(generator_folder, tmp_path / "small", "int8").folder
    with pytest.raises(CheckpointError, match="quantized to int8 already"):
        quantize_checkpoint(small, tmp_path / "smaller", "int4")
    with pytest.raises(CheckpointError, match="quantized"):
        save_model(load_model(small), tmp_path / "again")
    assert not (tmp_path / "smaller").exists() and not (tmp_path / "again").exists()


def test_four_bits_cannot_be_loaded_as_eight(variants: dict[str, Path], tmp_path: Path) -> None:
    base = load_model(variants["opt"], dtype="fp32")
    assert isinstance(base, Blip2)
    wide = replace(base.config.language, hidden_size=GROUP, ffn_dim=GROUP, num_hidden_layers=3)
    model = Blip2(replace(base.config, language=wide))  # type: ignore[type-var]
    for parameter in model.parameters():
        parameter.data = 0.1 * drawn(*parameter.shape)
    folder = save_model(model.eval(), tmp_path / "wide", tokenizer=variants["opt"])
    small = quantize_checkpoint(folder, tmp_path / "small", "int4").folder
    assert any(isinstance(part, Int4Linear) for part in load_model(small).modules())
    with pytest.raises(CheckpointError, match="stored quantized in another way"):
        load_model(small, quantize="int8")


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_parts_that_do_not_fit_are_named(generator_folder: Path, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    small = quantize_checkpoint(generator_folder, tmp_path / "small", "int8").folder
    tensors = load_file(small / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc2.weight_scale"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(small)
