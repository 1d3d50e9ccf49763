"""Models that read images through a stem, at every door: it runs once a picture, travels, and changes with nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_stem import IMAGE_PX, ORIGIN, tiny_processor, with_stem
from torch import Tensor, nn

import blip2
from blip2.bulk.describe import decoding, fingerprint, make_captioner
from blip2.checkpoint import CheckpointError, convert, inspect, load_model, quantize_checkpoint, save_model
from blip2.checkpoint.load import load_processors
from blip2.cli import main
from blip2.data.loader import DecoderBatches, ExampleBatches
from blip2.data.sources import Sample
from blip2.doctor import examine_machine, examine_models, report_lines
from blip2.images import ImageProcessor, load_image, normalized_pixels, process, to_pixels
from blip2.loading import load_components
from blip2.modeling.blip2 import Blip2
from blip2.registry import describe_stem, folder_model
from blip2.results import EncodedImage
from blip2.stemfiles import STEM_FILE, STEM_LICENSE
from blip2.text import Tokenizer
from blip2.train import FitOptions, fit, plots
from blip2.train.tasks import Stage2


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, generator_folder: Path, matcher_folder: Path
) -> tuple[Path, Path]:
    """A model with its stem, and a matcher that shares it."""
    base = tmp_path_factory.mktemp("stem")
    processor = tiny_processor(base / "made")
    generator = with_stem(generator_folder, base / "model", processor)
    return generator, with_stem(matcher_folder, base / "matcher", processor, beside="model")


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> blip2.Predictor:
    return blip2.load(folders[0], device="cpu", matcher=folders[1])


@pytest.fixture
def rows(model: blip2.Predictor) -> Iterator[list[int]]:
    """How many pictures the stem has read at a time."""
    counts: list[int] = []
    stem = model.generator.image_processor.stem
    assert stem is not None
    hook = stem.network.register_forward_hook(lambda _, args, out: counts.append(len(out)))
    yield counts
    hook.remove()


def seen(model: blip2.Predictor, path: Path) -> Tensor:
    """What the image encoder gets of a picture, in plain steps."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    pixels = (
        torch.tensor(list(small.tobytes())).view(1, IMAGE_PX, IMAGE_PX, 3).permute(0, 3, 1, 2) - 127
    ) / 128
    stem = model.generator.image_processor.stem
    assert stem is not None
    folded: Tensor = stem.network(pixels)
    return folded


# --- captions, answers, matches ------------------------------------------------------------------------------------


def test_the_model_sees_what_the_stem_makes(model: blip2.Predictor, pictures: list[Path]) -> None:
    images = [load_image(path) for path in pictures]
    pixels = to_pixels(images, model.generator.image_processor)
    assert pixels.shape == (5, 3, 32, 32)
    for path, row in zip(pictures, pixels, strict=True):
        torch.testing.assert_close(row[None], seen(model, path), rtol=1e-3, atol=1e-3)
    encoded = model.encode(pictures)
    with torch.inference_mode():
        prefixes = model.model.embed_image(pixels)
    torch.testing.assert_close(torch.cat([one.prefix for one in encoded]), prefixes, rtol=1e-3, atol=1e-3)
    assert len({model.caption(path) for path in pictures}) > 1


def test_alone_and_in_batches(model: blip2.Predictor, pictures: list[Path], rows: list[int]) -> None:
    together = model.caption(pictures, batch_size=3)
    assert rows == [3, 2]
    assert together == [model.caption(path) for path in pictures]
    answers = model.ask(pictures, "what is it?", batch_size=5)
    assert rows == [3, 2, *[1] * 5, 5]
    assert answers == [model.ask(path, "what is it?") for path in pictures]
    chat = model.chat(pictures[0])
    assert chat.send("what is it?") and rows[-1] == 1


