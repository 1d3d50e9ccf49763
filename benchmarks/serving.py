"""Throughput and latency of `blip2 serve` beside the plain Python loop, as ratios; the last line is one JSON object.

    python -m benchmarks.serving [--model M] [--requests N] [--rounds R] [--beams B]

Both sides caption the same images, each a new one to the cache, on as many threads of torch. The loop calls
`model.caption` for one image after another in this process. The server is a process of its own on loopback; clients ask
it over HTTP, each for its next image when it has its answer. Then a client streams texts of 60 tokens while another
asks for something else all the time: how long the stream's pieces let wait, beside how long the other's call takes by
itself.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

import blip2

CLIENTS = (1, 4, 16)


def pictures(count: int, seed: int) -> list[bytes]:
    """JPEG files, every one different: what is in them decides nothing here."""
    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def loop(model: blip2.Predictor, images: list[bytes], num_beams: int) -> list[float]:
    """Seconds of each caption."""
    times = []
    for image in images:
        began = time.perf_counter()
        model.caption(image, num_beams=num_beams)
        times.append(time.perf_counter() - began)
    return times


def serve(url: str, images: list[bytes], num_beams: int, clients: int) -> tuple[float, list[float]]:
    """Seconds for all, and of each."""
    with httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:

        def ask(image: bytes) -> float:
            began = time.perf_counter()
            client.post(
                "/caption", files={"image": image}, data={"num_beams": str(num_beams)}
            ).raise_for_status()
            return time.perf_counter() - began

        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            times = list(pool.map(ask, images))
        return time.perf_counter() - began, times


def others(image: bytes) -> dict[str, dict[str, Any]]:
    """What is requested beside a stream."""
    texts = [f"a photo of {i} things" for i in range(64)]
    long = "a photo of many things on a table in a room with a window and a door"
    return {
        "/match": {"files": {"image": image}, "data": {"texts": texts}},
        "/embed": {"files": [("images", image)] * 8, "data": {"texts": texts}},
        "/explain": {"files": {"image": image}, "data": {"text": long}},
    }


def stall(
    url: str, images: list[bytes], path: str | None, request: dict[str, Any]
) -> tuple[list[float], float]:
    """Seconds between the pieces of streams while something else is requested, and what that takes by itself."""
    waits: list[float] = []
    done = threading.Event()
    with httpx2.Client(base_url=url, timeout=120, trust_env=False) as client, ThreadPoolExecutor(1) as pool:

        def ask() -> None:
            while path is not None and not done.is_set():
                client.post(path, **request).raise_for_status()

        began = time.perf_counter()
        if path is not None:
            client.post(path, **request).raise_for_status()
        alone = time.perf_counter() - began
        asking = pool.submit(ask)
        for image in images:
            fields = {"stream": "true", "max_new_tokens": "60", "min_new_tokens": "60"}
            with client.stream("POST", "/caption", files={"image": image}, data=fields) as answer:
                last: float | None = None
                for line in answer.iter_lines():
                    if line.startswith('data: {"delta"'):
                        now = time.perf_counter()
                        waits += [] if last is None else [now - last]
                        last = now
        done.set()
        asking.result()
    return waits, alone


def start(model: str, threads: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "blip2", "serve", "--port", "0", "--model", model]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    for line in process.stderr:
        if address := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise SystemExit("the server did not start")
    # what it goes on writing must not fill the pipe
    ThreadPoolExecutor(1).submit(process.stderr.read)
    with httpx2.Client(base_url=address[0], trust_env=False) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)
    return process, address[0]


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    args = parser.parse_args()
    threads = torch.get_num_threads()
    model = blip2.load(args.model)
    process, url = start(args.model, threads)
    figures: dict[str, dict[str, float]] = {}
    try:
        for num_beams in args.beams:
            loop(model, pictures(4, 0), num_beams)
            serve(url, pictures(16, 1), num_beams, 4)
            ratios: dict[int, list[tuple[float, float, float]]] = {clients: [] for clients in CLIENTS}
            for round_ in range(args.rounds):
                # in turns, so that what else the machine does falls on both
                for clients in CLIENTS:
                    images = pictures(args.requests, 100 + 10 * round_ + clients)
                    plain = loop(model, images, num_beams)
                    total, times = serve(url, images, num_beams, clients)
                    ratios[clients].append(
                        (
                            sum(plain) / total,
                            percentile(times, 0.5) / percentile(plain, 0.5),
                            percentile(times, 0.99) / percentile(plain, 0.99),
                        )
                    )
            for clients, rounds in ratios.items():
                throughput, p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
                print(
                    f"beams {num_beams}, {clients:2} clients: throughput {throughput:.2f} of the loop's, "
                    f"p50 {p50:.2f}, p99 {p99:.2f} of its latency",
                    flush=True,
                )
                figures[f"beams{num_beams}_clients{clients}"] = {
                    "throughput": throughput,
                    "p50": p50,
                    "p99": p99,
                }
        images = pictures(4, 7)
        for path, request in {None: {}, **others(images[0])}.items():
            waits, alone = stall(url, images, path, request)
            half, most, longest = (1000 * percentile(waits, share) for share in (0.5, 0.99, 1))
            beside = f"beside {path}, {1000 * alone:.0f} ms by itself" if path else "alone"
            print(
                f"a stream {beside}: p50 {half:.0f}, p99 {most:.0f}, longest {longest:.0f} ms between pieces",
                flush=True,
            )
            figures[f"stream_{path or 'alone'}"] = {
                "p50": half,
                "p99": most,
                "longest": longest,
                "alone": 1000 * alone,
            }
    finally:
        process.terminate()
        process.wait(60)
    print(json.dumps({"model": args.model, "threads": threads, "requests": args.requests} | figures))


if __name__ == "__main__":
    main()
