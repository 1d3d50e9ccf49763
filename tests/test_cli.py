"""The command line: what is printed where, exit statuses, and that help needs nothing heavy."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blip2
from blip2.cli import main
from blip2.commands.parser import build_parser, subcommands
from blip2.commands.terminal import one_line, print_json
from blip2.generation.options import LENGTH_PENALTY

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture(autouse=True)
def errors_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLIP2_DEBUG", raising=False)


@pytest.fixture
def run(generator_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `blip2` with the tiny model: (exit status, lines of standard output, lines of standard error)."""

    def run(*arguments: object, model: Path | None = generator_folder) -> tuple[int, list[str], list[str]]:
        named = [] if model is None else ["--model", str(model)]
        try:
            status = main([*map(str, arguments), *named])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


SHORT = ("--max-new-tokens", "6")


# --- caption and ask -----------------------------------------------------------------------------------------------


def test_one_image_prints_its_caption_alone(run: Run, generator_folder: Path, pictures: list[Path]) -> None:
    expected = blip2.load(generator_folder).caption(pictures[0], max_new_tokens=6)
    assert run("caption", pictures[0], *SHORT) == (0, [one_line(expected)], [])


def test_several_print_path_and_caption(run: Run, generator_folder: Path, pictures: list[Path]) -> None:
    expected = blip2.load(generator_folder).caption(pictures, max_new_tokens=6)
    status, out, err = run("caption", *pictures, *SHORT, "--batch-size", 2)
    assert (status, err) == (0, [])
    assert out == [f"{path}\t{one_line(text)}" for path, text in zip(pictures, expected)]


def test_json(run: Run, generator_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder)
    image, question = pictures[0], "what is it?"
    for command, name, text in (
        (["caption", image], "caption", model.caption(image)),
        (["ask", image, question], "answer", model.ask(image, question)),
    ):
        status, out, _ = run(*command, "--json")
        assert status == 0
        assert json.loads(out[0]) == {"image": str(image), name: text, "score": pytest.approx(text.score)}


def test_a_bad_file_is_one_error_line_and_the_others_come_out(
    run: Run, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    status, out, err = run(
        "caption", pictures[0], bad, tmp_path / "absent.jpg", pictures[1], *SHORT, "--batch-size", 1
    )

    assert status == 1
    assert [line.split("\t")[0] for line in out] == [str(pictures[0]), str(pictures[1])]
    assert len(err) == 2
    assert str(bad) in err[0]
    assert "no such file" in err[1]

    status, out, err = run("ask", pictures[0], bad, "what is it?", *SHORT, "--json")
    assert (status, err) == (1, [])
    records = [json.loads(line) for line in out]
    assert [sorted(record) for record in records] == [["answer", "image", "score"], ["error", "image"]]
    assert records[1]["image"] == str(bad)


def test_folders_and_patterns(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/2.PNG", "a/1.png", "a/b/3.png"):
        (tmp_path / name).write_bytes(pictures[0].read_bytes())
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()

    def paths(*arguments: object) -> list[str]:
        return [
            Path(line.split("\t")[0]).relative_to(tmp_path).as_posix()
            for line in run("caption", *arguments, *SHORT)[1]
        ]

    assert paths(tmp_path / "a") == ["a/1.png", "a/2.PNG", "a/b/3.png"]
    assert paths(tmp_path / "a" / "*.*g", tmp_path / "a" / "b") == ["a/1.png", "a/b/3.png"]
    assert paths(tmp_path / "**" / "*.png") == ["a/1.png", "a/b/3.png"]
    (tmp_path / "list.txt").touch()
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    sources = [tmp_path / name for name in ("empty", "*.gif", "list.txt", "x.csv")]
    status, out, err = run("caption", *sources)
    assert (status, out) == (1, [])
    assert "the folder holds no images" in err[0]
    assert "no file matches" in err[1]
    assert err[2] == f"blip2: {sources[2]}: it lists no images"
    assert err[3].startswith(f"blip2: {sources[3]}, row 1 names no image; expected one of ")


def test_standard_input(run: Run, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run("caption", pictures[0], *SHORT)[1]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pictures[0].read_bytes())))
    assert run("caption", "-", *SHORT) == (0, alone, [])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"nothing")))
    status, out, err = run("caption", "-", *SHORT)
    assert (status, out, len(err)) == (1, [], 1)