def test_matches_and_embeddings(model: blip2.Predictor, pictures: list[Path], rows: list[int]) -> None:
    texts = ["a cat", "two dogs"]
    table = model.match(pictures, texts, batch_size=5)
    assert rows == [5]
    features = model.matcher.encode_images(torch.cat([seen(model, path) for path in pictures]))
    for row, expected in zip(table, model.matcher.compare(features, texts), strict=True):
        for one, other in zip(row, expected, strict=True):
            assert one.probability == pytest.approx(other.probability, abs=1e-3)
    assert len({round(row[0].similarity, 4) for row in table}) == 5
    torch.testing.assert_close(model.embed(pictures), features.queries, rtol=1e-3, atol=1e-3)


def test_one_network_for_both(model: blip2.Predictor) -> None:
    stems = [part.image_processor.stem for part in (model.generator, model.matcher)]
    assert stems[0] is not None and stems[1] is not None
    assert stems[0].network is stems[1].network


def test_the_digest_tells_one_stem_from_another(
    model: blip2.Predictor, folders: tuple[Path, Path], generator_folder: Path, tmp_path: Path
) -> None:
    other = with_stem(generator_folder, tmp_path / "other", tiny_processor(tmp_path / "made", seed=1))
    copied = with_stem(generator_folder, tmp_path / "copy", model.generator.image_processor)
    assert blip2.load(copied, device="cpu").digest() == model.digest()
    assert blip2.load(other, device="cpu").digest() != model.digest()
    assert fingerprint(model, matcher=True) != fingerprint(
        blip2.load(other, matcher=folders[1]), matcher=True
    )


def test_explanations_show_the_users_picture(
    model: blip2.Predictor, pictures: list[Path], rows: list[int]
) -> None:
    explanation = model.explain(pictures[3])
    assert rows == [1]  # for the caption and for the explanation
    assert explanation.picture.size == load_image(pictures[3]).size
    assert explanation.text == model.caption(pictures[3])
    assert explanation.words[0].heat.shape == (4, 4) and max(w.heat.max() for w in explanation.words) == 1
    answer = model.explain(pictures[3], question="what is it?")
    assert answer.text == model.ask(pictures[3], "what is it?")


# --- many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [[], ["what is it?", "how many?"]])
def test_bulk_reads_each_picture_once_for_both_models(
    model: blip2.Predictor, pictures: list[Path], rows: list[int], questions: list[str]
) -> None:
    describe = make_captioner(lambda: model, {}, match=True, questions=questions)
    images = [load_image(path) for path in pictures]
    described = describe(images)
    assert rows == [5]
    key = "answer" if questions else "caption"
    for image, texts in zip(images, described, strict=True):
        expected = [str(model.ask(image, q)) for q in questions] or [str(model.caption(image))]
        assert [row[key] for row in texts] == expected
        for row in texts:
            assert row["match"] == pytest.approx(model.match(image, row[key]).probability, abs=1e-3)


def test_a_processed_image_is_made_anew_for_another_processor(
    model: blip2.Predictor, pictures: list[Path], rows: list[int]
) -> None:
    own, plain = model.generator.image_processor, ImageProcessor(32)
    processed = process([load_image(path) for path in pictures[:2]], own)
    assert torch.equal(to_pixels(processed, own), torch.stack([one.pixels for one in processed]))
    assert torch.equal(to_pixels(processed, plain), to_pixels([one.image for one in processed], plain))
    assert rows == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_made_as_small_as_the_stem_takes_them(
    folders: tuple[Path, Path], pictures: list[Path], workers: int
) -> None:
    processors = [load_processors(folder)[0] for folder in folders]
    with decoding(*processors, workers=workers) as decode_image:
        small = decode_image(pictures[1].read_bytes())
    assert small.size == (IMAGE_PX, IMAGE_PX)
    whole = load_image(pictures[1])
    assert torch.equal(normalized_pixels([small], processors[0]), normalized_pixels([whole], processors[0]))


