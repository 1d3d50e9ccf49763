"""The command line of `blip2`. What a command does (commands/) is imported when it runs, so help comes at once."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import blip2

INPUTS = "paths of images, patterns in quotes ('photos/*.jpg'), folders (searched through), or - for standard input"
EVAL_TASKS = (
    "coco",
    "nocaps",
    "flickr30k",
    "vqav2",
    "okvqa",
    "gqa",
    "easyvqa",
    "scenes",
    "retrieval-coco",
    "retrieval-flickr30k",
    "default",
    "captions",
    "questions",
)  # fmt: skip  (as blip2.evaluate.tasks.TASK_NAMES, which is not imported for help)
EPILOG = """\
Results go to standard output, progress and errors to standard error.
Exit status: 0 all went well, 1 some images failed, 2 wrong usage or no model.
BLIP2_DEBUG=1 shows where an error comes from.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; docs/make_cli.py writes its page from this."""
    parser = argparse.ArgumentParser(
        prog="blip2",
        description="From a picture to words: captions, answers, conversation and matching.",
        epilog="examples:\n"
        "  blip2 caption photo.jpg\n"
        '  blip2 ask photo.jpg "how many dogs are there?"\n'
        "  blip2 chat photo.jpg\n\n" + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"blip2 {blip2.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, about: str, *examples: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about[0].lower() + about[1:].rstrip("."),
            description=about,
            epilog="examples:\n" + "".join(f"  {example}\n" for example in examples) + "\n" + EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # a script must not break when an option is added
        )
        added.set_defaults(command=name)
        return added

    caption = command(
        "caption",
        "Say what is in images.",
        "blip2 caption photo.jpg",
        "blip2 caption photos/ --json > captions.jsonl",
        "blip2 caption 'photos/*.png' --beams 3 --max-new-tokens 20",
        "blip2 caption photo.jpg --num-return-sequences 3",
        "blip2 caption photo.jpg --temperature 0.8 --top-p 0.9 --seed 1",
        "curl -s https://example.org/photo.jpg | blip2 caption -",
        "blip2 caption photo.jpg --model opt-6.7b-coco --dtype bf16",
        "blip2 caption photos/ --out captions.jsonl",
        "blip2 caption shards/*.tar rows.parquet --out captions.parquet --match",
    )
    caption.add_argument("images", nargs="+", metavar="IMAGE", help=INPUTS)
    _add_model(caption)
    _add_decoding(caption, length_penalty=1.0, prompt=True)
    _add_output(caption, several=True, stream=True)
    _add_bulk(caption)

    ask = command(
        "ask",
        "Answer a question about images.",
        'blip2 ask photo.jpg "how many dogs are there?"',
        'blip2 ask photos/ "is it day or night?" --json',
        'blip2 ask photo.jpg "what is the man doing?" --model opt-2.7b --max-new-tokens 20',
    )
    ask.add_argument("images", nargs="+", metavar="IMAGE", help=INPUTS)
    ask.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    _add_model(ask)
    _add_decoding(ask, length_penalty=-1.0)
    _add_output(ask, several=True, stream=True)

    chat = command(
        "chat",
        "Talk about an image: one question a line, from the keyboard or a pipe.",
        "blip2 chat photo.jpg",
        "printf 'what is it?\\nwhat colour is it?\\n' | blip2 chat photo.jpg",
    )
    chat.add_argument("image", metavar="IMAGE", help="path of an image")
    _add_model(chat)
    _add_decoding(chat, length_penalty=-1.0, several=False)
    _add_output(chat, stream=True)

    match = command(
        "match",
        "Say how well texts fit an image, each as a probability.",
        'blip2 match photo.jpg "a dog" "a cat"',
        'blip2 match photos/ "a red car" --json',
        'blip2 match photo.jpg "a dog on a beach" --model itm',
    )
    match.add_argument("images", metavar="IMAGE", help=INPUTS)
    match.add_argument(
        "texts", nargs="+", metavar="TEXT", help="texts to compare with the image, each in quotes"
    )
    _add_model(match)
    _add_output(match, several=True)

    embed = command(
        "embed",
        "Turn images and texts into vectors for search, one JSON object a line.",
        "blip2 embed photos/ > photos.jsonl",
        'blip2 embed --text "a red car" --text "a blue car"',
    )
    embed.add_argument("images", nargs="*", metavar="IMAGE", help=INPUTS)
    embed.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text; may be repeated")
    _add_model(embed)
    _add_output(embed, several=True, as_json=False)

    evaluate = command(
        "eval",
        "Score a model on a benchmark, or on captions and questions of your own.",
        "blip2 eval easyvqa",
        "blip2 eval scenes --data data",
        "blip2 eval coco --data coco --model opt-6.7b-coco --protocol paper --out results",
        "blip2 eval captions --data captions.json --images photos",
        "blip2 eval vqav2 --data vqa --model opt-2.7b --answers answers.txt --abstain 0.3",
    )
    evaluate.add_argument(
        "task",
        choices=EVAL_TASKS,
        metavar="TASK",
        help=f"one of {', '.join(EVAL_TASKS)}; default: easyvqa and scenes",
    )
    evaluate.add_argument(
        "--data",
        metavar="DIR",
        help="the folder of the data, for captions and questions a file; see docs/evaluating.md",
    )
    evaluate.add_argument("--images", metavar="DIR", help="the images, where they are not in the usual place")
    evaluate.add_argument(
        "--annotations", metavar="FILE", help="with questions in VQA's form: the file of their answers"
    )
    evaluate.add_argument("--matcher", metavar="NAME", help="the model that matches, beside one that writes")
    evaluate.add_argument(
        "--protocol",
        choices=("default", "paper"),
        default="default",
        help="paper: the settings of the published tables, and their figures beside ours (default: default)",
    )
    evaluate.add_argument(
        "--answers", metavar="FILE", help="choose each answer among these, one a line, in place of writing it"
    )
    evaluate.add_argument(
        "--abstain",
        type=float,
        default=0.0,
        metavar="P",
        help="with --answers: give no answer that is less probable than this (default: 0.0)",
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N items alone")
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="write results.json, predictions.json and a page to look through, index.html",
    )
    _add_model(evaluate)
    _add_output(evaluate, several=True)

    explain = command(
        "explain",
        "Show where in an image each word of a caption or an answer comes from, as a picture.",
        "blip2 explain photo.jpg -o out.png",
        'blip2 explain photo.jpg --text "a dog on a beach" -o out.png',
        'blip2 explain photo.jpg --question "how many dogs are there?" -o out.png',
    )
    explain.add_argument("image", metavar="IMAGE", help="path of an image, or - for standard input")
    explained = explain.add_mutually_exclusive_group()
    explained.add_argument("--text", metavar="TEXT", help="a caption to explain (default: the model's own)")
    explained.add_argument("--question", metavar="TEXT", help="explain the answer to this question")
    explain.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the picture to write: .png, .jpg or .webp"
    )
    _add_model(explain)
    _add_output(explain)
    explain.add_argument("--quiet", action="store_true", help="no progress")

    serve = command(
        "serve",
        "Serve a model over HTTP: OpenAI's API, endpoints of its own, and a page at /.",
        "blip2 serve",
        "blip2 serve --model opt-2.7b --port 9000",
        "blip2 serve --host 0.0.0.0 --api-key-file keys.txt",
        "blip2 serve --limit queue=200 --limit new_tokens=100",
    )
    _add_model(serve)
    group = serve.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000)")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys that let clients in, one a line; needed where other machines can reach the server",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name that a proxy passes on, where no key is asked for; may be repeated",
    )
    group.add_argument("--fetch-urls", action="store_true", help="let clients name images by http(s) URLs")
    group.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="change a bound, such as body_bytes=50000000; may be repeated; docs/serving.md lists them",
    )
    group.add_argument("--log-content", action="store_true", help="write prompts and answers to the log too")
    group.add_argument("--quiet", action="store_true", help="no progress while a model is downloaded")

    inspect = command(
        "inspect",
        "Say what a checkpoint is and what looks wrong with it; no value is read.",
        "blip2 inspect ./my-model",
        "blip2 inspect model_state.pdparams --json",
        "blip2 inspect blip2_pretrained_opt2.7b.pth --vision eva_vit_g.pth --language ./opt-2.7b",
    )
    inspect.add_argument("path", metavar="PATH", help="a folder, a tensor file or a name")
    _add_parts(inspect)
    _add_output(inspect)

    convert = command(
        "convert",
        "Convert a checkpoint between the layouts of transformers, PaddleNLP and LAVIS, one tensor at a time.",
        "blip2 convert ./blip2-opt-6.7b-coco-paddle ./hf --to hf --dtype bf16 --verify",
        "blip2 convert opt-2.7b ./paddle --to paddle",
        "blip2 convert ./hf ./small --to hf --dtype smallest-exact",
    )
    convert.add_argument("source", metavar="SRC", help="a folder, a tensor file or a name")
    convert.add_argument("target", metavar="DST", help="a new folder")
    convert.add_argument(
        "--to",
        choices=("hf", "paddle", "lavis"),
        required=True,
        help="whose layout: transformers', Paddle's, LAVIS's",
    )
    convert.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "smallest-exact"),
        help="what to store; smallest-exact: 16 bits where not one value changes (default: as it is)",
    )
    convert.add_argument(
        "--shard-size",
        metavar="SIZE",
        help="start another file beyond this, such as 2GB (default: 5GB for hf)",
    )
    convert.add_argument(
        "--verify",
        action="store_true",
        help="read all back and compare every value, and outputs for an image",
    )
    _add_parts(convert)
    convert.add_argument("--json", action="store_true", help="the result as a JSON object")
    convert.add_argument("--quiet", action="store_true", help="no progress")

    quantize = command(
        "quantize",
        "Store a model's weights in 8 or 4 bits, one layer at a time; the folder loads at once.",
        "blip2 quantize opt-6.7b-coco ./opt-6.7b-coco-int8 --to int8",
        "blip2 caption photo.jpg --model ./opt-6.7b-coco-int8",
    )
    quantize.add_argument("source", metavar="SRC", help="a folder, a tensor file or a name")
    quantize.add_argument("target", metavar="DST", help="a new folder")
    quantize.add_argument(
        "--to", choices=("int8", "int4"), default="int8", help="how many bits (default: int8)"
    )
    _add_parts(quantize)
    quantize.add_argument("--json", action="store_true", help="the result as a JSON object")
    quantize.add_argument("--quiet", action="store_true", help="no progress")

    bench = command(
        "bench",
        "Measure a model on this machine; the last line is one JSON object.",
        "blip2 bench",
        "blip2 bench ./opt-6.7b-coco --quantize int8 int4 --against transformers",
        "blip2 bench ./opt-6.7b-coco ./opt-6.7b-coco-int8 --against transformers --record figures.jsonl",
    )
    bench.add_argument(
        "model",
        nargs="*",
        metavar="MODEL",
        help="a name or a folder (default: default); beside it the same model stored in other precisions",
    )
    bench.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    bench.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="as for caption")
    bench.add_argument(
        "--quantize", nargs="+", choices=("int8", "int4"), default=[], help="measure with rounded weights too"
    )
    bench.add_argument(
        "--against", choices=("transformers",), help="measure this beside it, on the same files"
    )
    bench.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="figures are medians of so many (default: 3)"
    )
    bench.add_argument(
        "--record",
        metavar="FILE",
        help="write each side's figures here as they come; what stands there already is not measured again",
    )
    bench.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="images at a time (default: 1 4 16)",
    )

    models = command(
        "models",
        "List the models known by name, with their sizes and the memory they need.",
        "blip2 models",
        "blip2 models --json",
    )
    _add_output(models)

    doctor = command(
        "doctor",
        "Say what this machine has, what models need of it, and what would go wrong.",
        "blip2 doctor",
        "blip2 doctor opt-6.7b-coco",
        "blip2 doctor ./my-model --json",
    )
    doctor.add_argument(
        "model", nargs="?", metavar="MODEL", help="a name or a folder; without one all known models"
    )
    _add_output(doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="default",
        metavar="NAME",
        help="a name from `blip2 models`, one on the Hugging Face Hub, or a folder (default: the model that ships)",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default: auto)"
    )
    group.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="what to compute in (default: fp32 up to a billion parameters, bf16 above)",
    )
    group.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="hold the weights in 8 or 4 bits: less memory, faster on a CPU",
    )
    _add_parts(parser)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parts that LAVIS's checkpoints leave out")
    group.add_argument("--vision", metavar="PATH", help="the image encoder: EVA-CLIP's .pth, or a folder")
    group.add_argument(
        "--language", metavar="PATH", help="the language model: a folder of OPT or T5, or its name"
    )


def _add_decoding(
    parser: argparse.ArgumentParser, *, length_penalty: float, prompt: bool = False, several: bool = True
) -> None:
    group = parser.add_argument_group("decoding")

    def option(name: str, kind: type, default: Any, about: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        short = ["--beams"] if name == "num-beams" else []
        group.add_argument(f"--{name}", *short, type=kind, default=default, metavar="N", help=about + shown)

    if prompt:
        text = 'what the caption goes on from, "" for nothing (default: "a photo of")'
        group.add_argument("--prompt", metavar="TEXT", help=text)
    option(
        "num-beams", int, None, "texts that beam search follows (default: 5; 1 when sampling or streaming)"
    )
    option("max-new-tokens", int, 30, "longest text, in tokens")
    option("min-new-tokens", int, 0, "shortest text, in tokens")
    option("length-penalty", float, length_penalty, "above 0 favours long texts, below 0 short ones")
    group.add_argument(
        "--early-stopping",
        choices=("false", "true", "never"),
        default="false",
        help="when beam search ends: by estimate, at the first texts found, or never too soon (default: false)",
    )
    option("repetition-penalty", float, 1.0, "above 1 makes what was said less likely")
    option("no-repeat-ngram-size", int, 0, "no run of so many tokens twice, 0 for off")
    if several:
        option("num-return-sequences", int, 1, "texts for each image, best first")
    group.add_argument(
        "--sample",
        action="store_true",
        help="draw the text by chance; --temperature, --top-k and --top-p ask for it too",
    )
    option("temperature", float, 1.0, "above 0; low is bland, high is wild")
    option("top-k", int, 0, "draw among the k likeliest tokens, 0 for all")
    option("top-p", float, 1.0, "draw among the likeliest tokens that make up this probability")
    option("seed", int, None, "makes sampling repeatable")


def _add_output(
    parser: argparse.ArgumentParser, *, several: bool = False, stream: bool = False, as_json: bool = True
) -> None:
    group = parser.add_argument_group("output")
    if as_json:
        group.add_argument("--json", action="store_true", help="one JSON object a line")
    if stream:
        group.add_argument(
            "--stream", action="store_true", help="print words as they come, one image, no beams"
        )
    if several:
        group.add_argument(
            "--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)"
        )
    if several or stream:
        group.add_argument("--quiet", action="store_true", help="no progress")


def _add_bulk(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "many images (docs/bulk.md): --out, with lists, .tar shards and tables as IMAGE too"
    )
    group.add_argument(
        "--out",
        metavar="PATH",
        help="write there and go on where an earlier run stopped: .jsonl, .csv, .parquet, .json (COCO's results), "
        ".tar (webdataset), or a folder for a .txt beside each image",
    )
    formats = ("jsonl", "csv", "parquet", "coco", "txt", "webdataset")
    group.add_argument("--format", choices=formats, help="where the name of --out does not tell")
    group.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="only these files of folders"
    )
    group.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="not these")
    group.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append", "prepend"),
        default="skip",
        help="what to do with text files that are there; overwrite makes a finished output anew (default: skip)",
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="stands before each text")
    group.add_argument("--suffix", default="", metavar="TEXT", help="stands after each text")
    group.add_argument(
        "--questions", metavar="FILE", help="answer these about each image instead, a question a line"
    )
    group.add_argument(
        "--num-captions",
        dest="num_return_sequences",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="the same as --num-return-sequences",
    )
    group.add_argument("--score", action="store_true", help="the log-probability of each text too")
    group.add_argument("--match", action="store_true", help="how well each text fits, by the matcher")
    group.add_argument(
        "--keep-best", action="store_true", help="keep the text that fits best, by the matcher"
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N inputs only")
    group.add_argument(
        "--shard", default="1/1", metavar="I/N", help="the I-th of N equal parts of the inputs, from 1"
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on all machines of a Ray cluster (default: local)",
    )
    group.add_argument("--dry-run", action="store_true", help="count inputs and estimate the time only")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="surrogateescape")  # file names are printed as the bytes they are
    parser = build_parser()
    args = parser.parse_args(argv)
    from blip2 import commands

    try:
        status = commands.COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return commands.DONE
    except Exception as error:
        if os.environ.get("BLIP2_DEBUG"):
            raise
        expected = isinstance(error, ValueError | OSError | MemoryError) and str(error)
        commands.complain(str(error) if expected else f"{type(error).__name__}: {error}")
        return commands.NOTHING_DONE