def test_every_decoding_option_arrives(run: Run, generator_folder: Path, pictures: list[Path]) -> None:
    model = blip2.load(generator_folder)
    image = pictures[0]
    for flags, options in (
        (
            "--beams 3 --min-new-tokens 4 --length-penalty -2 --early-stopping true",
            {"num_beams": 3, "min_new_tokens": 4, "length_penalty": -2.0, "early_stopping": True},
        ),
        (
            "--early-stopping never --repetition-penalty 1.7",
            {"early_stopping": "never", "repetition_penalty": 1.7},
        ),
        ("--beams 1 --no-repeat-ngram-size 2", {"num_beams": 1, "no_repeat_ngram_size": 2}),
        ("--sample --seed 4", {"do_sample": True, "seed": 4}),
        (
            "--temperature 2.5 --top-k 9 --seed 3",
            {"do_sample": True, "temperature": 2.5, "top_k": 9, "seed": 3},
        ),
        ("--top-p 0.7 --seed 3", {"do_sample": True, "top_p": 0.7, "seed": 3}),
        ("--eos-token-id 5 --eos-token-id 7", {"eos_token_id": [5, 7]}),
    ):
        _, out, _ = run("caption", image, *SHORT, *flags.split(), "--json")
        assert json.loads(out[0])["caption"] == model.caption(image, max_new_tokens=6, **options), flags
        if "length-penalty" not in flags:
            _, out, _ = run("ask", image, "why?", *SHORT, *flags.split(), "--json")
            assert json.loads(out[0])["answer"] == model.ask(image, "why?", max_new_tokens=6, **options), (
                flags
            )
    _, out, _ = run("caption", image, *SHORT, "--prompt", "the cat", "--json")
    assert json.loads(out[0])["caption"] == model.caption(image, prompt="the cat", max_new_tokens=6)
    for count in (1, 3):
        for name in ("--num-return-sequences", "--num-captions"):
            status, out, _ = run("caption", image, *SHORT, name, count)
            assert (status, len(out)) == (0, count)
            assert out[0] == one_line(model.caption(image, max_new_tokens=6))
    first = model.caption(image, num_beams=1, max_new_tokens=6).tokens[0]
    _, out, _ = run("caption", image, *SHORT, "--beams", 1, "--eos-token-id", first, "--json")
    assert json.loads(out[0])["caption"] == ""


def test_streaming_prints_the_same_text(run: Run, pictures: list[Path]) -> None:
    for command in (["caption", pictures[0]], ["ask", pictures[0], "what?"]):
        status, out, _ = run(*command, "--stream")
        assert status == 0
        assert one_line(" ".join(out)) == run(*command, "--beams", "1")[1][0]
    assert run("caption", "absent.jpg", "--stream")[0] == 1