def test_the_command_line(
    folders: tuple[Path, Path],
    model: blip2.Predictor,
    pictures: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture, generator, matcher = str(pictures[0]), str(folders[0]), str(folders[1])
    assert main(["caption", picture, "--model", generator]) == 0
    assert capsys.readouterr().out.strip() == model.caption(pictures[0])
    assert main(["match", picture, "a cat", "--model", matcher]) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(
        model.match(pictures[0], "a cat").probability, abs=1e-3
    )
    out = tmp_path / "texts.jsonl"
    assert main(["caption", str(pictures[0].parent), "--model", generator, "-o", str(out), "--quiet"]) == 0
    captions = [json.loads(line)["caption"] for line in out.read_text().splitlines()]
    assert captions == model.caption(pictures)
    capsys.readouterr()

    assert main(["inspect", generator]) == 0
    assert f"images, 64 px, go through {ORIGIN} (0 MiB) first" in capsys.readouterr().out
    assert main(["convert", generator, str(tmp_path / "lavis"), "--to", "lavis"]) != 0
    assert "stem" in capsys.readouterr().err


# --- the stem travels ----------------------------------------------------------------------------------------------


def assert_same(folder: Path, original: Path, picture: Path) -> None:
    """A folder holds a stem of its own, with its licence, and reads pictures as the original does."""
    assert {STEM_FILE, STEM_LICENSE} <= {path.name for path in folder.iterdir()}
    device = torch.device("cpu")
    ours, theirs = (load_components(path, device, None, None) for path in (folder, original))
    assert ours.image_processor == theirs.image_processor and ours.image_processor.stem is not None
    assert ours.image_processor.stem.path == folder.resolve() / STEM_FILE
    pixels = [to_pixels([load_image(picture)], part.image_processor) for part in (ours, theirs)]
    assert torch.equal(*pixels)
    with torch.inference_mode():
        assert torch.equal(*(part.model.vision(pixels[0]) for part in (ours, theirs)))


def test_saving_takes_it_along(
    model: blip2.Predictor, folders: tuple[Path, Path], pictures: list[Path], tmp_path: Path
) -> None:
    for part, source, name in ((model.generator, folders[0], "a"), (model.matcher, folders[1], "b")):
        processor = part.image_processor
        folder = save_model(part.model, tmp_path / name, tokenizer=source, image_processor=processor)
        shutil.move(folder, tmp_path / f"moved-{name}")
        assert_same(tmp_path / f"moved-{name}", source, pictures[0])


@pytest.mark.parametrize("which", [0, 1])
def test_conversion_copies_it_whole(
    folders: tuple[Path, Path], pictures: list[Path], tmp_path: Path, which: int
) -> None:
    conversion = convert(folders[which], tmp_path / "there", to="hf", verify=True)
    assert conversion.verified.endswith("; stem equal")
    assert_same(tmp_path / "there", folders[which], pictures[0])


def test_quantized_models_keep_it(
    folders: tuple[Path, Path], model: blip2.Predictor, pictures: list[Path], tmp_path: Path
) -> None:
    quantize_checkpoint(folders[0], tmp_path / "int8", "int8")
    assert_same_pixels(tmp_path / "int8", folders[0], pictures[0])
    assert blip2.load(tmp_path / "int8").caption(pictures[0])


def assert_same_pixels(folder: Path, original: Path, picture: Path) -> None:
    pixels = [to_pixels([load_image(picture)], load_processors(path)[0]) for path in (folder, original)]
    assert torch.equal(*pixels)


@pytest.mark.parametrize("to", ["lavis", "paddle"])
@pytest.mark.parametrize("which", [0, 1])
def test_other_layouts_refuse_it(folders: tuple[Path, Path], tmp_path: Path, to: Any, which: int) -> None:
    theirs = {"lavis": "LAVIS", "paddle": "Paddle"}[to]
    with pytest.raises(CheckpointError, match=rf"stem \(stem\.safetensors\), which {theirs} does not have"):
        convert(folders[which], tmp_path / "there", to=to)
    assert not (tmp_path / "there").exists()


def test_what_is_told_of_it(folders: tuple[Path, Path]) -> None:
    size = (folders[0] / STEM_FILE).stat().st_size
    inspection = inspect(folders[0])
    assert inspection.problems == () and inspection.stem is not None and inspection.image_px == IMAGE_PX
    assert (inspection.stem.origin, inspection.stem.disk_bytes) == (ORIGIN, size)

    known = folder_model(*folders, name="both")
    assert known.stem == inspection.stem and known.image_px == IMAGE_PX
    assert describe_stem(known.stem) == f"{ORIGIN} (0 MiB)"
    assert known.disk_bytes == size + sum((path / "model.safetensors").stat().st_size for path in folders)

    (checkup,) = examine_models(examine_machine(), str(folders[1]))
    assert checkup.stem == describe_stem(known.stem)
    assert f"    images go through {ORIGIN} (0 MiB) first" in report_lines(examine_machine(), [checkup])
    assert checkup.disk_bytes > size


def test_memory_counts_it(folders: tuple[Path, Path], generator_folder: Path) -> None:
    known, plain = folder_model(folders[0], name="x"), folder_model(generator_folder, name="y")
    assert known.stem is not None
    for dtype in ("fp32", "bf16", "int8", "int4"):
        more = known.memory_bytes(dtype) - plain.memory_bytes(dtype)
        assert 4 * known.stem.parameters < more < 4 * known.stem.parameters + 20 * 2**20


def test_a_missing_stem_is_a_problem_of_the_checkpoint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "model")
    (tmp_path / "model" / STEM_FILE).unlink()
    assert any("stem.safetensors is not there" in problem for problem in inspect(tmp_path / "model").problems)
    with pytest.raises(CheckpointError, match="get all files of one model"):
        blip2.load(tmp_path / "model")


