"""A config.json that lies: every value of it, made something else, gives an error of ours or a model."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import blip2
from blip2.checkpoint import CheckpointError, convert, load_model, open_tensors
from blip2.images import ImageError, ImageProcessor
from blip2.modeling.config import ConfigError, QFormerConfig, read_config
from blip2.text import TextError

LIES = (True, -1, 0, 7, 10**30, 1e30, float("nan"), float("inf"), "x", [], {}, [[1]], [1, "x"], {"a": None})


def places(settings: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every value, sections and what is within them."""
    for name, value in settings.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in places(value))


@pytest.mark.parametrize("to", ["hf", "paddle"])
@pytest.mark.parametrize("variant", ["opt", "t5", "matcher"])
def test_no_value_breaks_out(variant: str, to: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if to == "paddle":
        convert(variants[variant], folder, to="paddle")
    else:
        shutil.copytree(variants[variant], folder)
    honest = json.loads((folder / "config.json").read_text())
    refused = 0
    for number, path in enumerate(places(honest)):
        for lie in LIES[number % 4 :: 4]:  # every lie many times, if not at every place
            settings = json.loads(json.dumps(honest))
            section = settings
            for name in path[:-1]:
                section = section[name]
            section[path[-1]] = lie
            (folder / "config.json").write_text(json.dumps(settings))
            try:
                load_model(folder)
            except (CheckpointError, ConfigError):
                refused += 1
            except Exception as error:
                raise AssertionError(f"{'.'.join(path)} = {lie!r}") from error
    assert refused > 20


@pytest.mark.parametrize("text", ["9" * 5000, '{"model_type": ' + "9" * 5000 + "}", "[" * 100_000, "\ud800"])
def test_no_json_breaks_out(text: str, variants: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(variants["opt"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "model")


def test_depths_are_bounded(variants: dict[str, Path], tmp_path: Path) -> None:
    """So many layers would take for ever to build."""
    folder = shutil.copytree(variants["opt"], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 100_000
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="100000 layers"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("Qformer.bert.encoder.layer.99999999999.output.bias", (3,), "layer '99999999999'"),
        ("Qformer.bert.encoder.layer." + "9" * 500 + ".output.bias", (3,), "has a layer"),
        ("visual_encoder.blocks.5000.norm1.bias", (88,), "layer '5000'"),
        ("visual_encoder.pos_embed", (1, 0, 88), "empty"),
        ("opt_proj.weight", (), "opt_proj|language_projection"),
        ("visual_encoder.blocks.0.attn.v_bias", (9,), "differ in length"),
        ("visual_encoder.blocks.0.attn.qkv.bias", (264,), "two names"),
    ],
)
def test_tensors_that_lie_about_sizes(
    name: str, shape: tuple[int, ...], message: str, variants: dict[str, Path], tmp_path: Path
) -> None:
    """Of a file without settings sizes are derived: none may take for ever, or end in another error than ours."""
    convert(variants["opt"], tmp_path / "lavis", to="lavis")
    (tmp_path / "lavis" / "config.json").unlink()
    file = tmp_path / "lavis" / "model.pth"
    with open_tensors(file) as tensors:
        state = {stored: tensors.copy(stored) for stored in tensors}
    torch.save({"model": state | {name: torch.zeros(shape)}}, file)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_model(file, language=variants["opt"])


# --- numbers -----------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
EPS = ("vision_config.layer_norm_eps", "vision_config.last_norm_eps", "qformer_config.layer_norm_eps")
NO_EPS = (NAN, INF, -INF, -1e-6, 1e-30, 1e-320, 0.5, 1e30, 10**30, -1, "1e-6", True, [1e-6], {"eps": 1e-6})


@pytest.mark.parametrize("value", NO_EPS, ids=str)
@pytest.mark.parametrize("place", [*EPS, "text_config.layer_norm_epsilon"])
def test_norms_are_bounded(place: str, value: object) -> None:
    section, name = place.split(".")
    raw = {"model_type": "blip-2", "text_config": {"model_type": "t5"}}
    raw = {**raw, section: {**(raw.get(section) or {}), name: value}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=f"{place} is .*expected"):
        read_config(raw)


@pytest.mark.parametrize("name", ["layer_norm_eps", "hidden_dropout_prob"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0, 1.5, 1e30])
def test_configs_made_in_python_are_bounded_too(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        QFormerConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e-12, 1e-6, 1e-5, 1e-3])
def test_the_norms_of_models_load(value: float) -> None:
    sections = {"vision_config": {"layer_norm_eps": value}, "qformer_config": {"layer_norm_eps": value}}
    config = read_config({"model_type": "blip-2", **sections})
    assert config.vision.layer_norm_eps == config.qformer.layer_norm_eps == value


NUMBERS = (NAN, INF, -INF, 1e300, -1e300, 256.5, 10**400, True, "0.5", [0.5], {"x": 1})


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("name", ["rescale_factor", "image_mean", "image_std"])
def test_pixels_are_bounded(name: str, value: object) -> None:
    for place in range(1 if name == "rescale_factor" else 3):
        listed: list[object] = [0.5, 0.5, 0.5]
        listed[place] = value
        with pytest.raises(ImageError, match=f"{name} .*expected"):
            ImageProcessor.from_dict({name: value if name == "rescale_factor" else listed}, 224)


@pytest.mark.parametrize("value", [0, -1, -0.0, 1e-9, 1e-320])
@pytest.mark.parametrize("name", ["rescale_factor", "image_std"])
def test_nothing_is_divided_by_next_to_nothing(name: str, value: float) -> None:
    with pytest.raises(ImageError, match=f"{name} .*expected"):
        ImageProcessor.from_dict({name: value if name == "rescale_factor" else [0.5, 0.5, value]}, 224)


SIZES = (-1, 16_385, 10**6, 10**30, 1.5, NAN, "224", [224], True, ["x"] * 50_000)


@pytest.mark.parametrize("form", ["number", "object", "processor"])
@pytest.mark.parametrize("size", SIZES, ids=lambda value: str(value)[:20])
def test_sizes_of_images_are_bounded(size: object, form: str, tmp_path: Path) -> None:
    raw: dict[str, object] = {"size": size if form == "number" else {"height": size, "width": size}}
    name = "preprocessor_config.json"
    if form == "processor":
        raw, name = {"image_processor": raw}, "processor_config.json"
    (tmp_path / name).write_text(json.dumps(raw))
    with pytest.raises(ImageError) as caught:
        ImageProcessor.load(tmp_path, 224)
    assert len(str(caught.value)) < 400


# --- files -------------------------------------------------------------------------------------------------------

TEXTS = {
    "NaN": '{"model_type": "blip-2", "x": NaN}',
    "infinite": '{"x": [-Infinity]}',
    "too large a number": '{"x": 1e999}',
    "digits": '{"x": ' + "9" * 5000 + "}",
    "twice": '{"model_type": "blip-2", "model_type": "blip-2"}',
    "twice within": '{"x": {"y": [{"z": 1, "z": 1}]}}',
    "nested": '{"x":' * 50_000 + "1" + "}" * 50_000,
    "too large": '{"x": "' + "x" * (1 << 20) + '"}',
    "a bomb": '{"x": [' + "[]," * 600_000 + "1]}",
    "cut": '{"x": ',
    "a list": "[]",
}
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", [*FILES, "generation_config.json"])
@pytest.mark.parametrize("text", TEXTS)
def test_files_of_settings(text: str, file: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variants["opt"], tmp_path / "model")
    (folder / file).write_text(TEXTS[text])
    begun = time.process_time()
    with pytest.raises(ValueError, match=file) as caught:
        if file.startswith("generation"):  # not used, but copied
            convert(folder, tmp_path / "new", to="hf")
        else:
            blip2.load(folder, device="cpu")
    assert isinstance(caught.value, CheckpointError | ConfigError | ImageError | TextError)
    assert time.process_time() - begun < 2 and len(str(caught.value)) < 600
    assert not (tmp_path / "new").exists()


LARGE = 2**24  # the largest number that is read at all


@pytest.mark.parametrize(
    ("variant", "place", "value"),
    [
        *((variant, place, value) for variant in ("opt", "t5", "matcher") for place, value in (
            ("vision_config.image_size", 16_384), ("vision_config.hidden_size", LARGE),
            ("vision_config.intermediate_size", LARGE), ("vision_config.num_hidden_layers", 200),
            ("vision_config.num_hidden_layers", 1), ("vision_config.patch_size", 1),
            ("qformer_config.num_hidden_layers", 200), ("qformer_config.intermediate_size", LARGE),
            ("num_query_tokens", LARGE), ("num_query_tokens", 5),
        )),
        *(("opt", f"text_config.{name}", value) for name, value in (
            ("num_hidden_layers", 200), ("ffn_dim", LARGE), ("max_position_embeddings", LARGE),
        )),
        *(("t5", f"text_config.{name}", value) for name, value in (
            ("num_layers", 200), ("num_decoder_layers", 200), ("d_ff", LARGE), ("d_kv", 2**20),
            ("relative_attention_num_buckets", LARGE), ("decoder_start_token_id", LARGE),
            ("decoder_start_token_id", 304), ("decoder_start_token_id", -1),
        )),
        ("opt", "text_config.eos_token_id", [2] * 101),
        ("t5", "text_config.eos_token_id", [1] * 100_000),
        ("matcher", "image_text_hidden_size", LARGE),
        ("matcher", "qformer_config.max_position_embeddings", LARGE),
    ],
)  # fmt: skip
def test_sizes_are_compared_with_the_weights(
    variant: str, place: str, value: object, variants: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(variants[variant], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    *sections, name = place.split(".")
    (settings[sections[0]] if sections else settings)[name] = value
    (folder / "config.json").write_text(json.dumps(settings))
    begun = time.process_time()
    with pytest.raises((CheckpointError, ConfigError)):
        load_model(folder)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("variant", ["opt", "t5", "matcher"])
def test_what_does_not_belong_together(variant: str, variants: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variants[variant], tmp_path / "model")
    blip2.load(folder, device="cpu")
    preprocessor = folder / "preprocessor_config.json"
    honest = preprocessor.read_text()
    preprocessor.write_text(json.dumps({"size": 16_000}))
    with pytest.raises(CheckpointError, match="images are made 16000 px, but the image encoder takes 32"):
        blip2.load(folder, device="cpu")
    preprocessor.write_text(honest)
    words = {f"w{i}": i for i in range(400)} | {"</s>": 400, "[UNK]": 401, "[CLS]": 402, "[SEP]": 403}
    for file in (*folder.glob("*token*"), *folder.glob("vocab*")):
        file.unlink()
    (folder / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(CheckpointError, match=r"the tokenizer gives ids up to 40\d, but the model knows"):
        blip2.load(folder, device="cpu")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_settings_that_never_end(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variants["opt"], tmp_path / "model")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        load_model(folder)
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="JSON of 1,099,511,627,776 bytes"):
        load_model(folder)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 5000])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(CheckpointError, match="no valid path"):
        load_model(path)
