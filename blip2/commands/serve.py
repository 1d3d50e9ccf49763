"""Serve a model over HTTP: OpenAI's API, endpoints of its own, and a page at /.

blip2 serve
blip2 serve --model opt-2.7b --port 9000
blip2 serve --host 0.0.0.0 --api-key-file keys.txt
blip2 serve --limit queue=200 --limit new_tokens=100
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from blip2.commands.arguments import add_model, option, repeatable, switch
from blip2.commands.terminal import DONE, load_named


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser, from_environment=True)
    group = parser.add_argument_group("server")
    option(group, "--host", "ADDRESS", "where to listen", default="127.0.0.1")
    option(group, "--port", "N", "", type=int, default=8000)
    about = "keys that let clients in, one a line; needed where other machines can reach the server"
    option(group, "--api-key-file", "FILE", about)
    repeatable(group, "--allow-host", "NAME", "a host name that a proxy passes on, where no key is required")
    switch(group, "--fetch-urls", "let clients name images by http(s) URLs")
    about = "change a bound of docs/serving.md, such as body_bytes=50000000"
    repeatable(group, "--limit", "NAME=NUMBER", about)
    switch(group, "--log-content", "write prompts and answers to the log too")
    switch(group, "--quiet", "no progress while a model is downloaded")


def run(args: argparse.Namespace) -> int:
    """Serve until the process is stopped."""
    try:
        from blip2.serve.keys import Keys
        from blip2.serve.limits import Limits
        from blip2.serve.run import run_server
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("blip2"):
            raise
        raise ValueError(
            f"serving needs {error.name}, which is not installed: pip install 'blip2[serve]'"
        ) from None
    args.quiet = args.quiet or not sys.stderr.isatty()  # progress is no entry of a log
    warnings.filterwarnings("ignore", module=r"PIL\b")  # a client's image is no reason to write to the log
    run_server(
        lambda: load_named(args),
        model=Path(args.model).name,
        host=args.host,
        port=args.port,
        keys=None if args.api_key_file is None else Keys.load(args.api_key_file),
        limits=Limits().changed([f"pixels={args.max_pixels}"] * (args.max_pixels is not None) + args.limit),
        allow_hosts=tuple(args.allow_host),
        fetch_urls=args.fetch_urls,
        log_contents=args.log_content,
    )
    return DONE