def test_every_source_comes_to_standard_output_as_into_a_file(
    run: Run, pictures: list[Path], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(pictures[0], "first.png")
    (tmp_path / "l.txt").write_text(f"{pictures[1]}\n{tmp_path / 'absent.png'}\n{pictures[0]}\n")
    (tmp_path / "t.csv").write_text(f"id,image\n7,{pictures[2]}\n")
    sources = [tmp_path / name for name in ("s.tar", "l.txt", "t.csv")]
    options = [*SHORT, "--batch-size", 2, "--num-captions", 2, "--score", "--prefix", "> "]

    status, lines, _ = run("caption", *sources, *options, "--json")
    assert run("caption", *sources, *options, "--out", tmp_path / "o.jsonl", "--quiet")[0] == status == 1
    rows = [json.loads(line) for line in lines]
    names = [tmp_path / "s.tar" / "first.png", pictures[1], tmp_path / "absent.png", pictures[0], pictures[2]]
    assert [row["image"] for row in rows] == [str(n) for n in names for _ in range(1 + (n != names[2]))]
    for row, line in zip(rows, (tmp_path / "o.jsonl").read_text().splitlines(), strict=True):
        written = json.loads(line)
        written.pop("hash", None)
        assert [*written] == [*row] and written.get("caption") == row.get("caption")
        assert written.get("logprob", 0) == pytest.approx(row.get("logprob", 0), rel=1e-3)

    status, lines, _ = run("caption", pictures[0].parent, *SHORT, "--shard", "2/3", "--limit", 5)
    assert [line.split("\t")[0] for line in lines] == [str(pictures[1]), str(pictures[4])]
    status, (line,), _ = run("caption", *sources, *SHORT, "--limit", 1, "--score")
    assert status == 0 and re.fullmatch(r".*\t-[0-9]+\.[0-9]{4}", line)
    status, (line,), _ = run("caption", *sources, "--dry-run")
    assert status == 0 and "5 inputs: about" in line and "nothing was written" in line
    (tmp_path / "q.txt").write_text("what?\nwhy?\n")
    status, lines, _ = run("caption", pictures[0], *SHORT, "--questions", tmp_path / "q.txt")
    assert [line.split("\t")[0] for line in lines] == ["what?", "why?"]


def test_answers_go_into_files_too(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    expected = [json.loads(line) for line in run("ask", *pictures[:2], "what?", *SHORT, "--json")[1]]
    assert run("ask", *pictures[:2], "what?", *SHORT, "-o", out, "--quiet")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]
    assert {row["question"] for row in rows} == {"what?"}


def test_the_environment_names_the_model_of_texts(
    run: Run, generator_folder: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("caption", pictures[0], *SHORT)[1]
    monkeypatch.setenv("BLIP2_MODEL", str(generator_folder))
    assert run("caption", pictures[0], *SHORT, model=None)[1] == expected
    assert run("caption", pictures[0], *SHORT, "--out", tmp_path / "o.csv", "--quiet", model=None)[0] == 0
    assert run("caption", pictures[0], *SHORT, "--out", tmp_path / "o.csv", "--quiet")[0] == 0  # the same run
    commands = subcommands(build_parser())
    named = [
        name for name, command in commands.items() if command.get_default("model") == str(generator_folder)
    ]
    assert named == ["caption", "ask", "chat", "explain", "serve"]


def test_what_decides_the_texts_of_a_run_is_recorded(run: Run, pictures: list[Path], tmp_path: Path) -> None:
    assert run("caption", pictures[0], "--out", tmp_path / "o.csv", "--quiet", model=None)[0] == 0
    with closing(sqlite3.connect(tmp_path / ".o.csv.blip2" / "state.sqlite")) as database:
        ((value,),) = database.execute("SELECT value FROM settings WHERE name = 'run'")
    recorded = json.loads(value)
    assert len(recorded.pop("weights")) == 16
    assert {name: value for name, value in recorded.items() if value is not None} == {
        "num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 0, "length_penalty": 1.0, "early_stopping": False,
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_return_sequences": 1, "do_sample": False,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "model": "default", "questions": [],
        "score": False, "match": False, "keep_best": False, "format": "csv", "shard": "1/1",
    }  # fmt: skip


# --- the other commands --------------------------------------------------------------------------------------------


def test_chat_reads_lines_from_a_pipe(
    run: Run, generator_folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = blip2.load(generator_folder).chat(pictures[0])
    expected = [chat.send(question, max_new_tokens=6) for question in ("what is it?", "why?")]

    for flags in ([], ["--json"], ["--stream", "--seed", "1"]):
        monkeypatch.setattr(
            sys,
            "stdin",
            io.TextIOWrapper(io.BytesIO(b"what is it?\n\n  why?  \n")),
        )
        status, out, err = run("chat", pictures[0], *SHORT, *flags)
        assert (status, err) == (0, [])
        if "--json" in flags:
            assert [json.loads(line)["answer"] for line in out] == expected
            assert json.loads(out[1])["question"] == "why?"
        elif not flags:
            assert out == [one_line(answer) for answer in expected]
    assert run("chat", "absent.jpg")[0] == 1
    assert run("chat", "-")[0] == 2
    assert "leave out --json and --num-beams" in run("chat", pictures[0], "--stream", "--beams", 2)[2][0]


def test_a_question_that_fails_does_not_end_the_conversation(
    run: Run, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"why? " * 50 + b"\nwhy?\n")))
    status, out, err = run("chat", pictures[0], *SHORT)
    assert (status, len(out), len(err)) == (1, 1, 1)
    assert "positions" in err[0]


def test_match_and_embed(run: Run, matcher_folder: Path, pictures: list[Path]) -> None:
    matcher = blip2.load(matcher_folder)
    texts = ["a red cat", "two dogs"]
    matches = matcher.match(pictures[0], texts)

    status, out, _ = run("match", pictures[0], *texts, model=matcher_folder)
    assert (status, out) == (0, [f"{fit.probability:.4f}\t{text}" for fit, text in zip(matches, texts)])
    status, out, _ = run("match", pictures[0], *texts, "--json", model=matcher_folder)
    assert json.loads(out[1]) == {
        "image": str(pictures[0]),
        "text": "two dogs",
        "probability": pytest.approx(matches[1].probability),
        "similarity": pytest.approx(matches[1].similarity),
    }
    status, out, _ = run("match", pictures[0].parent, texts[0], model=matcher_folder)
    assert [line.split("\t")[0] for line in out] == [str(path) for path in pictures]

    status, out, _ = run("embed", pictures[0], "absent.png", "--text", texts[0], model=matcher_folder)
    records = [json.loads(line) for line in out]
    names = [sorted(record) for record in records]
    assert (status, names) == (1, [["embedding", "text"], ["embedding", "image"], ["error", "image"]])
    assert torch.allclose(torch.tensor(records[1]["embedding"]), matcher.embed(pictures[0]), atol=1e-5)
    assert run("embed", model=matcher_folder)[0] == 2


def test_models_and_doctor(run: Run, generator_folder: Path) -> None:
    status, out, _ = run("models", model=None)
    assert status == 0
    assert any(
        "Salesforce/blip2-opt-6.7b-coco" in line and "7.75 B" in line and "14.9 GiB" in line for line in out
    )
    assert json.loads(run("models", "--json", model=None)[1][-1])["alias"] == "itm-coco"

    status, out, _ = run("doctor", model=None)
    assert (status, out[0]) == (0, "This machine")
    status, out, _ = run("doctor", generator_folder, "--json", model=None)
    assert (status, len(out)) == (0, 2)
    assert json.loads(out[1])["here"]
    assert run("doctor", "opt-2.7b", model=None)[0] == 1  # not in the cache, and the tests are offline
    for name in ("nonesuch", "/nonesuch"):
        status, _, err = run("doctor", name, model=None)
        assert status == 2 and "neither a folder nor a model" in err[0]


def test_inspect(run: Run, generator_folder: Path, tmp_path: Path) -> None:
    status, out, err = run("inspect", generator_folder, model=None)
    assert (status, err) == (0, [])
    assert out[0] == f"{generator_folder}: Hugging Face (safetensors)"
    assert any("image encoder" in line and "float16" in line for line in out)
    status, (line,), _ = run("inspect", generator_folder, "--json", model=None)
    assert (status, json.loads(line)["problems"], json.loads(line)["head"]) == (0, [], "tied")
    (tmp_path / "model.safetensors").write_bytes((generator_folder / "model.safetensors").read_bytes())
    status, out, _ = run("inspect", tmp_path, model=None)
    assert status == 1 and any("WRONG" in line and "no config.json" in line for line in out)
    status, out, (error,) = run("inspect", tmp_path / "nonesuch", model=None)
    assert (status, out) == (2, []) and "no such file or folder" in error


def test_convert(run: Run, generator_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    expected = run("caption", pictures[0], *SHORT)[1]
    status, out, err = run(
        "convert", generator_folder, tmp_path / "paddle", "--to", "paddle", "--verify", model=None
    )
    assert status == 0
    assert "tensors" in out[0] and "bit by bit; outputs for a probe image equal" in out[1]
    assert any("write" in line and "B/s" in line for line in err)  # progress, its rate and the time left
    assert run("caption", pictures[0], *SHORT, model=tmp_path / "paddle")[1] == expected
    status, (line,), err = run(
        "convert", tmp_path / "paddle", tmp_path / "back", "--to", "hf", "--dtype", "smallest-exact",
        "--shard-size", "20KB", "--quiet", "--json", model=None,
    )  # fmt: skip
    assert (status, err) == (0, [])
    assert json.loads(line)["narrowed"] == 0  # all of it is fp16 already
    assert len([*(tmp_path / "back").glob("*.safetensors")]) > 1
    assert run("caption", pictures[0], *SHORT, model=tmp_path / "back")[1] == expected
    wrong = ("--to", "hf", "--shard-size", "2 lots")
    status, _, (error,) = run("convert", generator_folder, tmp_path / "new", *wrong, model=None)
    assert status == 2 and "such as 2GB" in error


def test_default_is_a_name_for_every_command(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("inspect", "default", model=None)
    assert status == 0 and "assets/default: Hugging Face" in out[0]
    for command in (["convert", "--to", "paddle"], ["quantize", "--to", "int8"]):
        folder = tmp_path / command[0]
        assert run(command[0], "default", folder, *command[1:], "--quiet", model=None)[0] == 0
        assert run("inspect", folder, model=None)[0] == 0


def test_what_is_printed_does_not_steer_the_terminal() -> None:
    assert one_line("a\x1b[31mred\tcat\r\non  a\u2028Bär \x07") == "a [31mred cat on a Bär"


def test_json_of_a_name_that_is_no_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")
    print_json({"image": name})
    line = capsys.readouterr().out
    assert line == '{"image": "caf\\udce9 ü.png"}\n'
    assert json.loads(line)["image"] == name


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["caption"], "IMAGE"),
        (["capton", "x.jpg"], "invalid choice"),
        (["caption", "x.jpg", "--beam-size", "3"], "unrecognized"),
        (["caption", "x.jpg", "--beam", "3"], "unrecognized"),
        (["caption", "x.jpg", "--beams", "0"], "--num-beams"),
        (["caption", "x.jpg", "--beams", "2", "--temperature", "0.5"], "--do-sample"),
        (["caption", "x.jpg", "--min-new-tokens", "50"], "--min-new-tokens"),
        (["caption", "x.jpg", "y.jpg", "--stream"], "--stream"),
        (["caption", "x.jpg", "--stream", "--beams", "2"], "--stream"),
        (["caption", "x.jpg", "--batch-size", "0"], "--batch-size"),
        (["ask", "x.jpg"], "QUESTION"),
    ],
)
def test_wrong_usage_is_status_2(run: Run, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments, model=None) if len(arguments) < 2 else run(*arguments)
    assert (status, out) == (2, [])
    assert says in err[-1]
    assert not any("Traceback" in line for line in err)


