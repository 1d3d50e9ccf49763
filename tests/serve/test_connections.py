"""Where the server listens, how many connections it holds, requests that two programs may read in different ways, and
that its log is one of JSON throughout."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import EXAMPLES, Running, running_server

import blip2
from blip2.serve import connections, logs
from blip2.serve.limits import Limits
from blip2.serve.run import run_server

ROOT = Path(__file__).parents[2]
HEAD = b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"  # what another program may take for a request of its own


# --- requests that two programs may read in different ways ----------------------------------------------------------

AMBIGUOUS = {
    "both": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "both, in other letters": b"tRANSFER-eNCODING: Chunked\r\nCONTENT-LENGTH: 0\r\n\r\n0\r\n\r\n",
    "both, an encoding that is none": b"Content-Length: 2\r\nTransfer-Encoding: identity\r\n\r\n{}",
    "two lengths": b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}",
    "the same length twice": b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": b"Content-Length: 2, 2\r\n\r\n{}",
    "a list of different lengths": b"Content-Length: 2, 40\r\n\r\n{}",
    "a signed length": b"Content-Length: +2\r\n\r\n{}",
    "a negative length": b"Content-Length: -2\r\n\r\n{}",
    "a length in hexadecimal": b"Content-Length: 0x2\r\n\r\n{}",
    "a length with an underscore": b"Content-Length: 0_2\r\n\r\n{}",
    "a length of nothing": b"Content-Length: \r\n\r\n{}",
    "a length of many digits": b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a list of encodings": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "another encoding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "an encoding with a parameter": b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "a control character": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded header": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a folded length": b"Content-Length: 2\r\n\t0\r\n\r\n{}",
    "line feeds alone": b"X-a: b\nContent-Length: 2\r\n\r\n{}",
    "a line feed before the body": b"Content-Length: 2\r\n\n{}",
    "a carriage return alone": b"X-a: b\rContent-Length: 2\r\n\r\n{}",
    "a null": b"X-a: b\0c\r\nContent-Length: 2\r\n\r\n{}",
    "a header without a name": b": b\r\nContent-Length: 2\r\n\r\n{}",
    "no colon": b"Content-Length 2\r\n\r\n{}",
    "two hosts": b"Host: localhost\r\nContent-Length: 2\r\n\r\n{}",
    "a chunk of a negative size": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk with a prefix": b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk larger than it says": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}}}\r\n0\r\n\r\n",
    "a chunk that ends in line feeds": b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
}
WHOLE = {
    "1.0 with an encoding": HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "1.2": HEAD.replace(b"1.1", b"1.2") + b"Content-Length: 2\r\n\r\n{}",
    "2.0": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "0.9": b"GET /health\r\n\r\n",
    "two spaces": HEAD.replace(b" /", b"  /") + b"Content-Length: 2\r\n\r\n{}",
    "no host": HEAD.replace(b"Host: localhost\r\n", b"") + b"Content-Length: 2\r\n\r\n{}",
    "a space before the first header": HEAD.replace(b"\r\nHost", b"\r\n Host") + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "long headers": HEAD + b"X-a: " + b"a" * 100_000 + b"\r\n\r\n",
}
CASES = {name: HEAD + rest for name, rest in AMBIGUOUS.items()} | WHOLE


def answers(running: Running, request: bytes, pieces: int = 1) -> bytes:
    """All that the server sends until it closes the connection."""
    received = b""
    size = -(-len(request) // pieces) or 1
    with running.connect() as sock:
        for start in range(0, len(request), size):
            try:
                sock.sendall(request[start : start + size])
            except OSError:
                break
            time.sleep(0.01 if pieces > 1 else 0)
        try:
            while piece := sock.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    return received


@pytest.mark.parametrize("case", CASES)
def test_ambiguous_requests_are_refused_and_the_connection_is_closed(server: Running, case: str) -> None:
    request = CASES[case]
    for pieces in (1, 7):
        received = answers(server, request + HIDDEN, pieces)
        assert re.match(rb"HTTP/1.1 400 ", received) and b"connection: close" in received.lower(), received
        assert received.count(b"HTTP/1.1 ") == 1 and b"404" not in received  # the hidden one was not read
        assert b'{"error":' in received and b"invalid_request_error" in received


def test_sound_requests_are_let_through(server: Running) -> None:
    """However they arrive, one after another on a connection."""
    length = HEAD + b"Content-Length: 2\r\n\r\n{}"
    chunked = HEAD + b"Transfer-Encoding: Chunked\r\n\r\n1\r\n{\r\n1;a=b\r\n}\r\n0\r\nX-trailer: c\r\n\r\n"
    last = HIDDEN[:-2] + b"Connection: close\r\nContent-Length: 0\r\n\r\n"
    for pieces in (1, 3, 50):
        received = answers(server, length + chunked + length + last, pieces)
        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"400", b"400", b"400", b"404"]
        assert received.count(b'"image: ') == 3  # which the body lacks


# --- how many connections -------------------------------------------------------------------------------------------


def test_idle_connections_make_room_for_others(predictor: blip2.Predictor) -> None:
    with running_server(predictor, Limits(connections=10)) as running:
        idle = [running.connect() for _ in range(60)]
        for sock in idle[:40:4]:
            try:
                sock.sendall(HEAD[:30])  # a request that never ends is none either
            except OSError:
                continue
        for _ in range(5):
            with running.client() as client:
                assert client.get("/health").status_code == 200
        for sock in idle:
            sock.close()


def test_requests_at_work_do_not_make_room(
    predictor: blip2.Predictor, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    with running_server(predictor, Limits(connections=3)) as running:
        prepare = running.engine.prepare_image
        monkeypatch.setattr(
            running.engine, "prepare_image", lambda *a, **k: (opened.wait(30), prepare(*a, **k))[1]
        )
        answered: list[int] = []

        def ask() -> None:
            with running.client() as client:
                answered.append(client.post("/caption", files={"image": images[0]}).status_code)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        received = answers(running, b"")
        assert b" 503 " in received and b"retry-after: 1" in received and b"overloaded" in received
        opened.set()
        for thread in asking:
            thread.join()
        assert answered == [200] * 3


class Process:
    """`blip2 serve` in a process that may open so many files; `lines`: its log."""

    def __init__(self, log: Path, files: int | None, *options: str) -> None:
        self.log = log
        code = "import resource, sys, runpy\n"
        if files is not None:
            code += f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
        code += "sys.argv = ['blip2', 'serve', '--port', '0', *sys.argv[1:]]\n"
        code += "runpy.run_module('blip2', run_name='__main__')"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *options], stderr=log.open("wb"), env=environment
        )
        self.url = str(self.wait_for("listening")["url"])
        self.port = int(self.url.rpartition(":")[2])
        self.wait_for("ready")

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for(self, event: str) -> dict[str, Any]:
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            text = self.log.read_text()
            for line in text[: text.rfind("\n") + 1].splitlines():
                if json.loads(line)["event"] == event:
                    found: dict[str, Any] = json.loads(line)
                    return found
            time.sleep(0.05)
        pytest.fail(f"the server did not start: {self.log.read_text()}")

    def caption(self) -> int:
        file = {"image": (EXAMPLES / "rose.jpg").read_bytes()}
        with httpx2.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            return client.post("/caption", files=file).status_code


@contextmanager
def process(log: Path, files: int | None, *options: str) -> Iterator[Process]:
    made = Process(log, files, *options)
    try:
        yield made
    finally:
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(60) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("files", [64, 200])
def test_connections_stay_below_the_open_files(tmp_path: Path, files: int) -> None:
    with process(tmp_path / "log", files) as server:
        (entry,) = [line for line in server.lines if line["event"] == "limit"]
        assert 0 < entry["lowered_to"] < files and str(files) in entry["because"]
        opened = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * files)]
        assert server.caption() == 200
        for sock in opened:
            sock.close()
        assert server.caption() == 200
        assert not [line for line in server.lines if "accept" in str(line)]
    assert server.lines[-1]["message"].startswith("Finished")


def test_without_files_for_connections_the_server_does_not_start(tmp_path: Path) -> None:
    code = (
        "import resource, os\nfrom blip2.serve.run import run_server\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "try: run_server(lambda: os._exit(3), model='m', port=0)\n"
        "except ValueError as error: assert 'ulimit -n' in str(error)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        == 0
    )


def test_where_accepting_fails_it_is_logged_once_a_second_and_the_server_recovers(tmp_path: Path) -> None:
    """Files that something else takes: here the limit sinks while the server runs."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("another process's limit cannot be changed here")
    with process(tmp_path / "log", 256) as server:
        in_use = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (in_use + 2, 256))
        opened = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
        time.sleep(3.2)
        errors = [line for line in server.lines if "accept" in str(line)]
        assert 1 <= len(errors) <= 5
        for sock in opened:
            sock.close()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (256, 256))
        assert server.caption() == 200


