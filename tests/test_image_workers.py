"""Image workers: the pixels and messages of this process; bounded, fair to clients, and gone when they should be."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.cli import main
from blip2.imagefiles import workers as module
from blip2.imagefiles.decode import ImageError, load_image
from blip2.imagefiles.workers import ImageWorkers, PendingImage

ROOT = Path(__file__).parents[1]
TURNED = Image.Exif()
TURNED[0x0112] = 6
RANDOM = np.random.default_rng(0)

# A worker without the checks of files that come before decoding, and one that says other things than it should.
RUN = "from blip2.imagefiles import cost, decode, worker; worker.answer_requests()"
UNCHECKED = RUN.replace("worker.", "decode.check_file = lambda content: cost.Cost(); worker.")
SAYING = "import os, sys; os.write(1, {ready!r}); sys.stdin.buffer.read(44); os.write(1, {answer!r}); sys.stdin.read()"

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 61, height: int = 47, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 4), np.uint8), "RGBA").convert(mode)


def png(width: int, height: int, data: bytes, bits: int = 1) -> bytes:
    """A grey PNG of any claimed size."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in chunks
    )


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times: each costs as much as the whole picture."""
    plain = encoded(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * count + plain[-2:]


@pytest.fixture(scope="module")
def workers() -> Iterator[ImageWorkers]:
    with ImageWorkers(2) as pool:
        yield pool


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets workers run other code."""
    return lambda code: monkeypatch.setattr(module, "COMMAND", (sys.executable, "-P", "-c", code))


def processes(pool: ImageWorkers) -> list[int]:
    return [worker.process.pid for worker in pool._idle]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


FILES = {
    "jpeg": encoded(picture(), "JPEG"),
    "jpeg, turned": encoded(picture(), "JPEG", exif=TURNED),
    "jpeg, progressive": encoded(picture(300, 200), "JPEG", progressive=True),
    "jpeg, cmyk": encoded(picture(mode="CMYK"), "JPEG"),
    "png": encoded(picture(), "PNG"),
    "png, transparent": encoded(picture(mode="RGBA"), "PNG"),
    "png, palette": encoded(picture(mode="P"), "PNG", transparency=3),
    "png, 16 bits": encoded(Image.fromarray(RANDOM.integers(0, 65536, (30, 40), np.uint16)), "PNG"),
    "png, broken text": encoded(picture(), "PNG")[:33]
    + b"\0\0\0\x01tEXtx0000"
    + encoded(picture(), "PNG")[33:],
    "webp": encoded(picture(mode="RGBA"), "WEBP"),
    "gif": encoded(picture(mode="P"), "GIF"),
    "bmp": encoded(picture(mode="L"), "BMP"),
    "tiff": encoded(picture(mode="LA"), "TIFF", compression="tiff_lzw"),
    "ppm": encoded(picture(mode="1"), "PPM"),
    "avif": encoded(picture(), "AVIF"),
    "large": encoded(picture(2900, 2900), "PNG", compress_level=0),
    "empty": b"",
    "truncated": encoded(picture(), "PNG")[:900],
    "no image": b"%PDF-1.7 and so on",
    "too many pixels": png(60_000, 60_000, b""),
    "floats": encoded(Image.new("F", (3, 3)), "TIFF"),
    "too many scans": scans(200),
}
assert len(FILES["large"]) > 24_000_000


@pytest.mark.parametrize("resize", [None, (224, 3), (9, 0), (70, 2)])
@pytest.mark.parametrize("kind", FILES)
def test_pixels_and_messages_are_those_of_this_process(
    workers: ImageWorkers, kind: str, resize: tuple[int, int] | None
) -> None:
    content = FILES[kind]
    try:
        expected = load_image(content)
    except ImageError as error:
        with pytest.raises(ImageError) as caught:
            workers.load_image(content, resize=resize)
        assert str(caught.value) == str(error)
        return
    decoded = workers.decode(content, resize=resize)
    assert decoded.size == expected.size
    if resize:
        expected = expected.resize((resize[0], resize[0]), Image.Resampling(resize[1]))
    assert (decoded.image.mode, decoded.image.size) == ("RGB", expected.size)
    assert decoded.image.tobytes() == expected.tobytes()


