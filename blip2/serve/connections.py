"""Connections: where the server listens, how many it holds, which requests are no sound HTTP, and deadlines.

uvicorn's HTTP/1.1 with what it lacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.logs import log_event

ACCEPTED_AT_ONCE = 4  # connections taken from the queue in a turn of the event loop
ACCEPTED_TOO_MANY = 4 * ACCEPTED_AT_ONCE  # before the first for which there is no room is closed again
OTHER_FILES = 20  # that the process may need to open at a time: images, weights, pipes
FEWEST_CONNECTIONS = 4
HEAD_BYTES = 16_384  # of a request line and its headers
PIPELINED_BYTES = 65_536  # of further requests, read before the one at work is answered
CUTTING_SECONDS = 1.5  # after a request's deadline, until its connection is cut

_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_HEAD = re.compile(rb".*?\n\r?\n", re.DOTALL)


# --- where it listens -----------------------------------------------------------------------------------------------


class _Listener(socket.socket):
    """A listening socket that asyncio asks for connections."""

    _pausing_until = 0.0

    def listen(self, backlog: int = 0, /) -> None:
        """As many wait as the system allows: asyncio's `backlog` is also how many it accepts at once."""
        super().listen(2048)

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection. Where there are no resources for it, asyncio tries again a second later, but would
        before that try `backlog` times."""
        if time.monotonic() < self._pausing_until:
            raise BlockingIOError
        try:
            return super().accept()
        except OSError as error:
            if error.errno in _NO_RESOURCES:
                self._pausing_until = time.monotonic() + 0.5
            raise


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of a host that this machine has, which are to be listened on; "": for all it has.

    Raises:
        ValueError: a port or host that cannot be.
        OSError: the port is taken, or may not be taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: a port is a number from 0 (any that is free) to 65535")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ValueError(f"--host {host}: there is no such address or host name") from None
    addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as failing:
        for family, address in addresses:
            # Only of a socket that is known as TCP's does asyncio send small answers at once (TCP_NODELAY).
            sock = failing.enter_context(_Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            try:
                # with what else an address of IPv6 has: a link's own names the link
                _bind(sock, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno in _ABSENT:  # a name may have addresses of a protocol that this machine lacks
                    continue
                raise _not_free(port, error) from None
            port = int(sock.getsockname()[1])  # the same for all, where any will do
            sockets.append(sock)
        if not sockets:
            raise ValueError(f"--host {host}: this machine does not have that address")
        failing.pop_all()
    return sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Begin to listen. Raises OSError where another program was faster."""
    for sock in sockets:
        try:
            sock.listen()
        except OSError as error:
            raise _not_free(sock.getsockname()[1], error) from None


def _bind(sock: socket.socket, address: tuple[object, ...]) -> None:
    if os.name == "posix":  # elsewhere it would share the port with another program
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(address)


