"""`blip2 serve` with a model that rests between tokens, so that a test can watch an answer grow.

python slow_server.py PORT FILE: FILE holds the seconds to rest, read at every token.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import blip2
from blip2.serve.keys import Keys
from blip2.serve.run import run_server


def main(port: int, rest: Path, keys: Path | None) -> None:
    def load() -> blip2.Predictor:
        torch.set_num_threads(1)
        model = blip2.load(device="cpu")

        def pause(*_: Any) -> None:
            time.sleep(float(rest.read_text()))

        model.model.language.get_submodule("lm_head").register_forward_hook(pause)
        return model

    run_server(load, model="default", port=port, keys=None if keys is None else Keys.load(keys))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