def test_sizes_must_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "model")
    settings = tmp_path / "model" / "preprocessor_config.json"
    raw = json.loads(settings.read_text())
    settings.write_text(json.dumps(raw | {"size": {"height": 128, "width": 128}}))
    with pytest.raises(CheckpointError, match="images are made 64 px, but the image encoder takes 32"):
        blip2.load(tmp_path / "model")


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(folders: tuple[Path, Path], pictures: list[Path]) -> ExampleBatches:
    samples = [Sample(str(i), path, ("a red cat",)) for i, path in enumerate(pictures)]
    return ExampleBatches(samples, load_processors(folders[0])[0], batch_size=2, seed=0)


def test_batches_hold_what_the_stem_makes(batches: ExampleBatches, rows: list[int]) -> None:
    batch = batches[0]
    assert batch.pixels.shape == (2, 3, 32, 32) and rows == [2]
    assert torch.equal(batch.pixels, batches[0].pixels)
    batches.augment = False
    plain = batches[0]
    images = [load_image(example.sample.image) for example in plain.examples]
    assert torch.equal(plain.pixels, to_pixels(images, batches.image_processor))
    assert not torch.allclose(plain.pixels, batch.pixels, atol=0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_leaves_it_as_it_is_and_the_result_takes_it_along(
    folders: tuple[Path, Path],
    batches: ExampleBatches,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(plots, "draw", lambda *_: None)
    trained = load_model(folders[0], dtype="fp32")
    assert isinstance(trained, Blip2)
    data = DecoderBatches(batches, Tokenizer.load(folders[0]))
    result = fit(Stage2(trained), data, FitOptions(steps=2, workers=workers), tmp_path / "run")
    assert result.finished
    processor = batches.image_processor
    folder = save_model(trained, tmp_path / "out", tokenizer=folders[0], image_processor=processor)
    assert load_processors(folder)[0] == processor == load_processors(folders[0])[0]
    before, after = blip2.load(folders[0]), blip2.load(folder)
    assert before.digest() != after.digest()
    one, other = before.encode(pictures[0]), after.encode(pictures[0])
    assert isinstance(one, EncodedImage) and not torch.equal(one.prefix, other.prefix)


def test_no_parameter_of_it_belongs_to_the_model(model: blip2.Predictor) -> None:
    stem = model.generator.image_processor.stem
    assert stem is not None and isinstance(stem.network, nn.Module)
    own = {id(parameter) for parameter in stem.network.parameters()}
    assert own and own.isdisjoint(id(parameter) for parameter in model.model.parameters())
