"""The only connections that the server makes to other hosts: to fetch an image's URL, where that is switched on.

A name is resolved once, all of its addresses must be public, and the connection is made to an address that was checked,
so that a second answer of the name server changes nothing. Redirects are checked in the same way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,252}")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")  # a host that ends so is an address, to be written in the usual way
_UNICAST = ipaddress.IPv6Network(
    "2000::/3"
)  # all of IPv6's public internet; mapped and translated IPv4 is outside
# IANA's special-purpose networks within the rest, some of which Python calls global, and not in every version the same:
# private, shared, of protocols, of documentation, relays and sinks, multicast, reserved; in IPv6 those of protocols
# (Teredo, which holds an IPv4 address, benchmarks, identifiers), documentation, 6to4, 6bone.
_SPECIAL = (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
    "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
    "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3ffe::/16 3fff::/20"
)
_SPECIAL_NETWORKS = tuple(map(ipaddress.ip_network, _SPECIAL.split()))
_ISATAP = 0x5EFE  # before the IPv4 address in an address of a tunnel within a site


class FetchError(ValueError):
    """An image's URL that is not fetched, or could not be."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, and is no way round to one that is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        tunnel = (
            int(ip) >> 32 & 0xFDFF_FFFF == _ISATAP
        )  # one bit says whether the IPv4 address is the only one so
        if ip not in _UNICAST or ip.scope_id or tunnel:
            return False
    return ip.is_global and not any(ip in network for network in _SPECIAL_NETWORKS)


async def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in addresses]


def check_url(url: str) -> tuple[str, str]:
    """The scheme and host of a URL that may be fetched.

    Raises FetchError where it has another scheme or port, a user name, or no plain host name.
    """
    if len(url) > 4096 or not url.isascii() or not url.isprintable() or any(c in url for c in ' \\"<>^`{|}'):
        raise FetchError("the image's URL holds characters that no URL has")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FetchError("the image's URL cannot be read") from None
    if parts.scheme not in PORTS:
        raise FetchError("only http and https URLs are fetched")
    if "@" in parts.netloc:
        raise FetchError("an image's URL may hold no user name or password")
    if port is not None and port != PORTS[parts.scheme]:
        raise FetchError("only the usual ports are fetched from, 80 and 443")
    host = parts.hostname or ""
    numeric = _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]) or ":" in host
    if not (is_public(host) if numeric else _NAME.fullmatch(host)):
        raise FetchError("the image's URL names no public host")
    return parts.scheme, host


class _PublicHosts(httpcore2.AsyncNetworkBackend):
    """Connects only to public addresses, and to the very ones that were checked."""

    def __init__(self) -> None:
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, *rest: Any, **more: Any
    ) -> httpcore2.AsyncNetworkStream:
        try:
            addresses = await resolve_host(host, port)
        except (OSError, UnicodeError):
            raise FetchError("the host of the image's URL is not known") from None
        if not addresses or not all(map(is_public, addresses)):
            raise FetchError("the image's URL names no public host")
        return await self._inner.connect_tcp(addresses[0], port, *rest, **more)


class Fetcher:
    """Fetches images within limits of size and of time, redirects included."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self._max_bytes, self._seconds = max_bytes, seconds

    async def fetch(self, url: str) -> bytes:
        """The file a URL names. Raises FetchError where that is not allowed, missing, too large or too slow."""
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(REDIRECTS + 1):
                    url, content = await self._step(url)
                    if content is not None:
                        return content
        except TimeoutError:
            raise FetchError(f"fetching the image took longer than {self._seconds:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError):
            raise FetchError("the image's host could not be reached") from None
        raise FetchError(f"the image's URL led on more than {REDIRECTS} times")

    async def _step(self, url: str) -> tuple[str, bytes | None]:
        """A URL's file, or where it redirects to."""
        check_url(url)
        headers: dict[bytes | str, bytes | str] = {"host": urlsplit(url).netloc, "accept": "image/*"}
        headers |= {"accept-encoding": "identity", "user-agent": "blip2"}
        async with httpcore2.AsyncConnectionPool(network_backend=_PublicHosts(), max_connections=1) as pool:
            target = urlsplit(url)._replace(fragment="").geturl()
            async with pool.stream("GET", target, headers=headers) as response:
                if response.status in (301, 302, 303, 307, 308):
                    location = dict(response.headers).get(b"location", b"")
                    return urljoin(url, location.decode("latin-1")), None
                if response.status != 200:
                    raise FetchError(f"the image's host answered with status {response.status}")
                content = bytearray()
                async for chunk in response.aiter_stream():
                    content += chunk
                    if len(content) > self._max_bytes:
                        raise FetchError(f"the image is larger than {self._max_bytes:,} bytes")
                return url, bytes(content)
