"""The HTTP server of the door: uvicorn, in a thread of this process, with connections that do not outlive their use.

Serve's own HTTP proxy is not used. It takes bodies into memory faster than a replica reads them, without a limit, and a
client's headers switch its timeout off. Here the parser is h11, which bounds a request's head, and
:class:`Connection` ends what uvicorn would wait for: heads, replies and rests of bodies that do not come to an end.
"""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from actors.http_gate import Gate, Intake
from simulator.errors import InputError

#: seconds that a connection may spend in a phase: until a head has come whole, which also ends what is left of a body
#: after the reply; from the head to the reply; and until the reply was taken
SECONDS = {"head": 10.0, "request": 420.0, "reply": 60.0}
#: seconds of CPU that the parser may spend on one request, and on each of its bytes: a body in chunks of one byte takes
#: a hundred times more
PARSE_SECONDS, PARSE_SECONDS_A_BYTE = 0.1, 5e-8
#: bytes that are parsed between two looks at that
SLICE = 4 << 10
#: seconds that one slice counts at most: a collection of garbage, which takes longer, may fall into it
SLICE_SECONDS = 0.02
#: bytes of a request that are read after its reply: a client may read the reply only when it has sent everything
REST = 32 << 20
#: bytes of a request's head at most
HEAD = 16 << 10
#: seconds between two looks at a connection
LOOK = 0.5
#: file handles that are left to the rest of the process
SPARE_FILES = 200
#: connections that wait to be accepted at most
BACKLOG = 1024


class Connection(H11Protocol):
    """uvicorn's connection, with an end to every phase."""

    def __init__(self, *args: Any, most: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._most, self._spent, self._phase, self._since = most, 0.0, ("head", 0), 0.0
        self._timed: object = None
        self._parsed, self._rest = 0, 0
        self._look_again: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come. One too many is cut off."""
        super().connection_made(transport)
        self._since = self.loop.time()
        if len(self.connections) > self._most:
            transport.abort()
            return
        self._look_again = self.loop.call_later(LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was cut off."""
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come. They are parsed in slices, and what takes the parser too long is cut off."""
        # a body of known length is one piece to the parser, whatever is in it
        whole = self.cycle is not None and any(name == b"content-length" for name, _ in self.headers)
        step = max(1, len(data)) if whole else SLICE
        for start in range(0, len(data), step):
            if self.transport.is_closing():
                return
            self._parse(data[start : start + step])

    def _parse(self, data: bytes) -> None:
        before = time.thread_time()
        super().data_received(data)
        if self.cycle is not self._timed:
            self._timed, self._spent, self._parsed, self._rest = self.cycle, 0.0, 0, 0
        self._spent += min(time.thread_time() - before, SLICE_SECONDS)
        self._parsed += len(data)
        if self.cycle is not None and self.cycle.response_complete:
            self._rest += len(data)
        if self._spent > PARSE_SECONDS + PARSE_SECONDS_A_BYTE * self._parsed or self._rest > REST:
            self.transport.abort()

    def _look(self) -> None:
        now, phase = self.loop.time(), (self._named(), id(self.cycle))
        if phase != self._phase:
            self._phase, self._since = phase, now
        if now - self._since > SECONDS[phase[0]]:
            self.transport.abort()
            return
        self._look_again = self.loop.call_later(LOOK, self._look)

    def _named(self) -> str:
        if self.cycle is not None and not self.cycle.response_complete:
            return "request"
        return "reply" if self.transport.get_write_buffer_size() else "head"


class Server:
    """An application that is served at a socket, by a thread.

    Args:
        app: an ASGI application.
        place: a socket that listens (see :func:`bound`).
        most: connections at once.
        tls: files of the certificate and its key; None without TLS.

    Raises:
        InputError: the certificate or the key cannot be used.
    """

    def __init__(
        self, app: Any, place: socket.socket, *, most: int = 2000, tls: tuple[Path, Path] | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(Connection, most=min(most, _files() - SPARE_FILES)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEAD,
            backlog=BACKLOG,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise InputError(f"--tls-cert {tls and tls[0]} --tls-key {tls and tls[1]}: {error}") from None
        self.uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(place),), daemon=True, name="door")
        self._thread.start()
        while not self.uvicorn.started and self._thread.is_alive():
            time.sleep(0.01)

    async def _serve(self, place: socket.socket) -> None:
        await self.uvicorn.serve(sockets=[place])
        for left in list(self.uvicorn.server_state.connections):  # such as TLS clients that do not say goodbye
            left.transport.abort()
        await asyncio.sleep(0.1)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self.uvicorn.server_state.connections)

    def close(self) -> None:
        """Ends the server; requests under way are given up after a few seconds."""
        self.uvicorn.should_exit = True
        self._thread.join()


@contextmanager
def serving(
    gate: Gate,
    intake: Intake,
    place: socket.socket,
    control: socket.socket | None,
    *,
    most: int,
    tls: tuple[Path, Path] | None,
    drain: float,
) -> Iterator[None]:
    """The door is open inside the block, and ``/healthz`` and ``/metrics`` at a socket of their own.

    At the end of the block new requests get 503, and those under way are waited for, ``drain`` seconds at most.
    """
    server = Server(gate, place, most=most, tls=tls)
    beside = Server(control_app(gate, intake, server), control) if control else None
    try:
        yield
    finally:
        gate.draining = True
        deadline = time.monotonic() + drain
        try:
            while gate.under_way and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:  # a second Ctrl-C does not wait
            server.close()
            if beside:
                beside.close()


def control_app(gate: Gate, intake: Intake, server: Server) -> Starlette:
    """``/healthz`` and ``/metrics`` (Prometheus), for the owner: not for the port that the world sees."""

    def healthz(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ending", 503) if gate.draining else PlainTextResponse("ok")

    def metrics(_: Request) -> PlainTextResponse:
        lines = [
            "# TYPE exsim_door_replies_total counter",
            *(f'exsim_door_replies_total{{status="{code}"}} {count}' for code, count in sorted(gate.replies.items())),
            *(
                f"# TYPE exsim_door_{name} gauge\nexsim_door_{name} {value}"
                for name, value in (
                    ("connections", server.connections),
                    ("requests_under_way", gate.under_way),
                    ("body_bytes", intake.held.total()),
                )
            ),
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return Starlette(routes=[Route("/healthz", healthz), Route("/metrics", metrics)])


def _files() -> int:
    """File handles that this process may have, after asking for enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def bound(host: str, port: int, name: str = "--port") -> socket.socket:
    """A socket that listens at the port. Nobody else can take it; a client that comes before the door opens waits.

    Raises:
        InputError: the port is busy, or the host is none of this machine's.
    """
    place = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind)
        # what a closed server leaves waiting is no hindrance
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        if place is not None:
            place.close()
        raise InputError(f"--host {host} {name} {port}: {getattr(error, 'strerror', None) or error}") from None
    return place
