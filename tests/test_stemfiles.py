"""The stem's file: where it may be, what is refused, and that equal weights are loaded once."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_stem import IMAGE_PX, ORIGIN, tiny_processor, with_stem

from blip2.checkpoint import CheckpointError, load_processors
from blip2.images import STEM_PROCESSOR, ImageError, ImageProcessor
from blip2.modeling.config import ConfigError
from blip2.stemfiles import STEM_FILE, load_stem, stem_path


@pytest.fixture
def processor(tmp_path: Path) -> ImageProcessor:
    return tiny_processor(tmp_path / "made")


@pytest.fixture
def folder(tmp_path: Path, processor: ImageProcessor, generator_folder: Path) -> Path:
    return with_stem(generator_folder, tmp_path / "model", processor)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))


def test_settings_come_back_as_written(folder: Path, processor: ImageProcessor) -> None:
    loaded, _ = load_processors(folder)
    assert loaded == processor and loaded.to_dict() == processor.to_dict()
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    assert raw["image_processor_type"] == STEM_PROCESSOR and raw["size"] == {"height": 64, "width": 64}
    assert raw["stem"]["file"] == STEM_FILE and raw["stem"]["origin"] == ORIGIN
    assert "make them with blip2" in raw["stem"]["note"]
    assert loaded.size == IMAGE_PX and loaded.pixels_size == IMAGE_PX // 2


def test_a_size_that_is_left_open_is_twice_the_image_encoders(folder: Path) -> None:
    change(folder, size=None)
    assert load_processors(folder)[0].size == IMAGE_PX


def test_equal_weights_are_loaded_once(tmp_path: Path, folder: Path, processor: ImageProcessor) -> None:
    assert processor.stem is not None
    copy = load_stem(folder / STEM_FILE)
    assert copy == processor.stem and copy.network is processor.stem.network
    other = tiny_processor(tmp_path / "other", seed=1)
    assert other.stem is not None and other.stem != processor.stem and other != processor
    assert other.stem.network is not processor.stem.network
    network = weakref.ref(other.stem.network)
    del other
    gc.collect()
    assert network() is None  # nothing keeps it


def test_another_process_reads_it_anew(processor: ImageProcessor) -> None:
    content = pickle.dumps(processor)
    assert len(content) < 1000  # no weights
    assert pickle.loads(content) == processor


@pytest.mark.parametrize(
    "name",
    [
        None,
        3,
        "",
        ".",
        "other.safetensors",
        "sub/stem.safetensors",
        "/tmp/stem.safetensors",
        "../stem.safetensors",
        "../../stem.safetensors",
        "../../up/stem.safetensors",
        "../model/../stem.safetensors",
        "../a\\b/stem.safetensors",
        "../a\0b/stem.safetensors",
        "..\\model\\stem.safetensors",
        "C:/stem.safetensors",
    ],
)
def test_files_elsewhere_are_refused(folder: Path, name: object) -> None:
    change(folder, stem={"file": name})
    with pytest.raises(CheckpointError, match=r"expected 'stem\.safetensors', or '\.\./NAME/stem"):
        load_processors(folder)


def test_settings_that_are_no_table(folder: Path) -> None:
    change(folder, stem=[1])
    with pytest.raises(CheckpointError, match="expected 'stem"):
        load_processors(folder)
    change(folder, stem={"file": STEM_FILE, "origin": "two\nlines"})
    with pytest.raises(CheckpointError, match="the stem's origin"):
        load_processors(folder)


def test_a_folder_beside_it(folder: Path, tmp_path: Path) -> None:
    assert stem_path(folder, {"file": "../made/stem.safetensors"}) == (tmp_path / "made" / STEM_FILE, "")
    (folder / STEM_FILE).unlink()
    change(folder, stem={"file": f"../made/{STEM_FILE}"})
    assert load_processors(folder)[0] == tiny_processor(tmp_path / "again")
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"made/stem\.safetensors is not there, and the model reads im"):
        load_processors(folder)


def test_both_marks_or_neither(folder: Path) -> None:
    change(folder, image_processor_type="BlipImageProcessor")
    with pytest.raises(ImageError, match="both or neither"):
        load_processors(folder)
    change(folder, image_processor_type=STEM_PROCESSOR, stem=None)
    with pytest.raises(ImageError, match="both or neither"):
        load_processors(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    path = folder / STEM_FILE
    tensors, content = load_file(path), path.read_bytes()

    def refused(says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            load_processors(folder)

    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        refused(r"stem\.safetensors")
    save_file(tensors | {"head.bias": torch.full_like(tensors["head.bias"], torch.nan)}, path)
    refused(r"stem\.safetensors: tensor 'head\.bias' holds values that are not finite")
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.bias"}, path)
    refused(r"stem\.safetensors: the stem lacks head\.bias; get the file again")
    save_file(tensors | {"head.bias": tensors["head.bias"].int()}, path)
    refused("'head.bias' is torch.int32, no float of 16 or 32 bits")
    save_file({}, path)
    refused("lacks the tensor first.weight")
    path.unlink()
    refused("is not there")
    path.mkdir()
    refused("is not there")


def test_sizes_that_do_not_fit(folder: Path) -> None:
    change(folder, size={"height": 60, "width": 60})
    with pytest.raises(ConfigError, match="a multiple of 32 px, not 60"):
        load_processors(folder)
