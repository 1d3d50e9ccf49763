"""`blip2 serve` with the default model, anew for every line that comes in: loaded once, each server is a fork.

Writes a line with each server's process id, and one with its exit status when it has ended.
"""

from __future__ import annotations

import os
import sys

import torch

import blip2
from blip2.serve.run import run_server


def main() -> None:
    torch.set_num_threads(1)  # threads would not come along
    model = blip2.load(device="cpu")
    _ = model.matcher
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            sys.stdin.close()
            run_server(lambda: model, model="default", port=0)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
