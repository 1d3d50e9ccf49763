"""Messages on the command line speak of its options, and name the remedy that this door has."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from running import Run

from blip2.commands.options import as_typed
from blip2.generation.options import GenerationOptions

# name=value, as Python's keywords are written, names of options, words of its calls
OPTIONS = "|".join(field.name for field in fields(GenerationOptions) if "_" in field.name)
PYTHON = re.compile(
    rf"(?<![\w-])[a-z]+(_[a-z]+)*=|blip2\.load|\b(True|False|None|{OPTIONS})\b|Error\b|Traceback"
)
MAKE = re.compile(r"\bmake [a-z]+-?[a-z]*\b")

# A command line, and what its message says. W: a model that writes, M: one that matches; a.png and b.png are images.
WRONG = """
caption a.png --model W --match | no matcher; leave out --match
caption a.png --model W --keep-best --num-captions 2 | --model itm
ask a.png what? --model W --match | no matcher
match a.png x --model W | --model itm
embed a.png --model W | --model itm
caption a.png --model M | one that writes
chat a.png --model M | one that writes
explain a.png -o o.png --model M | one that writes
caption a.png --beams 3 --temperature 0.5 | --do-sample needs --num-beams 1, got --num-beams 3
ask a.png what? --beams 2 --sample | sample or search
chat a.png --top-k 5 --beams 2 | --do-sample needs
caption a.png --beams 0 | --num-beams must be a whole number, 1 or more; got 0
caption a.png --num-captions 9 | --num-return-sequences 9 is more than --num-beams 5
caption a.png --sample --num-captions 0 | --num-return-sequences must
caption a.png --min-new-tokens 9 --max-new-tokens 3 | --min-new-tokens 9 is above --max-new-tokens 3
caption a.png --max-new-tokens 0 | --max-new-tokens must
caption a.png --max-new-tokens 9999 --model W | lower --max-new-tokens
chat a.png --max-new-tokens 9999 --model W | lower --max-new-tokens
caption a.png --temperature nan | --temperature must be a number
caption a.png --top-p 1.5 | --top-p must
caption a.png --seed -1 | --seed must
caption a.png --length-penalty 1e9 | --length-penalty must
caption a.png --repetition-penalty 0 | --repetition-penalty must
caption a.png --no-repeat-ngram-size -2 | --no-repeat-ngram-size must
caption a.png --eos-token-id -1 | --eos-token-id must
caption a.png --stream --beams 2 | leave out --num-beams
caption a.png --stream --num-captions 2 | leave out --num-return-sequences
caption a.png --revision v1 | --revision 'v1' is for models on the Hugging Face Hub
caption a.png --revision v1 --model W | --revision 'v1' is for models on the Hub
caption a.png --model blip2:pretrain_vitL | --vision 'clip_vit_L.pth'
caption a.png --model blip2_t5:pretrain_flant5xl_vitL | --vision 'clip_vit_L.pth' and --language 'google/flan-t5-xl'
inspect lacks.pth | give it as --vision
convert lacks.pth new --to hf | give it as --language
doctor lacks.pth | give it as --vision
convert W new --to lavis --shard-size 1GB | leave out --shard-size
convert W new --to hf --shard-size 0 | above 0
explain a.png -o o.png --model W --quantize int8 | without --quantize
caption a.png --device tpu | choose auto, cpu
caption a.png --out o.jsonl --sample | needs --seed
eval scenes --data . | default_model/make_scenes.py
eval default --data . | easy-vqa
ask a.png b.png --model W | QUESTION "b.png" is the name of a file here
ask a.png ./d --model W | QUESTION "./d" is the name of a folder here
match a.png b.png rose --model M | TEXT "b.png" is the name of a file here: give several images as a folder
match a.png rose d/ --model M | TEXT "d/" is the name of a folder here
match a.png rose link --model M | TEXT "link" is the name of a file here
match a.png ABSOLUTE --model M | is the name of a file here
match a.png c.png rose --model M | TEXT "c.png" looks like the name of an image: give several
match a.png https://x.org/b --model M | TEXT "https://x.org/b" looks like the name of an image
match a.png no/Photo.JPEG --model M | TEXT "no/Photo.JPEG" looks like the name of an image
ask a.png s3://x/c.webp --model W | QUESTION "s3://x/c.webp" looks like the name of an image: it comes last
ask a.png QUESTION\udce9 --out o.csv --model W | the QUESTION holds bytes that are no Unicode
caption a.png --batch-size 99999999999999999999 | --batch-size must be a whole number from 1 to
embed a.png --limit 0 --model M | --limit must be a whole number from 1
explain a.png -o a.png --model W | -o a.png: this is the image itself; name another file
explain a.png -o ./d/../a.png --model W | this is the image itself
explain b.png -o link.png --model W | -o link.png: this is the image itself
"""
CASES = [line.split(" | ") for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("command", "says"), CASES)
def test_messages_fit_the_command_line(
    command: str, says: str, run: Run, generator_folder: Path, matcher_folder: Path, pictures: list[Path]
) -> None:
    Path("d").mkdir()
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(pictures[0].read_bytes())
    Path("link").symlink_to("b.png")
    Path("link.png").symlink_to("b.png")
    if "lacks.pth" in command:
        import torch

        shapes = {"query_tokens": (1, 4, 24), "ln_vision.weight": (32,), "opt_proj.weight": (32, 24)}
        torch.save({"model": {name: torch.zeros(shape) for name, shape in shapes.items()}}, "lacks.pth")
    names = {"W": generator_folder, "M": matcher_folder, "ABSOLUTE": Path("a.png").absolute()}
    done = run(*(names.get(word, word) for word in command.split()), stdin=b"what?\n")
    assert done.status in (1, 2)
    (message,) = [line for line in (*done.lines, *done.err.splitlines()) if says in line]
    for other in names.values():
        message = message.replace(str(other), "")
    assert not PYTHON.search(message) and not MAKE.search(message)


def test_options_are_named_as_they_are_typed() -> None:
    flags = {"num_beams": "--num-beams", "seed": "--seed", "model": "--model", "quantize": "--quantize"}
    for message, typed in {
        "give num_beams=4, or seed='x y'.": "give --num-beams 4, or --seed 'x y'.",
        "leave out num_beams and seed=": "leave out --num-beams and --seed",
        "seed must be whole; the model must not": "--seed must be whole; the model must not",
        "without quantize=; num_beams.": "without --quantize; --num-beams.",
        "this model: seed and model": "this model: seed and model",
        "quantize=True": "--quantize",
        "num_beams=-1.5e-3, model=opt-2.7b": "--num-beams -1.5e-3, --model opt-2.7b",
    }.items():
        assert as_typed(message, flags) == typed
    for name in (
        "num_beams.jpg", "d/num_beams", "num_beams/d", "num_beams-1", "my_num_beams", "http://x/?seed=3&model=y",
        "x.seed=1", "--model seed", "matcher=", "seed=1/a.jpg", "seed=/a.jpg", "d/model=x/num_beams",
    ):  # fmt: skip
        assert as_typed(name, flags) == name
    assert as_typed("num_beams=1", {}) == "num_beams=1"


@pytest.mark.parametrize("limit", ["nope=3", "num_beams=0", "num_beams=x", "beams=3"])
def test_limits_of_the_server_are_named_as_they_are_typed(limit: str, run: Run) -> None:
    done = run("serve", "--limit", limit)
    assert done.status == 2 and done.err.startswith("blip2: ") and "num_beams" in done.err
    assert "--num-beams" not in done.err.replace(limit, "")


@pytest.mark.parametrize("text", ["", " \t", "\u200b", "\x07\x1b", "\u3164"])
def test_empty_texts_are_refused(
    text: str, run: Run, generator_folder: Path, matcher_folder: Path, pictures: list[Path]
) -> None:
    image, writes, matches = pictures[0], ["--model", generator_folder], ["--model", matcher_folder]
    Path("q.txt").write_text(f"what?\n{text}\n", encoding="utf-8")
    for command in (
        ["ask", image, text, *writes],
        ["ask", image, text, "--stream", *writes],
        ["ask", image, text, "--out", "o.jsonl", *writes],
        ["match", image, "a cat", text, *matches],
        ["embed", "--text", text, *matches],
        ["explain", image, "-o", "o.png", "--question", text, *writes],
        ["explain", image, "-o", "o.png", "--text", text, *writes],
        ["caption", image, "--questions", "q.txt", *writes],
    ):
        if "--questions" in command and not text.strip():
            continue  # an empty line of a file separates
        done = run(*command)
        assert (done.status, done.out) == (2, b"")
        assert re.fullmatch(
            r"blip2: .*(is empty|holds only '.*'; write some words|is empty; write some words)\n", done.err
        )
    assert not Path("o.png").exists() and not Path("o.jsonl").exists()


EMPTY = """
caption ! | ask ! what? | chat ! | match ! x | embed ! | explain ! -o o.png | explain a.png -o ! | caption a.png --out !
caption a.png --model ! | caption a.png --questions ! | caption a.png --include ! | caption a.png --limit !
inspect ! | doctor ! | convert ! x --to hf | convert W ! --to hf | quantize W ! | eval captions --data ! | bench !
eval captions --data d --answers ! | serve --api-key-file ! | serve --host !
"""


@pytest.mark.parametrize("command", re.split(r"[|\n]", EMPTY.strip()))
def test_an_empty_argument_is_no_path(command: str, run: Run) -> None:
    done = run(*("" if word == "!" else word for word in command.split()))
    assert (done.status, done.out) == (2, b"") and done.err.endswith(": it is empty\n")


URLS = ["https://example.org//a/b.jpg?x=1&seed=3", "HTTP://x.y/z", "s3://bucket/a.png", "file:///a.jpg"]


@pytest.mark.parametrize("url", [*URLS, "data:image/png;base64,iVBORw0KGgo="])
def test_urls_are_refused_whole(
    url: str, run: Run, generator_folder: Path, matcher_folder: Path, pictures: list[Path]
) -> None:
    Path("l.txt").write_text(f"{pictures[0]}\n{url}\n")
    advice = "write the path alone" if url.startswith("file:") else "URLs are not fetched here; download"
    writes, matches = ["--model", generator_folder], ["--model", matcher_folder]
    for command in (
        ["caption", url, pictures[0], *writes],
        ["caption", "--stream", url, *writes],
        ["caption", url, "--out", "o.csv", *writes],
        ["ask", url, "what?", *writes],
        ["chat", url, *writes],
        ["explain", url, "-o", "o.png", *writes],
        ["match", url, "a cat", *matches],
        ["embed", url, *matches],
        *([["caption", "l.txt", *writes]] if "://" in url else []),
    ):
        done = run(*command)
        assert done.status == 1 + ("--out" in command)
        said = done.err or done.out.decode()
        assert f"{url}: no such file; {advice}" in said and said.count("\n") == 1
        assert len(done.lines) == (pictures[0] in command or "l.txt" in command or "embed" in command)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_an_explanation_takes_the_place_of_files_alone(
    run: Run, generator_folder: Path, pictures: list[Path]
) -> None:
    command = ["explain", pictures[0], "--text", "a cat", "--model", generator_folder, "-o"]
    Path("old.png").write_bytes(b"old")
    Path("link.jpg").symlink_to("old.png")
    assert run(*command, "link.jpg").status == 0 and Path("link.jpg").is_symlink()
    assert Path("old.png").read_bytes().startswith(b"\xff\xd8")
    Path("d.png").mkdir()
    Path("gone.webp").symlink_to("nowhere/x.webp")
    os.mkfifo("pipe.png")
    for name in ("d.png", "gone.webp", "pipe.png"):
        done = run(*command, name)
        assert done.status == 2 and f"{name} is " in done.err


def test_the_limit_of_pixels_is_that_of_every_command(
    run: Run, generator_folder: Path, matcher_folder: Path
) -> None:
    for name, side in (("small.png", 40), ("large.png", 60)):
        Image.new("RGB", (side, side), "red").save(name)
    writes, matches = ["--model", generator_folder], ["--model", matcher_folder]
    for command in (
        ["caption", "small.png", "large.png", *writes],
        ["ask", "small.png", "large.png", "what?", *writes],
        ["caption", "small.png", "large.png", "--out", "-", *writes],
        ["match", "*.png", "a cat", *matches],
        ["embed", "small.png", "large.png", *matches],
    ):
        done = run(*command, "--max-pixels", 2500)
        said = done.out.decode() + done.err
        assert done.status == 1 and "large.png: 60x60 px is 3,600 pixels, the limit is 2,500" in said
        assert "small.png" in done.out.decode()