# --- where it listens -----------------------------------------------------------------------------------------------


def missed() -> blip2.Predictor:
    raise AssertionError("the model is loaded before the address is tried")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a port above all": ({"port": 99999}, "--port 99999.* 0 .* to 65535"),
    "a negative port": ({"port": -1}, "0 .* to 65535"),
    "a huge port": ({"port": 10**30}, "0 .* to 65535"),
    "a host that is none": ({"host": "nosuchhost.invalid"}, "no such address or host"),
    "a host no name can be": ({"host": "a" * 300}, "no such address or host"),
    "an address in brackets": ({"host": "[::1]"}, "no such address or host"),
    "another machine's": ({"host": "203.0.113.9"}, "does not have that address"),
    "another machine's, IPv6": ({"host": "2001:db8::1"}, "does not have that address"),
    "open to others": ({"host": "0.0.0.0", "port": 0}, "--api-key-file"),
    "open to others by default": ({"host": "", "port": 0}, "--api-key-file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_addresses_are_found_before_the_model_is_loaded(case: str) -> None:
    where, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as raised:
        run_server(missed, model="m", **where)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("listening", [True, False])
def test_a_busy_port_is_found_before_the_model_is_loaded(host: str, listening: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listening:
            taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port} is taken by another program"):
            run_server(missed, model="m", host=host, port=port)


def test_a_wrong_address_is_one_line_and_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "blip2", "serve", "--port", str(taken.getsockname()[1])]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"blip2: port \d+ is taken by another program; .*\n", done.stderr)