def test_the_most_pixels_are_the_callers(workers: ImageWorkers) -> None:
    assert workers.decode(FILES["png"], max_pixels=61 * 47).size == (61, 47)
    with pytest.raises(ImageError, match="the limit is 2,866"):
        workers.decode(FILES["png"], max_pixels=61 * 47 - 1)


def test_many_threads_share_few_workers(workers: ImageWorkers) -> None:
    names = [name for name in FILES if len(FILES[name]) < 10**6 and name not in ("floats", "too many pixels")]

    def result(name: str, decode: Callable[[bytes], Image.Image]) -> str:
        try:
            return decode(FILES[name]).tobytes().hex()
        except ImageError as error:
            return str(error)

    expected = {name: result(name, load_image) for name in names}
    with ThreadPoolExecutor(8) as pool:
        jobs = [(name, pool.submit(result, name, workers.load_image)) for name in names * 12]
        assert len(jobs) >= 200
        assert all(job.result() == expected[name] for name, job in jobs)
    assert len(processes(workers)) <= 2


# --- bounds ---


def image_of(width: int, height: int, mode: str, kind: str, **options: object) -> Callable[[], bytes]:
    return lambda: encoded(Image.new(mode, (width, height)), kind, **options)


@needs_linux
@pytest.mark.parametrize(
    ("make", "seconds", "memory", "message"),
    [
        (lambda: scans(3000), 1, 2**29, "takes longer than 1 s"),
        (
            image_of(16_000, 5_000, "L", "TIFF", compression="tiff_lzw"),
            0.03,
            2**29,
            "takes longer than 0.03 s",
        ),
        (image_of(9_000, 9_000, "P", "PNG"), 0.03, 2**29, "takes longer than 0.03 s"),
        (image_of(6_000, 6_000, "RGBA", "PNG"), 9, 2**26, "takes too much memory"),
        (image_of(6_000, 6_000, "RGB", "TIFF"), 9, 2**26, "takes too much memory"),
        (image_of(6_000, 6_000, "RGB", "JPEG"), 9, 2**26, "takes too much memory"),
        (lambda: huge_tile(), 9, 2**26, "takes too much memory"),
        (image_of(6_000, 6_000, "RGB", "WEBP"), 9, 2**26, "or decoding it takes too much memory"),
    ],
)
def test_costly_files_are_ended_and_others_decoded(
    command: Callable[[str], None], make: Callable[[], bytes], seconds: float, memory: int, message: str
) -> None:
    command(UNCHECKED)
    content = make()
    with ImageWorkers(1, seconds=seconds, memory_bytes=memory) as pool:
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(ImageError, match=message):
                pool.load_image(content)
            assert time.monotonic() - begun < 5
            assert pool.decode(FILES["gif"]).size == (61, 47)


@needs_linux
def test_a_worker_that_stands_still_is_ended() -> None:
    with ImageWorkers(1, seconds=0.1) as pool:
        pool.load_image(FILES["png"])
        (pid,) = processes(pool)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ImageError, match=r"takes longer than 0.1 s; save the image anew"):
            pool.load_image(FILES["png"])
        assert not is_alive(pid)
        assert pool.decode(FILES["png"]).size == (61, 47)


@needs_linux
def test_a_dead_worker_is_replaced() -> None:
    with ImageWorkers(1) as pool:
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):
            pool.load_image(FILES["png"])
            os.kill(processes(pool)[0], number)
            time.sleep(0.2)
            assert pool.decode(FILES["png"]).size == (61, 47)
            content = scans(20)
            with ThreadPoolExecutor(1) as thread:
                job = thread.submit(pool.load_image, content)
                wait_until(lambda: bool(pool._working and pool._working[0]._process))
                time.sleep(0.2)
                pool._working[0]._process.send_signal(number)
                killed = (
                    "was killed, not by blip2; try again"
                    if number == signal.SIGKILL
                    else "the decoder crashed on it"
                )
                with pytest.raises(ImageError, match=killed):
                    job.result()


