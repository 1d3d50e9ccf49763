"""The command that serves."""

from __future__ import annotations

import argparse

from blip2.commands.terminal import DONE, load_named


def serve(args: argparse.Namespace) -> int:
    from pathlib import Path

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
    run_server(
        lambda: load_named(args),
        model=Path(args.model).name,
        host=args.host,
        port=args.port,
        keys=None if args.api_key_file is None else Keys.load(args.api_key_file),
        limits=Limits().changed(args.limit),
        allow_hosts=tuple(args.allow_host),
        fetch_urls=args.fetch_urls,
        log_contents=args.log_content,
    )
    return DONE