def test_addresses_to_open() -> None:
    for host, shown in (
        ("127.0.0.1", r"http://127\.0\.0\.1:\d+"),
        ("", r"http://(127\.0\.0\.1|\[::1\]):\d+"),
    ):
        sockets = connections.bound_sockets(host, 0)
        assert re.fullmatch(shown, connections.address_to_open(sockets[0]))
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        for sock in sockets:
            sock.close()


def test_an_address_may_name_its_link() -> None:
    """As fe80::1%eth0 does; without the link it is no address."""
    links = [(line.split()[0], line.split()[-1]) for line in own_addresses() if line.startswith("fe80")]
    if not links:
        pytest.skip("this machine has no such address")
    digits, link = links[0]
    (sock,) = connections.bound_sockets(f"{ipaddress.ip_address(bytes.fromhex(digits))}%{link}", 0)
    with sock:
        assert sock.getsockname()[3] == socket.if_nametoindex(link)


def own_addresses() -> list[str]:
    table = Path("/proc/net/if_inet6")
    return table.read_text().splitlines() if table.exists() else []


def test_small_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY an answer in two parts takes 40 ms more."""

    async def serve_one() -> int:
        accepted: asyncio.Queue[int] = asyncio.Queue()

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            accepted.put_nowait(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (sock,) = connections.bound_sockets("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=sock):
            await asyncio.open_connection(*sock.getsockname())
            return await accepted.get()

    with ThreadPoolExecutor(1) as thread:  # another test's event loop may run in this one
        assert thread.submit(lambda: asyncio.run(serve_one())).result()


# --- the log --------------------------------------------------------------------------------------------------------

ODD = {
    "print": lambda: print("plain\nlines\x1b[31m", file=sys.stderr),
    "warning": lambda: warnings.warn("a warning", stacklevel=1),
    "thread": lambda: threading.Thread(target=lambda: 1 / 0).start(),
    "library": lambda: logs.logging.getLogger("some.library").warning("{not json %s", "at all"),
    "bad arguments": lambda: logs.logging.getLogger("blip2.serve").error("%d", "x"),
    "half an object": lambda: logs.logging.getLogger("blip2.serve").error('{"event": '),
    "surrogates": lambda: print("caf\udce9", file=sys.stderr),
    "unraisable": lambda: Unraisable().append(1),
}


class Unraisable(list[int]):
    def __del__(self) -> None:
        raise ValueError("in a destructor")


@pytest.mark.parametrize("terminal", [False, True])
def test_all_lines_are_json_and_at_a_terminal_harmless(terminal: bool) -> None:
    program = (
        f"import sys, threading; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"sys.stderr.isatty = lambda: {terminal}\n"
        "from test_connections import ODD\nfrom blip2.serve import logs\n"
        "logs.log_to_stderr()\n"
        "with logs.stray_lines_logged():\n"
        "    for name, odd in ODD.items():\n"
        "        logs.log_event(name)\n"
        "        odd()\n"
        "        [one.join() for one in threading.enumerate() if one is not threading.main_thread()]\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    lines = done.stderr.decode(errors="surrogateescape").split("\n")[:-1]
    assert done.returncode == 0, done.stderr
    if terminal:  # there what is printed stays as it is
        assert "\x1b" not in "".join(line for line in lines if not line.startswith("lines"))
        starts = [re.match(r"\d\d:\d\d:\d\d (\w.*)", line) for line in lines]
        assert set(ODD) <= {start[1] for start in starts if start}
    else:
        entries = [json.loads(line) for line in lines]
        assert all({"time", "level", "event"} <= entry.keys() for entry in entries)
        events = [entry["event"] for entry in entries]
        assert [event for event in events if event != "message"] == list(ODD)
        assert all(events[events.index(name) + 1 :][:1] == ["message"] for name in ODD)


def test_the_log_of_a_server_is_json_whatever_comes(tmp_path: Path) -> None:
    with process(tmp_path / "log", None) as server:
        running = Running.__new__(Running)
        running.port = server.port
        for case in list(CASES.values())[::5]:
            answers(running, case)
        for path in ("/%1b[31m%0a%0d", "/\\x1b]0;a", "/{}", '/"quoted"'):
            answers(
                running,
                b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            )
        answers(running, HEAD + b"Upgrade: h2c\r\nConnection: Upgrade, close\r\nContent-Length: 2\r\n\r\n{}")
        assert server.caption() == 200
    assert len(server.lines) > 10 and server.lines[0]["event"] == "listening"
    assert "\x1b" not in server.log.read_text()