def test_the_word_that_was_meant(run: Run) -> None:
    for arguments, meant in (
        (["capton", "x.jpg"], "caption"),
        (["--verson"], "--version"),
        (["caption", "x.jpg", "--formt", "csv"], "--format"),
        (["caption", "x.jpg", "--format", "cvs"], "csv"),
        (["eval", "easyvaq"], "easyvqa"),
    ):
        status, out, err = run(*arguments, model=None)
        assert (status, out) == (2, []) and err[-1].endswith(f"; did you mean {meant}?")
    assert "did you mean" not in run("zzzzzz", model=None)[2][-1]


def test_no_model_is_one_line_and_status_2(
    run: Run, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nonesuch", "Salesforce/blip2-opt-2.7b"):
        status, out, err = run("caption", pictures[0], model=Path(name))
        assert (status, out, len(err)) == (2, [], 1)
        assert name in err[0]
    monkeypatch.setenv("BLIP2_DEBUG", "1")
    with pytest.raises(ValueError, match="nonesuch"):
        run("caption", pictures[0], model=Path("nonesuch"))


# --- help ----------------------------------------------------------------------------------------------------------


def test_help_teaches(run: Run) -> None:
    commands = subcommands(build_parser())
    assert " ".join(commands) == (
        "caption ask chat match embed eval explain serve inspect convert quantize bench models doctor completion"
    )
    for name in commands:
        status, out, _ = run(name, "--help", model=None)
        assert status == 0
        assert any(line.startswith(f"  blip2 {name}") for line in out)


def test_alone_it_prints_its_help(run: Run) -> None:
    assert run(model=None) == run("--help", model=None)
    assert run(model=None)[0] == 0


def test_every_decoding_option_has_an_argument() -> None:
    for name, kind in (("caption", "caption"), ("ask", "answer"), ("chat", "answer")):
        actions = {action.dest: action for action in subcommands(build_parser())[name]._actions}
        for field in fields(blip2.GenerationOptions):
            if (name, field.name) != ("chat", "num_return_sequences"):
                assert f"--{field.name.replace('_', '-')}" in actions[field.name].option_strings
                assert actions[field.name].default is None
        assert f"(default: {LENGTH_PENALTY[kind]})" in str(actions["length_penalty"].help)


def test_the_output_has_one_name() -> None:
    commands = subcommands(build_parser())
    outputs = {
        name: action.option_strings
        for name, command in commands.items()
        for action in command._actions
        if {"-o", "--out"} & {*action.option_strings}
    }
    assert outputs == {name: ["-o", "--out"] for name in ("caption", "ask", "eval", "explain")}


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_in_a_real_shell(
    shell: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    script = tmp_path / "script"
    script.write_text("\n".join(run("completion", shell, model=None)[1]) + "\n")
    (tmp_path / "a photo.jpg").touch()
    command = tmp_path / "bin" / "blip2"  # scripts call it for the words
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m blip2 "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    for typed, completed in (
        ("blip2 capt", "caption"),
        ("blip2 caption x.jpg --exis", "--existing"),
        ("blip2 caption x.jpg --format par", "parquet"),
        ("blip2 eval vqa", "vqav2"),
        ("blip2 caption a", "a\\ photo.jpg"),
    ):
        if shell == "fish":
            program = f"source {script}; complete -C '{typed}'"
            answer = subprocess.run(
                ["fish", "--no-config", "-c", program], cwd=tmp_path, capture_output=True, text=True
            )
            assert answer.stdout.split("\t")[0].rstrip("\n") in (completed, completed.replace("\\", "")), (
                answer
            )
        else:
            assert _type(shell, f"cd {tmp_path}; {_SETUP[shell]} {script}", typed, f"{completed} ")


def test_completion_of_a_value_that_bash_splits_off(run: Run) -> None:
    words = ("completion", "bash", "--words", "caption", "x", "--format", "=")
    assert run(*words, model=None)[1] == run(*words, "par", model=None)[1]
    assert "parquet" in run(*words, "par", model=None)[1]


_SETUP = {"bash": "source", "zsh": "autoload -Uz compinit; compinit -D -u; source"}


def _type(shell: str, setup: str, typed: str, expected: str) -> bool:
    """Whether the tab key completes what was typed in a terminal."""
    import pty
    import select

    command = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command, stdin=end, stdout=end, stderr=end, start_new_session=True, env=os.environ | {"TERM": "dumb"}
    )
    os.close(end)
    shown = b""
    os.write(terminal, f"{setup}; echo rea''dy\n".encode())
    waits = [(b"ready\r\n", typed.encode() + b"\t"), (expected.encode(), b"")]
    deadline = time.monotonic() + 60
    while waits and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096)
        if waits[0][0] in shown:
            os.write(terminal, waits.pop(0)[1])
            shown = b""
    process.kill()
    process.wait()
    os.close(terminal)
    return not waits


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import os, sys, blip2.cli\n"
        "try: blip2.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm', 'huggingface_hub'}\n"
        "assert os.environ['GOMP_SPINCOUNT'] == '3000'\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "blip2", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )
        after = os.times()  # the processor's time, not the clock's: the machine may be busy otherwise
        used = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(used)
    assert min(seconds) < 0.2, seconds


def test_a_reader_that_has_seen_enough_is_no_error(generator_folder: Path, pictures: list[Path]) -> None:
    command = [sys.executable, "-m", "blip2", "caption", *map(str, pictures)]
    command += ["--model", str(generator_folder), "--batch-size", "1"]
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_the_page_in_the_docs_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
