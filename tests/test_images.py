"""Every way in gives the same pixels; odd images are read as they look; broken ones end in an ImageError."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from blip2.images import CLIP_MEAN, ImageError, ImageProcessor, load_image, random_resized_crop, to_pixels


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth and coloured, different at every corner."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode == "RGB" and np.array_equal(np.asarray(first), np.asarray(second))


# --- every way in ----------------------------------------------------------------------------------------------


def test_every_way_in_gives_the_same_pixels(tmp_path: Path) -> None:
    content = encoded(picture(), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    expected = picture()
    with path.open("rb") as file:
        opened, pixels = Image.open(path), np.asarray(expected)
        for source in (str(path), path, content, file, io.BytesIO(content), opened, pixels):
            assert same(load_image(source), expected), type(source)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "AVIF", "MPO"])
def test_formats(kind: str) -> None:
    if not features.check("avif") and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    content = encoded(picture(), kind)
    assert same(load_image(content), Image.open(io.BytesIO(content)).convert("RGB"))


def test_an_image_from_the_caller_is_left_as_it_is() -> None:
    image = picture()
    image.getexif()[0x0112] = 6
    loaded = load_image(image)
    assert image.size == (40, 30)
    assert loaded is not image
    assert image.getexif()[0x0112] == 6


def test_other_formats_are_refused() -> None:
    for content in (
        encoded(picture(), "ICO"),
        b"%PDF-1.7 and so on",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ):
        with pytest.raises(ImageError, match=r"no image this package can read; supported are JPEG"):
            load_image(content)


def test_pillow_keeps_its_settings() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    load_image(encoded(picture(), "PNG"), max_pixels=10_000)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


# --- odd but valid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = picture()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that turn it away from upright
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        assert same(load_image(content), upright), kind
        assert same(load_image(Image.open(io.BytesIO(content))), upright), kind
        if kind != "TIFF":
            assert same(load_image(content, exif=False), stored), kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_image() -> None:
    content = encoded(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x12\x01")
    assert same(load_image(content), picture())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = picture(4, 4).convert(mode)
    alpha = Image.new("L", (4, 4), 255)
    alpha.putpixel((1, 2), 0)
    alpha.putpixel((2, 2), 128)
    image.putalpha(alpha)
    loaded = load_image(encoded(image, "PNG"))
    below = image.convert("RGB")
    assert loaded.getpixel((1, 2)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) == below.getpixel((0, 0))
    for mixed, colour in zip(loaded.getpixel((2, 2)), below.getpixel((2, 2)), strict=True):
        assert abs(mixed - (colour * 128 + 255 * 127) / 255) <= 1


def test_transparent_colour_of_a_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        loaded = load_image(encoded(image, kind, transparency=1))
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(loaded)[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


def test_grey_of_16_bits_with_a_transparent_value() -> None:
    values = np.array([[0, 5, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), "PNG", transparency=5))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "CMYK", "RGBX", "YCbCr", "HSV", "LAB", "PA", "RGBa", "I;16B"]
)
def test_other_modes(mode: str) -> None:
    image = Image.new("I;16B", (3, 2), 65535) if mode == "I;16B" else picture().convert("RGBA").convert("RGB")
    if mode == "PA":
        image = picture().convert("P").convert("PA")
    elif mode == "RGBa":
        image = picture().convert("RGBA").convert("RGBa")
    elif mode != "I;16B":
        image = image.convert(mode)
    assert image.mode == mode
    assert load_image(image).mode == "RGB"


def test_pixels_without_an_agreed_range_are_refused() -> None:
    with pytest.raises(ImageError, match="pixels of mode 'F' are not supported; save it as RGB"):
        load_image(Image.new("F", (2, 2)))


def test_first_frame_of_an_animation() -> None:
    frames = [picture(seed=seed) for seed in (1, 2, 3)]
    for kind in ("PNG", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert same(load_image(content), frames[0])
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert same(load_image(gif), Image.open(io.BytesIO(gif)).convert("RGB"))


def test_extreme_shapes() -> None:
    for size in ((1, 65000), (65000, 1), (1, 1)):
        loaded = load_image(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"))
        assert loaded.size == size
        assert to_pixels([loaded], ImageProcessor(16)).shape == (1, 3, 16, 16)


# --- refused ---------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (body, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (50_000, 50_000, "too many pixels"),
        (9_000, 9_990, "9000x9990 px is 89,910,000 pixels, the limit is 89,000,000"),
    ],
)
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int, says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=says):
            load_image(png_header(width, height))


def test_the_limit_can_be_lowered() -> None:
    content = encoded(picture(40, 30), "PNG")
    assert load_image(content, max_pixels=1200).size == (40, 30)
    for source in (content, picture(40, 30)):
        with pytest.raises(ImageError, match="40x30 px is 1,200 pixels, the limit is 1,199; make it smaller"):
            load_image(source, max_pixels=1199)


def test_truncated() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF"):
        content = encoded(picture(200, 200), kind)
        with pytest.raises(ImageError, match=r"an image of .* bytes: "):
            load_image(content[: len(content) // 2])


def test_errors_name_the_source(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty.png", tmp_path / "text.jpg", tmp_path / "folder"
    empty.touch()
    text.write_text("no image at all")
    folder.mkdir()
    for source, says in (
        (empty, "empty.png: the file is empty"),
        (text, r"text.jpg: no image this package can read"),
        (folder, "folder is no regular file"),
        (tmp_path / "missing.png", "missing.png: no such file"),
        ("https://example.org/cat.jpg", "https://example.org/cat.jpg: URLs are not fetched here"),
        ("a\0b.png", "is no valid path"),
        (b"", "an image of 0 bytes: the file is empty"),
        (io.StringIO("text"), "must be open for reading bytes"),
        (7, "cannot read an image from a int"),
        (Image.new("RGB", (0, 5)), r"the image is empty \(0x5 px\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\), expected \[height, width, 3\]"),
        (np.zeros((8, 8, 3), np.float32), "holds float32, expected uint8"),
    ):
        with pytest.raises(ImageError, match=says):
            load_image(source)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no regular file"):
        load_image(tmp_path / "pipe.png")


def test_mutated_files_are_read_or_refused() -> None:
    random.seed(0)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    originals = [encoded(picture(24, 18), kind) for kind in kinds]
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(700):
            content = bytearray(originals[number % len(originals)])
            for _ in range(random.choice((1, 2, 8))):
                content[random.randrange(len(content))] = random.randrange(256)
            if random.random() < 0.2:
                del content[random.randrange(len(content)) :]
            try:
                assert load_image(bytes(content), max_pixels=1_000_000).mode == "RGB"
                read += 1
            except ImageError as error:
                assert "\n" not in str(error)
                assert "PIL" not in str(error)
    assert 100 < read < 650


# --- settings --------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


def test_settings_are_read_from_either_file(tmp_path: Path) -> None:
    assert ImageProcessor.load(tmp_path, 364) == ImageProcessor(364)  # none: the model's size
    settings = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3]}
    write(tmp_path, "preprocessor_config.json", settings)
    assert ImageProcessor.load(tmp_path, 364) == ImageProcessor(32, mean=(0.5, 0.4, 0.3))
    write(tmp_path, "processor_config.json", {"processor_class": "Blip2Processor"})
    assert ImageProcessor.load(tmp_path, 364).size == 32
    write(tmp_path, "processor_config.json", {"image_processor": {"size": 48, "resample": 2}})
    assert ImageProcessor.load(tmp_path, 364) == ImageProcessor(48, resample=2)


def test_settings_come_back_as_written() -> None:
    image_processor = ImageProcessor(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2, 0.01)
    assert ImageProcessor.from_dict(json.loads(json.dumps(image_processor.to_dict())), 7) == image_processor


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"do_resize": False}, "do_resize: false"),
        ({"do_center_crop": True}, "do_center_crop: true"),
        ({"size": {"height": 3, "width": 4}}, "equal height and width"),
        ({"size": {"shortest_edge": 4}}, "equal height and width"),
        ({"size": "large"}, "size 'large', expected 1 to 16384"),
        ({"size": 10**6}, "size 1000000, expected 1 to 16384"),
        ({"resample": 9}, "resample 9, expected 0 to 5"),
        ({"rescale_factor": "1/255"}, "rescale_factor '1/255'"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\], expected three numbers"),
        ({"image_std": [0, 1, 1]}, "none may be 0"),
    ],
)
def test_settings_that_cannot_be_followed(raw: dict[str, object], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        ImageProcessor.from_dict(raw, 224)


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ImageError, match=r"preprocessor_config.json is no valid JSON"):
        ImageProcessor.load(tmp_path, 224)


# --- pixels ----------------------------------------------------------------------------------------------------


def test_pixels_of_plain_colours() -> None:
    pixels = to_pixels(
        [Image.new("RGB", (7, 5), (0, 255, 51)), picture()], ImageProcessor(8, std=(1.0, 2.0, 4.0))
    )
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.dtype == torch.float32
    expected = [-CLIP_MEAN[0], (1 - CLIP_MEAN[1]) / 2, (0.2 - CLIP_MEAN[2]) / 4]
    assert pixels[0, :, 3, 3].tolist() == pytest.approx(expected, abs=1e-6)


def test_pixels_need_rgb() -> None:
    with pytest.raises(ImageError, match="mode 'L' arrived"):
        to_pixels([Image.new("L", (3, 3))], ImageProcessor(8))
    with pytest.raises(ImageError, match="no images"):
        to_pixels([], ImageProcessor(8))


# --- the training transform ------------------------------------------------------------------------------------


def test_random_views_repeat_with_their_seed() -> None:
    image = picture(120, 90)
    views = [np.asarray(random_resized_crop(image, 24, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert views[0].shape == (24, 24, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_random_views_cover_the_requested_part_and_are_mirrored_half_of_the_time() -> None:
    # Each pixel's red and green are its place, so a view tells what was cut out.
    places = np.zeros((100, 100, 3), np.uint8)
    places[..., 0], places[..., 1] = np.arange(100)[None, :] * 2, np.arange(100)[:, None] * 2
    rng, image = np.random.default_rng(0), Image.fromarray(places)
    parts, mirrored = [], 0
    for _ in range(200):
        view = np.asarray(random_resized_crop(image, 50, rng)).astype(int) // 2
        mirrored += view[0, 0, 0] > view[0, -1, 0]
        width, height = abs(view[0, -1, 0] - view[0, 0, 0]) + 2, abs(view[-1, 0, 1] - view[0, 0, 1]) + 2
        parts.append(width * height / 10_000)
    assert 70 < mirrored < 130
    assert min(parts) > 0.44
    assert max(parts) < 1.05
    assert 0.68 < np.mean(parts) < 0.8


def test_random_views_of_extreme_shapes() -> None:
    for size in ((1, 500), (500, 1), (1, 1)):
        assert random_resized_crop(Image.new("RGB", size), 8, np.random.default_rng(0)).size == (8, 8)
