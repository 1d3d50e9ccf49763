"""The examples of the help and of the documents do what they say; stated answers are those of the model that ships."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from running import Run

from blip2.checkpoint import convert, open_tensors
from blip2.commands.parser import build_parser, subcommands

ROOT = Path(__file__).parents[2]
# What is not run here, and why.
LEFT_OUT = {
    r"^(make|pip|\. )": "installs, or trains for hours",
    r"^blip2 serve|^serve run|^curl -F": "tests/serve/ start servers",
    r"--engine ray": "tests/bulk/test_bulk_on_ray.py",
    r"^blip2 bench|^python -m benchmarks": "minutes to hours; tests/test_bench.py",
    r"^python -m lmms_eval": "tests/evaluate/test_lmms.py",
    r"^blip2 eval (easyvqa|scenes|coco|vqav2|default)": "needs data to be downloaded; tests/evaluate/",
    r"^blip2 completion \w+ >": "writes into the folders of a shell; test_completion_in_a_real_shell",
}
# Models by name are downloaded; small ones in folders take their place. So does a file that of an image on the network.
STAND_INS = {
    r"(?<![\w./-])(facebook/)?(opt-2\.7b|opt-6\.7b-coco|itm)(?![\w./-])": r"./\2",
    r"--language \S+": "--language ./language",
    r"^curl -s \S+": "cat photo.jpg",
}
NEEDS = {"parquet": "pyarrow", "eval captions": "pycocoevalcap"}  # extras


def _examples() -> list[tuple[str, list[str]]]:
    """The lines of each shell example of the documents, and of the help, whose page is docs/cli.md."""
    parsers = {"help": build_parser()} | {f"help {n}": p for n, p in subcommands(build_parser()).items()}
    lines = {name: re.findall(r"^  (\w.*)$", parser.epilog or "", re.M) for name, parser in parsers.items()}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for i, block in enumerate(
            re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        ):
            if page.name != "cli.md":
                lines[f"{page.name} {i}"] = block.splitlines()
    return list(lines.items())


@pytest.fixture(scope="session")
def materials(
    variants: dict[str, Path],
    matcher_folder: Path,
    pictures: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with whatever the examples name."""
    folder = tmp_path_factory.mktemp("materials")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for image in (ROOT / "examples").glob("*.*g"):
        shutil.copy(image, folder)
    shutil.copy(folder / "rose.jpg", folder / "photo.jpg")
    for place in ("photos", "shards"):
        (folder / place).mkdir()
    for picture in pictures[:3]:
        shutil.copy(picture, folder / "photos")
    with tarfile.open(folder / "shards" / "0.tar", "w") as archive:
        archive.add(pictures[0], "0.png")
    for name in ("opt-2.7b", "opt-6.7b-coco", "my-model", "random"):
        shutil.copytree(variants["opt"], folder / name)
    shutil.copytree(matcher_folder, folder / "itm")
    convert(variants["opt"], folder / "blip2-opt-6.7b-coco-paddle", to="paddle")
    _leave_out_frozen_parts(folder, variants["opt"])
    rows = [{"image": picture.name, "captions": ["a red cat"]} for picture in pictures[:3]]
    (folder / "captions.json").write_text(json.dumps(rows))
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = [{"image": picture.name, "names": ["cat"]} for picture in pictures[:3]]
    (folder / "photos" / "photos.jsonl").write_text("\n".join(map(json.dumps, named)))
    if find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        images = [{"bytes": picture.read_bytes()} for picture in pictures[3:]]
        pyarrow.parquet.write_table(pyarrow.table({"image": images}), folder / "rows.parquet")
    return folder


def _leave_out_frozen_parts(folder: Path, source: Path) -> None:
    """The files of a model as LAVIS's trainer leaves them, and the parts that it does not store."""
    convert(source, folder / "lavis", to="lavis")
    with open_tensors(folder / "lavis") as tensors:
        whole = {name: tensors.copy(name) for name in tensors}
    encoder = "visual_encoder."
    trained = {n: t for n, t in whole.items() if not n.startswith((encoder, "opt_model."))}
    torch.save({"model": trained}, folder / "blip2_pretrained_opt2.7b.pth")
    vision = {n.removeprefix(encoder): t for n, t in whole.items() if n.startswith(encoder)}
    torch.save(vision, folder / "eva_vit_g.pth")
    with open_tensors(source) as tensors:
        names = [name for name in tensors if name.startswith("language_model.")]
        own = {name.removeprefix("language_model."): tensors.copy(name) for name in names}
    (folder / "language").mkdir()
    torch.save(own, folder / "language" / "pytorch_model.bin")
    text = json.loads((source / "config.json").read_text())["text_config"]
    (folder / "language" / "config.json").write_text(json.dumps(text | {"eos_token_id": 2}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder / "language")


EXAMPLES = _examples()


@pytest.mark.parametrize(("place", "lines"), EXAMPLES, ids=[place for place, _ in EXAMPLES])
def test_examples(
    place: str, lines: list[str], materials: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(materials, tmp_path, dirs_exist_ok=True)
    for line in lines:
        if any(re.search(pattern, line) for pattern in LEFT_OUT):
            continue
        if any(extra in line and find_spec(module) is None for extra, module in NEEDS.items()):
            continue
        command, _, comment = line.partition("#")
        for pattern, stand_in in STAND_INS.items():
            command = re.sub(pattern, stand_in, command)
        # The shell splits it, and gives what is piped into the command, which then runs here.
        shell = 'blip2() { cat > stdin; printf "%s\\0" "$@" > arguments; }\n' + command
        subprocess.run(["bash", "-c", shell], stdin=subprocess.DEVNULL, check=True)
        arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "")  # METEOR and SPICE would start Java
            done = run(*arguments, stdin=(tmp_path / "stdin").read_bytes())
        assert done.status == 0, (line, done.err)
        if redirected := re.search(r"> (\S+) *$", command):
            (tmp_path / redirected[1]).write_bytes(done.out)
        if stated := re.search(r"-> (.*)", comment):
            lines_out = [re.sub(r"\d\.\d{4}", lambda n: f"{float(n[0]):.2f}", out) for out in done.lines]
            assert "; ".join(lines_out).replace("\t", " ") == stated[1].strip(), line


def test_few_examples_are_left_out() -> None:
    every = [line for _, lines in EXAMPLES for line in lines]
    used = {pattern for pattern in LEFT_OUT if any(re.search(pattern, line) for line in every)}
    assert used == {*LEFT_OUT} and sum(line.startswith("blip2 ") for line in every) > 60
    run_here = [line for line in every if not any(re.search(pattern, line) for pattern in LEFT_OUT)]
    assert len(run_here) > 45 and sum("->" in line for line in run_here) >= 10


def test_the_python_of_the_readme(materials: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(materials)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(code, {"paths": ["photo.jpg", "two-rabbits.jpg"]})
