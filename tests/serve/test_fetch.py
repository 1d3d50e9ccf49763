"""Image URLs: no address but a public one is ever connected to. Name servers are stand-ins, hosts are on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import httpcore2
import pytest
from serving import running_server

import blip2
from blip2.serve import fetch
from blip2.serve.fetch import Fetcher, FetchError, check_url, is_public
from blip2.serve.limits import Limits

Result = TypeVar("Result")

PRIVATE_V4 = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.254", "127.0.0.1",
    "127.0.0.53", "127.255.255.255", "169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1",
    "172.31.255.254", "192.0.0.1", "192.0.0.170", "192.0.2.1", "192.168.0.1", "192.168.1.254",
    "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.9", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.0", "192.88.99.1", "192.88.99.255", "192.0.0.9",
    "192.31.196.1", "192.52.193.77", "192.175.48.6", "192.0.0.255",
]  # fmt: skip
PRIVATE_V6 = [
    "::", "::1", "fe80::1", "febf::1", "fc00::1", "fd00:ec2::254", "fdff::1", "ff02::1", "2001:db8::1",
    "100::1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001:0:7f00:1::",
    "fec0::1", "::7f00:1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b:1:808:808::",
    "2002:808:808::1", "2001:0:808:808::1", "2001:2::1", "2001:3::1", "2001:4:112::1", "2001:10::1", "2001:20::1",
    "2001:30::1", "2001:1ff:ffff::1", "2620:4f:8000::1", "3ffe::1", "3fff::1", "3fff:fff:ffff::1", "5f00::1", "4000::1",
    "100:0:0:1::1", "2600::5efe:10.0.0.1", "2600::200:5efe:8.8.8.8", "2a00::5efe:7f00:1", "ff0e::1", "8000::1",
]  # fmt: skip
PUBLIC = [
    "93.184.215.14", "8.8.8.8", "1.1.1.1", "192.88.98.255", "192.88.100.0", "192.0.3.0", "223.255.255.255",
    "100.128.0.1",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "2001:200::1", "2001:4860:4860::8888", "2003::1", "2a00:1450:4001::1",
]  # fmt: skip


def completed(work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine gives, on a loop of its own: a browser of other tests may have one in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def spellings(address: str) -> set[str]:
    """Ways to write an IPv4 address that some resolver takes for it."""
    a, b, c, d = map(int, address.split("."))
    number = int(ipaddress.IPv4Address(address))
    return {
        address,
        str(number),
        hex(number),
        oct(number).replace("0o", "0"),
        f"{a}.{b}.{c * 256 + d}",
        f"{a}.{b * 65536 + c * 256 + d}",
        ".".join(hex(part) for part in (a, b, c, d)),
        ".".join(f"0{part:o}" for part in (a, b, c, d)),
        f"{a:03}.{b:03}.{c:03}.{d:03}",
        address + ".",
        f"[::ffff:{address}]",
        f"[::ffff:{a * 256 + b:x}:{c * 256 + d:x}]",
        f"[64:ff9b::{a * 256 + b:x}:{c * 256 + d:x}]",
        f"[2002:{a * 256 + b:x}:{c * 256 + d:x}::]",
        f"[::{a * 256 + b:x}:{c * 256 + d:x}]",
        address.replace(".", "。"),
        "".join(chr(ord(char) + 0xFEE0) if char.isdigit() else char for char in address),
    }


DIRECT = sorted({spelling for address in PRIVATE_V4 for spelling in spellings(address)}) + [
    f"[{a}]" for a in PRIVATE_V6
]
URLS = [f"{scheme}://{host}/a.png" for host in DIRECT for scheme in ("http", "https")]
ODD = [
    "file:///etc/passwd", "ftp://example.org/a", "gopher://127.0.0.1:70/_x", "data:image/png;base64,", "//127.0.0.1/",
    "http://user:pw@example.org/", "http://example.org@127.0.0.1/", "http://example.org:22/", "http://example.org:0x50/",
    "http://127.0.0.1\\@example.org/", "http://example.org\r\nHost: a/", "http://exa mple.org/", "http:///a.png",
    "http://[::1%25eth0]/", "http://[fe80::1%eth0]/", "http://example.org:99999/", "http://example.org#@127.0.0.1:22\\/",
    "dict://127.0.0.1:11211/", "HTTP://LOCALHOST/", "http://localhost.:80/", "http://" + "a" * 5000, "http://[::1", "http://",
    "jar:http://127.0.0.1!/", "unix:///run/docker.sock", "http://%31%32%37.0.0.1/", "http://ⓛocalhost/",
]  # fmt: skip


class Canary(BaseHTTPRequestHandler):
    """A host that must get no request, or redirects, or gives a file."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"canary")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def canary() -> Iterator[int]:
    Canary.requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