@needs_linux
def test_signals_that_are_meant_for_the_parent_are_ignored() -> None:
    with ImageWorkers(1) as pool:
        pool.load_image(FILES["png"])
        (pid,) = processes(pool)
        for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] * 100:
            os.kill(pid, number)
        pool.load_image(FILES["png"])
        assert processes(pool) == [pid] and os.getsid(pid) == pid


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<5I", 2, 2**16, 2**16, 1, 1),  # pixels: more than may be
        struct.pack("<5I", 2, 0, 9, 9, 9),
        struct.pack("<5I", 0, 1, 1, 1, 1),
        struct.pack("<5I", 77, 1, 1, 1, 1),
    ],
)
def test_nonsense_from_a_worker_is_an_error(command: Callable[[str], None], answer: bytes) -> None:
    command(SAYING.format(ready=bytes(20), answer=answer))
    with (
        ImageWorkers(1, seconds=0.5) as pool,
        pytest.raises(ImageError, match=r"decoder crashed|takes longer"),
    ):
        pool.load_image(FILES["png"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "ends while it starts: status 3"),
        ("print('Hello'); import no_such_module", "ends while it starts"),
        (
            f"import sys; sys.modules['numpy'] = None; {RUN.replace('cost, decode, ', '')}",
            "numpy",
        ),
    ],
)
def test_workers_that_cannot_start_are_an_error(
    command: Callable[[str], None], code: str, message: str
) -> None:
    command(code)
    with ImageWorkers(2) as pool:
        for _ in range(3):
            with pytest.raises(RuntimeError, match=message):
                pool.load_image(FILES["png"])


def test_a_missing_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", ("/no/such/python",))
    with ImageWorkers(2) as pool:
        for attempt in (pool.start, lambda: pool.load_image(FILES["png"])):
            with pytest.raises(RuntimeError, match=r"cannot be started: .*No such file.*/no/such/python"):
                attempt()


def test_nothing_of_the_users_is_run_or_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("struct", "numpy", "PIL", "blip2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with ImageWorkers(1) as pool, open(tmp_path / "struct.py", "rb") as file:
        os.set_inheritable(file.fileno(), True)
        pool.load_image(FILES["png"])
        if sys.platform == "linux":
            folder = Path("/proc") / str(processes(pool)[0])
            assert b"secret" not in (folder / "environ").read_bytes()
            assert not [link for link in (folder / "fd").iterdir() if str(tmp_path) in os.readlink(link)]
            assert (folder / "oom_score_adj").read_text() == "1000\n"
            assert "torch" not in (folder / "maps").read_text()
    assert capfd.readouterr() == ("", "")


@needs_linux
def test_a_folder_that_is_gone_stops_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with ImageWorkers(1) as pool:
        assert pool.decode(FILES["png"]).size == (61, 47)


# --- clients ---


def test_a_client_leaves_a_worker_to_others(command: Callable[[str], None]) -> None:
    command(UNCHECKED)
    hostile, ended = scans(3000), [PendingImage("them") for _ in range(4)]
    with ImageWorkers(3, seconds=20) as pool, ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(pool.decode, hostile, pending=pending) for pending in ended]
        wait_until(lambda: len(pool._working) == 2)
        for _ in range(3):  # while theirs are at work, and wait
            assert pool.decode(FILES["png"], pending=PendingImage("us")).size == (61, 47)
        assert [pending.client for pending in pool._waiting] == ["them", "them"]
        begun = time.monotonic()
        for pending in reversed(ended):
            pending.cancel()
        for job in jobs:
            with pytest.raises(CancelledError):
                job.result(timeout=5)
        assert time.monotonic() - begun < 1
        assert not pool._working and not pool._waiting
        pool.decode(FILES["png"], pending=PendingImage("them"))