def _not_free(port: int, error: OSError) -> OSError:
    if error.errno == errno.EADDRINUSE:
        return OSError(f"port {port} is taken by another program; choose another with --port")
    return OSError(f"cannot listen on port {port}: {error.strerror}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_to_open(sock: socket.socket) -> str:
    """The URL at which a browser on this machine finds a listening socket."""
    host, port = sock.getsockname()[:2]
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified:
        ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
    return f"http://[{ip}]:{port}" if ip.version == 6 else f"http://{ip}:{port}"


# --- how many it holds ----------------------------------------------------------------------------------------------


def fit_open_files(limits: Limits, *, fetch_urls: bool) -> Limits:
    """The limits with no more connections than the files that the process may open leave room for; a fetch is one too.

    Raises ValueError where that is hardly any.
    """
    try:
        import resource

        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        in_use = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # not this kind of system
        return limits
    if allowed == resource.RLIM_INFINITY:
        return limits
    room = allowed - in_use - OTHER_FILES - ACCEPTED_TOO_MANY
    connections = room // 2 if fetch_urls else room
    if connections < FEWEST_CONNECTIONS:
        raise ValueError(f"this process may open {allowed} files, too few for a server; raise `ulimit -n`")
    if connections >= limits.connections:
        return limits
    reason = f"this process may open {allowed} files (ulimit -n)"
    log_event("limit", limit="connections", lowered_to=connections, because=reason)
    return replace(limits, connections=connections)


# --- what is no sound HTTP ------------------------------------------------------------------------------------------


class _SoundRequests(h11.Connection):
    """Refuses requests whose end another program on the way may see elsewhere (request smuggling)."""

    fault = ""  # of the last request

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        received = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        try:
            event = super().next_event()
            head = _HEAD.match(received)
            if isinstance(event, h11.Request) and head and (fault := _fault(event, head[0])):
                raise h11.RemoteProtocolError(fault)
        except h11.RemoteProtocolError as error:
            reason = str(error).partition(": bytearray")[0]  # not what was sent
            self.fault = f"the request is no sound HTTP: {reason}"
            raise
        return event


def _fault(request: h11.Request, head: bytes) -> str | None:
    """What is ambiguous in a request's head, which h11 has read leniently."""
    if request.http_version not in (b"1.0", b"1.1"):
        return "its version is neither 1.0 nor 1.1"
    if len(head) > HEAD_BYTES:
        return f"its head is larger than {HEAD_BYTES:,} bytes"
    lines = head.split(b"\r\n")
    if b"\n" in b"".join(lines):
        return "a line of its head ends in LF alone, not in CR LF"
    if any(line.startswith((b" ", b"\t")) for line in lines):
        return "a header is folded over several lines"
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    lengths = names.count(b"content-length")
    if b"transfer-encoding" in names and lengths:
        return "it has both Transfer-Encoding and Content-Length"
    if b"transfer-encoding" in names and request.http_version == b"1.0":
        return "1.0 has no Transfer-Encoding"
    if lengths > 1 or (lengths and b"," in lines[1 + names.index(b"content-length")]):
        return "it has several values of Content-Length"
    return None


# --- deadlines ------------------------------------------------------------------------------------------------------


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 within limits of connections and of time: for a request's headers, for a client that does not
    read, and for the whole request, should the application not keep to it."""

    limits: Limits
    waiting: dict[Connection, None]  # the server's connections with no request at work, in the order of time
    _timers: dict[str, asyncio.TimerHandle]
    _idle = False  # all requests so far are answered, of which there are some, and no other has begun

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self._requests = _SoundRequests(h11.SERVER, HEAD_BYTES)
        self._timers = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=0)  # writing pauses where anything is left unread
        super().connection_made(transport)
        self._begin_request()
        self._note_phase()
        if len(self.connections) > self.limits.connections:
            oldest = next(iter(self.waiting))
            if oldest is self:
                message = "too many connections; try again soon"
                self._answer(ApiError(503, message, code="overloaded", headers={"retry-after": "1"}))
            else:
                del self.waiting[oldest]
                oldest.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._idle:
            self._begin_request()
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < PIPELINED_BYTES:
            self.flow.resume_reading()  # so that it is noticed when the client leaves
        self._note_phase()

    def on_response_complete(self) -> None:
        self._begin_request()
        super().on_response_complete()  # which may begin the next request
        self._unset_keepalive_if_required()  # there is a deadline of ours
        self._note_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop_timer(name)
        self.waiting.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("write", min(self.limits.write_seconds, self._time_left()), self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer("write")

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP; `msg` is the same for all."""
        self._answer(ApiError(400, self._requests.fault))

    def _answer(self, error: ApiError) -> None:
        """Answer in the application's place, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": f"{len(body)}"}
            headers |= {"connection": "close"} | error.headers
            events = (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _begin_request(self) -> None:
        """A request's time counts from now; it finds this in its state."""
        self._idle = False
        self.app_state = self.app_state | {"began": time.monotonic()}
        self._stop_timer("request")
        self._start_timer("request", self._time_left(), self._cut)

    def _time_left(self) -> float:
        began: float = self.app_state["began"]
        return began + self.limits.request_seconds + CUTTING_SECONDS - time.monotonic()

    def _cut(self) -> None:
        if not self._idle:
            self.transport.abort()

    def _note_phase(self) -> None:
        """While a request is at work its own deadlines count, and its connection is not closed for another's."""
        at_work = self.cycle is not None and not self.cycle.response_complete
        begun = self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
        self._idle = not at_work and self.cycle is not None and not begun
        if at_work or self.transport.is_closing():
            self.waiting.pop(self, None)
        else:
            self.waiting.setdefault(self)
        if at_work or self._idle:
            self._stop_timer("header")
        else:
            self._start_timer("header", self.limits.header_seconds, self.transport.close)
        if self._idle:
            self._start_timer("idle", self.limits.idle_seconds, self.transport.close)
        else:
            self._stop_timer("idle")

    def _start_timer(self, name: str, seconds: float, end: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(max(seconds, 0), end)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


def http_protocol(limits: Limits) -> type[Connection]:
    """The protocol of one server's connections."""
    return type("Connection", (Connection,), {"limits": limits, "waiting": {}})