class World:
    """What the fetcher sees of the network: names with addresses, and every connection that it makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, canary: int) -> None:
        self.names: dict[str, list[list[str]]] = {}  # the answers of the name server, one after another
        self.connected: list[str] = []
        self.pages: dict[str, bytes] = {}  # host -> raw answer
        monkeypatch.setattr(fetch, "resolve_host", self.resolve)
        world = self

        class Backend(httpcore2.AnyIOBackend):
            async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
                world.connected.append(host)
                if host in world.pages:
                    return httpcore2.AsyncMockStream([world.pages[host]])
                # whatever slips through reaches the canary
                return await super().connect_tcp("127.0.0.1", canary)

        monkeypatch.setattr(httpcore2, "AnyIOBackend", Backend)

    async def resolve(self, host: str, port: int) -> list[str]:
        if host in self.names:
            answers = self.names[host]
            return answers.pop(0) if len(answers) > 1 else answers[0]
        # numbers in every spelling are resolved as the system does, without a name server
        addresses = await asyncio.get_running_loop().getaddrinfo(host, port, flags=4)  # AI_NUMERICHOST
        return [str(entry[4][0]) for entry in addresses]

    def fetch(self, url: str, **limits: Any) -> bytes:
        async def run() -> bytes:
            return await Fetcher(**({"max_bytes": 1000, "seconds": 5} | limits)).fetch(url)

        return completed(run())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, canary: int) -> World:
    return World(monkeypatch, canary)


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_there_are_a_thousand_cases() -> None:
    assert 2 * len(URLS) + len(ODD) + 3 * len(PRIVATE_V4 + PRIVATE_V6) >= 1000


def test_only_public_addresses_are_public() -> None:
    assert all(map(is_public, PUBLIC))
    assert not any(
        map(is_public, PRIVATE_V4 + PRIVATE_V6 + ["", "x", "fe80::1%eth0", "2600::1%eth0", "::ffff:10.0.0.1"])
    )


def test_no_private_address_is_reached_directly(world: World) -> None:
    async def run() -> list[str]:
        through = []
        for url in URLS + ODD:
            with contextlib.suppress(FetchError):
                through.append(url + repr(await Fetcher(1000, 5).fetch(url)))
        return through

    assert completed(run()) == [] and world.connected == [] and Canary.requests == 0


def test_no_private_address_is_reached_by_redirect(world: World) -> None:
    world.names["public.example"] = [["93.184.215.14"]]

    async def run() -> list[str]:
        through = []
        for url in URLS + ODD:
            if "\r" not in url:  # which would be a header of its own
                world.pages["93.184.215.14"] = redirect(url)
            with contextlib.suppress(FetchError):
                through.append(url + repr(await Fetcher(1000, 5).fetch("http://public.example/a.png")))
        return through

    assert completed(run()) == []
    assert set(world.connected) == {"93.184.215.14"} and Canary.requests == 0


def test_no_private_address_is_reached_by_name(world: World) -> None:
    for address in PRIVATE_V4 + PRIVATE_V6:
        for answers in ([[address]], [["93.184.215.14", address]], [[address, "8.8.8.8"]]):
            world.names["name.example"] = answers
            with pytest.raises(FetchError, match="no public host"):
                world.fetch("http://name.example/a.png")
    world.names["none.example"] = [[]]
    with pytest.raises(FetchError):
        world.fetch("http://none.example/")
    assert world.connected == [] and Canary.requests == 0


def test_the_address_that_was_checked_is_the_one_connected_to(world: World) -> None:
    """A name server whose second answer is another (DNS rebinding) gains nothing."""
    world.names["rebind.example"] = [["93.184.215.14"], ["127.0.0.1"]]
    world.pages["93.184.215.14"] = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfile"
    assert world.fetch("http://rebind.example/a.png") == b"file"
    assert world.connected == ["93.184.215.14"] and Canary.requests == 0
    world.names["rebind.example"] = [["93.184.215.14"], ["127.0.0.1"]]
    world.pages["93.184.215.14"] = redirect("http://rebind.example/again")
    with pytest.raises(FetchError, match="no public host"):
        world.fetch("http://rebind.example/a.png")
    assert Canary.requests == 0


def test_bounds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.names["public.example"] = [["8.8.8.8"]]
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000
    for page, message in (
        (long, "larger"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
        (redirect("/again"), "led on"),
        (b"nonsense", "reached"),
        (b"", "reached"),
    ):
        world.pages["8.8.8.8"] = page
        with pytest.raises(FetchError, match=message):
            world.fetch("http://public.example/a.png")
    world.pages["8.8.8.8"] = redirect("/b") + b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
    with pytest.raises(FetchError):
        world.fetch("http://public.example/a.png")

    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(30)
        return []

    monkeypatch.setattr(fetch, "resolve_host", slow)
    with pytest.raises(FetchError, match="longer"):
        world.fetch("http://public.example/a.png", seconds=0.1)


@pytest.mark.parametrize(
    "url", ["http://example.org/a.png?b=c", "https://example.org:443/", "HTTPS://EXAMPLE.ORG/a"]
)
def test_usual_urls_may_be_fetched(url: str) -> None:
    assert check_url(url)[1] == "example.org"


def test_the_server_fetches_only_where_that_is_switched_on(
    predictor: blip2.Predictor, images: list[bytes], world: World
) -> None:
    world.names["public.example"] = [["8.8.8.8"]]
    world.pages["8.8.8.8"] = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(images[0]) + images[0]
    payload = {"image": "http://public.example/a.jpg", "num_beams": 1}
    with running_server(predictor, fetch_urls=True) as running, running.client() as client:
        reply = client.post("/caption", json=payload)
        assert reply.json()["captions"][0]["text"] == predictor.caption(images[0], num_beams=1)
        inside = client.post("/caption", json=payload | {"image": "http://127.0.0.1/a.jpg"})
        assert inside.status_code == 400 and "no public host" in inside.json()["error"]["message"]
    assert world.connected == ["8.8.8.8"]


def test_images_that_are_fetched_are_counted_first_and_held_within_the_budget(
    predictor: blip2.Predictor, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[str]()

    async def give(_: Fetcher, url: str) -> bytes:
        fetched.append(url)
        return images[0]

    monkeypatch.setattr(Fetcher, "fetch", give)
    limits = Limits(images=3, bodies_bytes=2 * len(images[0]) + 10_000)
    with running_server(predictor, limits, fetch_urls=True) as running, running.client() as client:

        def embed(count: int) -> int:
            urls = [f"https://example.org/{i}.jpg" for i in range(count)]
            return client.post("/embed", json={"images": urls}).status_code

        assert embed(2) == 200 and len(fetched) == 2
        assert embed(1000) == 400 and len(fetched) == 2
        assert embed(3) == 503
        assert embed(2) == 200  # what was held is given back


@pytest.mark.parametrize("slow", ["resolve", "connect", "read"])
def test_a_fetch_ends_with_its_request(
    predictor: blip2.Predictor, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """At the request's deadline, and when the client leaves, whatever the fetch waits for then."""
    waiting, ended = threading.Event(), threading.Event()

    async def wait(*_: object, **__: object) -> Any:
        try:
            waiting.set()
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8"] if slow != "resolve" else await wait()

    class Backend(httpcore2.AnyIOBackend):
        async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
            stream = httpcore2.AsyncMockStream([])
            monkeypatch.setattr(stream, "read", wait)
            return stream if slow == "read" else await wait()

    monkeypatch.setattr(fetch, "resolve_host", resolve)
    monkeypatch.setattr(httpcore2, "AnyIOBackend", Backend)
    body = b'{"image": "http://public.example/a.png"}'
    with running_server(predictor, Limits(request_seconds=1), fetch_urls=True) as running:
        with running.client() as client:
            began = time.monotonic()
            late = client.post("/caption", content=body, headers={"content-type": "application/json"})
            assert late.status_code == 504 and 1 <= time.monotonic() - began < 3
        assert ended.wait(1)
    waiting.clear()
    ended.clear()
    with running_server(predictor, fetch_urls=True) as running:
        with running.connect() as connection:
            head = b"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert waiting.wait(10)
        assert ended.wait(1)
