"""The two queues of a replica: queries that wait for the ledger, and paid queries that wait to be computed.

A replica does three things at once: its event loop decodes and checks messages, the ledger writes grants, and one
thread computes. :class:`Teller` hands queries to the ledger, :class:`Worker` hands them to the thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from simulator.service.ledger import Grant, Refused, Request

Item = TypeVar("Item")

#: no more grants are asked for while more items than this wait for the worker. They keep it busy during a ledger call
LOW = 2


class FairQueue(Generic[Item]):
    """A queue between threads that serves all accounts with waiting items at the same pace.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). An item starts, in virtual time, at the later of now
    and the end of the account's item before it. It lasts as long as its cost. The item with the earliest start is
    served first. An account that sends 60 items at once therefore waits behind its own items, and an account that sends
    one item does not.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._ends: dict[str, float] = {}
        self._now, self._count = 0.0, 0
        self._ready = threading.Condition()

    def put(self, account: str, cost: float, item: Item) -> None:
        """Adds an item of an account. ``cost`` says how long serving it takes, in any unit (here images)."""
        with self._ready:
            start = max(self._now, self._ends.get(account, 0.0))
            self._ends[account] = start + cost
            self._count += 1  # items of equal starts are served in the order in which they came
            heapq.heappush(self._heap, (start, self._count, item))
            self._ready.notify()

    def get(self) -> Item:
        """Takes the item with the earliest start; waits while there is none."""
        with self._ready:
            while not self._heap:
                self._ends.clear()  # no account waits, so none is ahead of another
                self._now = 0.0
                self._ready.wait()
            self._now, _, item = heapq.heappop(self._heap)
            return item

    def __len__(self) -> int:
        return len(self._heap)


class Worker:
    """One thread that computes the accounts' queries in fair turns, while the event loop goes on.

    Args:
        prepare: called once in the thread.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._queue: FairQueue[tuple[Callable[[], Any], asyncio.AbstractEventLoop, asyncio.Future[Any]]] = FairQueue()
        self._prepare = prepare
        self._low, self._awaited = asyncio.Event(), False
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    async def run(self, account: str, cost: float, work: Callable[[], Item]) -> Item:
        """Calls ``work`` in the thread, when its turn has come. Gives its value, or raises what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Item] = loop.create_future()
        self._queue.put(account, cost, (work, loop, future))
        return await future

    async def low(self) -> None:
        """Returns when at most :data:`LOW` items wait. Only one caller may wait at a time."""
        while len(self._queue) > LOW:
            self._low.clear()
            self._awaited = True
            if len(self._queue) > LOW:  # looked at again: from now on the thread sees that somebody waits
                await self._low.wait()

    def _work(self) -> None:
        self._prepare()
        while True:
            self._serve()

    def _serve(self) -> None:
        """Computes the next item, once there is one. What it held of the query's images is let go, as the item after
        it may be long in coming."""
        work, loop, future = self._queue.get()
        # The thread tells it, as the caller of run() may be gone. It tells it only if somebody waits, because to wake
        # the loop costs time.
        if self._awaited and len(self._queue) <= LOW:
            self._awaited = False
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._low.set)
        if future.cancelled():  # its client has gone
            return
        settle: Callable[[asyncio.Future[Any], Any], None] = _settle
        try:
            value = work()
        except BaseException as error:  # the caller of run() handles it
            settle, value = _fail, error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, future, value)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


Replies = list[Grant | Refused]


class Teller:
    """Asks the ledger about many messages in one call.

    Messages that come while the ledger works, or while the worker has enough to do, wait for the next call. One call
    for many messages saves time, because the call is what costs most about a grant. And while the worker is behind,
    little is paid for that would wait long for its answer.

    Args:
        ask: sends requests to the ledger and awaits its replies.
        wanted: returns when more grants are wanted.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Request]], Awaitable[Replies]],
        wanted: Callable[[], Awaitable[None]],
    ) -> None:
        self._ask, self._wanted = ask, wanted
        self._waiting: list[tuple[Sequence[Request], asyncio.Future[Replies]]] = []
        self._task: asyncio.Task[None] | None = None

    async def reserve(self, requests: Sequence[Request]) -> Replies:
        """The ledger's reply to each request."""
        future: asyncio.Future[Replies] = asyncio.get_running_loop().create_future()
        self._waiting.append((requests, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._wanted()
                group, self._waiting = self._waiting, []
                await self._ask_for(group)
        finally:  # also after an error: the next message starts a new task
            self._task = None

    async def _ask_for(self, group: list[tuple[Sequence[Request], asyncio.Future[Replies]]]) -> None:
        try:
            replies = iter(await self._ask([request for requests, _ in group for request in requests]))
            for requests, future in group:
                _settle(future, [next(replies) for _ in requests])
        except Exception:  # one message may be at fault, so the ledger is asked about each by itself
            for requests, future in group:
                try:
                    _settle(future, await self._ask(requests))
                except Exception as error:
                    _fail(future, error)