def test_who_has_the_fewest_workers_is_next() -> None:
    pool = ImageWorkers(3)
    a, b, c = (lambda name=name: PendingImage(name) for name in "abc")
    pool._working, pool._waiting = [a(), a(), b()], [a(), b(), c(), a()]
    order = []
    for _ in range(5):
        pool._working.pop(0)
        pool._take_turns()
        order.append("".join(str(pending.client) for pending in pool._working))
    assert order == ["abc", "bca", "cab", "aba", "ba"]


@needs_linux
def test_ctrl_c_leaves_no_worker_taken() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with ImageWorkers(1) as pool:
        other = PendingImage()
        pool._waiting.append(other)
        pool._take_turns()  # it has the only worker
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.load_image(FILES["png"])
        assert not pool._waiting
        signal.signal(signal.SIGINT, before)
        pool._give_back(other, None)
        pool.load_image(FILES["png"])


def test_cancelled_before_it_begins(workers: ImageWorkers) -> None:
    pending = PendingImage()
    pending.cancel()
    with pytest.raises(CancelledError):
        workers.decode(FILES["png"], pending=pending)
    workers.decode(FILES["png"])


# --- the end ---


def test_closing_ends_what_waits_and_works(command: Callable[[str], None]) -> None:
    command(UNCHECKED)
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("error")
        pool = ImageWorkers(2, seconds=60)
        pool.start()
        pids, hostile = processes(pool), scans(3000)
        assert len(pids) == 2
        jobs = [threads.submit(pool.load_image, hostile) for _ in range(4)]
        wait_until(lambda: len(pool._working) == 2 and len(pool._waiting) == 2)
        begun = time.monotonic()
        pool.close()
        assert time.monotonic() - begun < 2
        for job in jobs:
            with pytest.raises(RuntimeError, match="were closed"):
                job.result(timeout=5)
        with pytest.raises(RuntimeError, match="were closed"):
            pool.load_image(FILES["png"])
        pool.close()
        if sys.platform == "linux":
            assert not any(map(is_alive, pids))


@needs_linux
@pytest.mark.parametrize("way", ["kill", "return", "raise", "SIGTERM"])
def test_workers_end_with_their_parent(way: str) -> None:
    code = f"""
import os, signal, sys, threading
from blip2.imagefiles.workers import ImageWorkers
pool = ImageWorkers(2, seconds=2)
pool.start()
[worker.wait_until_ready() for worker in pool._idle]
print(*[worker.process.pid for worker in pool._idle], flush=True)
threading.Thread(target=pool.load_image, args=(sys.stdin.buffer.read(),), daemon=True).start()
while not pool._working: pass
{ {"kill": "os.kill(os.getpid(), 9)", "return": "", "raise": "1 / 0", "SIGTERM": "os.kill(os.getpid(), 15)"}[way] }
"""
    content = scans(90)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=content,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)), 8)


