"""What a request to the HTTP door meets before anybody reads its body: rates, places, and the time it may take.

:class:`Gate` is an ASGI application around the door's. It finds the account of the token, counts the request against
its account and its address, and sends the next one away with 429 and ``Retry-After``. :class:`Intake` reads bodies: of
limited length, in limited time, in limited memory. ``/healthz`` passes both.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from actors.http_body import Refusal

#: seconds after which a body has to be there, if it is small
BODY_SECONDS = 10.0
#: bytes a second that the rest of a larger body has to come with
BODY_RATE = 64 << 10
#: bytes of bodies that are held at once: of one account, and of all
ACCOUNT_ROOM, ROOM = 64 << 20, 256 << 20
#: buckets that are remembered; the one that was used the longest ago is forgotten first, as if it were full
BUCKETS = 10_000
#: headers that a request has once at most: two readers could see two requests in it
SINGLE = (b"authorization", b"content-length", b"content-type", b"host", b"idempotency-key", b"transfer-encoding")
#: what every reply says to a browser: do not guess, keep, frame or run it
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)
STRICT_TLS = (b"strict-transport-security", b"max-age=31536000")


@dataclass(frozen=True)
class Limits:
    """How much of the door one account and one address may take.

    Attributes:
        account_rate, address_rate: requests a second; 0 for any number.
        parallel: requests of an account that are under way at once, from their first byte to their answer.
        address_parallel: the same, of an address.
        connections: that are open at once.
        proxy: the address of a reverse proxy, whose last ``X-Forwarded-For`` is the client's address.
    """

    account_rate: float = 0.0
    address_rate: float = 0.0
    parallel: int = 16
    address_parallel: int = 256
    connections: int = 2000
    proxy: str | None = None


class Buckets:
    """Token buckets by name: ``rate`` tokens a second, and a second's worth (at least one) kept.

    Args:
        rate: 0 for no limit.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = rate, max(1.0, rate), clock
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, name: Hashable) -> float:
        """Takes a token, and gives 0. Where there is none, gives the seconds until there is."""
        if not self._rate:
            return 0.0
        now = self._clock()
        level, at = self._levels.pop(name, (self._most, now))
        level = min(self._most, level + (now - at) * self._rate)
        wait = 0.0 if level >= 1 else (1 - level) / self._rate
        self._levels[name] = (level if wait else level - 1, now)
        if len(self._levels) > BUCKETS:
            self._levels.popitem(last=False)
        return wait


class Intake:
    """Reads bodies into a limited room."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()

    @asynccontextmanager
    async def body(self, request: Request, account: str, most: int) -> AsyncIterator[bytes]:
        """The body of a request, whose room is given back at the end of the block.

        Raises:
            Refusal: it is longer than ``most`` bytes (nothing is read if it says so), it comes too slowly, or the room
                is full.
        """
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            await self._read(request, account, most, body)
            yield bytes(body)
        finally:
            self.held[account] -= len(body)
            if not self.held[account]:
                del self.held[account]

    async def _read(self, request: Request, account: str, most: int, body: bytearray) -> None:
        started, stream = asyncio.get_running_loop().time(), request.stream()
        while True:
            try:
                async with asyncio.timeout_at(started + BODY_SECONDS + len(body) / BODY_RATE):
                    part = await anext(stream, None)
            except TimeoutError:
                raise Refusal(408, "Too slow", f"{len(body)} bytes of the body came in time; it is given up") from None
            except ClientDisconnect:
                raise Refusal(400, "Gone", "the client left before the end of the body") from None
            if part is None:
                return
            if len(body) + len(part) > most:
                raise _too_large(most)
            if self.held[account] + len(part) > ACCOUNT_ROOM or self.held.total() + len(part) > ROOM:
                raise Refusal(503, "Busy", "too many bytes of bodies under way; nothing was charged", after=1)
            body += part
            self.held[account] += len(part)


def _too_large(most: int) -> Refusal:
    return Refusal(413, "Too large", f"the body is larger than {most} bytes; ask fewer images at once, or as .npy")


class Gate:
    """The door's application behind its limits.

    Args:
        app: the application.
        limits: see :class:`Limits`.
        find: the account that a token opens, or None.
        tls: whether browsers are told to come by TLS only.

    Attributes:
        draining: set when no new request is to be answered.
        places: requests under way, by account and by address.
        replies: replies by status.
    """

    def __init__(self, app: Any, limits: Limits, find: Callable[[str], str | None], *, tls: bool = False) -> None:
        self._app, self._limits, self._find = app, limits, find
        self._headers = [*HEADERS, STRICT_TLS] if tls else list(HEADERS)
        self._buckets = {"account": Buckets(limits.account_rate), "address": Buckets(limits.address_rate)}
        self._most = {"account": limits.parallel, "address": limits.address_parallel}
        self.draining = False
        self.places: Counter[tuple[str, str]] = Counter()
        self.replies: Counter[int] = Counter()

    @property
    def under_way(self) -> int:
        """Requests that are not answered yet."""
        return sum(count for (kind, _), count in self.places.items() if kind == "address")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.replies[message["status"]] += 1
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        try:
            _refuse_ambiguous(scope["headers"])
            if self.draining:
                raise Refusal(503, "Ending", "the service ends; ask again with the same key when it is back", after=5)
            if scope["path"] == "/healthz":
                await self._app(scope, receive, told)
                return
            with self._place("address", self._address(scope)), self._place("account", self._account(scope["headers"])):
                await self._app(scope, receive, told)
        except Refusal as refusal:
            await refusal.response()(scope, receive, told)

    @contextmanager
    def _place(self, kind: str, name: str | None) -> Iterator[None]:
        """A place of an account or an address, inside the block. A request without an account takes none of one."""
        if name is None:
            yield
            return
        if wait := self._buckets[kind].take(name):
            raise Refusal(429, "Too many requests", f"more requests than this {kind} may send in a second", after=wait)
        if self.places[kind, name] >= self._most[kind]:
            raise Refusal(429, "Too many requests", f"{self._most[kind]} of this {kind} are under way", after=1)
        self.places[kind, name] += 1
        try:
            yield
        finally:
            self.places[kind, name] -= 1
            if not self.places[kind, name]:
                del self.places[kind, name]

    def _account(self, headers: list[tuple[bytes, bytes]]) -> str | None:
        scheme, _, token = dict(headers).get(b"authorization", b"").decode("latin-1").partition(" ")
        return self._find(token.strip()) if scheme.lower() == "bearer" else None

    def _address(self, scope: Any) -> str:
        """Where a request comes from. An owner of IPv6 addresses has 2^64 of them, so they count as one."""
        host = scope["client"][0] if scope["client"] else ""
        if host == self._limits.proxy:
            said = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
            host = said[-1].decode("latin-1").rpartition(",")[2].strip() if said else host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host[:64]
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
        return str(address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else host


def _refuse_ambiguous(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuses what a proxy before the door might read as another request than the door does."""
    found = Counter(name for name, _ in headers)
    twice = [name.decode() for name in SINGLE if found[name] > 1]
    if twice or (found[b"content-length"] and found[b"transfer-encoding"]):
        what = f"the header {twice[0]} twice" if twice else "both content-length and transfer-encoding"
        raise Refusal(400, "Ambiguous", f"the request has {what}")