@needs_linux
def test_threads_and_processes_do_not_pile_up() -> None:
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with ImageWorkers(1) as pool:
            pool.load_image(FILES["png"])
    wait_until(lambda: threading.active_count() == before[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before[1]


# --- commands ---


@needs_linux
@pytest.mark.parametrize("options", [[], ["--out", "c.jsonl"], ["--out", "c.jsonl", "--dry-run"]])
def test_a_command_goes_on_after_a_costly_image(
    options: list[str],
    generator_folder: Path,
    tmp_path: Path,
    command: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(UNCHECKED)
    monkeypatch.setitem(ImageWorkers.__init__.__kwdefaults__, "seconds", 0.5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in {"a.png": FILES["png"], "b.jpg": scans(3000), "c.gif": FILES["gif"]}.items():
        (tmp_path / "folder" / name).write_bytes(content)
    status = main(["caption", "folder", "--model", str(generator_folder), *options])
    shown = "".join(capsys.readouterr())
    if "--dry-run" in options:
        assert status == 0 and "3 inputs" in shown
        return
    if options:
        shown += (tmp_path / "c.jsonl").read_text()
    assert status == 1 and re.search(
        r"b.jpg: decoding it takes longer than 0.5 s; save the image anew", shown
    )
    assert all(f"{name}" in shown for name in ("a.png", "c.gif"))


@pytest.mark.parametrize("options", [[], ["--out", "c.jsonl"]])
def test_a_single_image_waits_for_no_process(
    options: list[str],
    generator_folder: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "COMMAND", ("/no/such/python",))
    monkeypatch.chdir(tmp_path)
    assert main(["caption", str(pictures[0]), "--model", str(generator_folder), *options]) == 0


# --- files of 20 MB that are made to cost as much as they can, without the checks that refuse most of them ---


def tiff(entries: dict[int, tuple[int, list[int]]], rest: bytes = b"") -> bytes:
    """A TIFF of tags: their kinds (3: 16 bits, 4: 32 bits) and values."""
    head = 8 + 2 + 12 * len(entries) + 4
    fields, values = b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        data = struct.pack(f"<{len(numbers)}{'HI'[kind - 3]}", *numbers)
        if len(data) > 4:
            values, data = values + data, struct.pack("<I", head + len(values))
        fields += struct.pack("<HHI", tag, kind, len(numbers)) + data.ljust(4, b"\0")
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0" + values + rest


def huge_tile() -> bytes:
    """10x10 px in one tile of 25,000 x 25,000."""
    deflate = zlib.compressobj(1)
    data = b"".join(deflate.compress(bytes(25_000)) for _ in range(25_000)) + deflate.flush()
    tags = {256: (3, [10]), 257: (3, [10]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])}
    tags |= {322: (4, [25_000]), 323: (4, [25_000]), 325: (4, [len(data)])}
    return tiff(tags | {324: (4, [8 + 2 + 12 * 10 + 4])}, data)


def many_strips() -> bytes:
    rows = 2_000_000
    tags = {256: (3, [1]), 257: (4, [rows]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    return tiff(tags | {278: (3, [1]), 273: (4, [8] * rows), 279: (4, [1] * rows)})


JPEG = FILES["jpeg"]
COSTLY: dict[str, Callable[[], bytes]] = {
    "scans": lambda: scans(250_000),
    "fill": lambda: JPEG[:20] + b"\xff" * 19_000_000 + JPEG[20:],
    "segments": lambda: JPEG[:20] + b"\xff\xe5\0\x02" * 4_900_000 + JPEG[20:],
    "tile": huge_tile,
    "strips": many_strips,
    "bomb": lambda: png(89_000, 1_000, zlib.compress(bytes(11_126_000))),
    "frames": lambda: encoded(Image.new("RGBA", (9_400, 9_400)), "WEBP", lossless=True),
    "channels": lambda: encoded(Image.new("CMYK", (9_400, 9_400)), "TIFF", compression="tiff_lzw"),
}


@needs_linux
@pytest.mark.full
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", COSTLY)
def test_five_seconds_and_half_a_gigabyte(command: Callable[[str], None], kind: str, checked: bool) -> None:
    command(RUN if checked else UNCHECKED)
    content = COSTLY[kind]()
    assert len(content) <= 20_000_000
    with ImageWorkers(2) as pool, ThreadPoolExecutor(1) as thread:
        pool.load_image(FILES["png"])
        (pid,) = processes(pool)

        def size(name: str) -> int:
            text = Path(f"/proc/{pid}/status").read_text()
            return int(text.split(f"{name}:")[1].split()[0]) >> 10

        idle, peak, before = size("VmSize"), 0, children_seconds()
        job = thread.submit(pool.decode, content, pending=PendingImage("them"))
        while not job.done():
            with contextlib.suppress(OSError, IndexError):
                peak = max(peak, size("VmPeak") - idle)
            assert pool.decode(FILES["gif"], pending=PendingImage("us")).size == (61, 47)
            time.sleep(0.05)  # its computing counts too
        outcome = str(job.exception() or job.result().size)
    seconds = children_seconds() - before
    print(f"{kind}, {'checked' if checked else 'unchecked'}: {seconds:.1f} s, {peak} MiB, {outcome}")
    assert seconds < 6.5 and peak <= 512  # the honest client's pictures and its worker's start included


def children_seconds() -> float:
    """Computed by worker processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
