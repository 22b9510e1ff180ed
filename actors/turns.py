"""What a replica holds between taking a query and answering it: whose turn it is, and what the ledger is asked next.

Three things happen at once in a replica: messages are decoded and checked, the ledger writes grants, and one thread
computes. These classes hand over between them.
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

#: items that wait for the worker while no more grants are asked for: enough for it not to run dry meanwhile
LOW = 2


class FairQueue(Generic[Item]):
    """A queue between threads from which every account is served at the same pace while it has something waiting.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): an item starts, in virtual time, when the account's
    item before it ends or now, whichever is later, and lasts as long as its cost; the earliest start is served first.
    An account that sends many items at once therefore waits behind its own, and one that sends few does not.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._ends: dict[str, float] = {}
        self._now, self._count = 0.0, 0
        self._ready = threading.Condition()

    def put(self, account: str, cost: float, item: Item) -> None:
        """Adds an item of an account; ``cost`` is what serving it takes, in any unit (here images)."""
        with self._ready:
            start = max(self._now, self._ends.get(account, 0.0))
            self._ends[account] = start + cost
            self._count += 1  # of equal starts the first come is the first served
            heapq.heappush(self._heap, (start, self._count, item))
            self._ready.notify()

    def get(self) -> Item:
        """Waits for an item, and takes the one whose turn it is."""
        with self._ready:
            while not self._heap:
                self._ends.clear()  # nobody waits: nobody is ahead of another
                self._now = 0.0
                self._ready.wait()
            self._now, _, item = heapq.heappop(self._heap)
            return item

    def __len__(self) -> int:
        return len(self._heap)


class Worker:
    """One thread that computes what accounts ask, in fair turns. The event loop goes on meanwhile.

    Args:
        prepare: called once in the thread.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._queue: FairQueue[tuple[Callable[[], Any], asyncio.AbstractEventLoop, asyncio.Future[Any]]] = FairQueue()
        self._prepare = prepare
        self._low, self._awaited = asyncio.Event(), False
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    async def run(self, account: str, cost: float, work: Callable[[], Item]) -> Item:
        """The value of ``work()`` when its turn has come, or what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Item] = loop.create_future()
        self._queue.put(account, cost, (work, loop, future))
        return await future

    async def low(self) -> None:
        """Waits until few items wait. One caller at a time."""
        while len(self._queue) > LOW:
            self._low.clear()
            self._awaited = True
            if len(self._queue) > LOW:  # still: whoever takes the next will see that it is awaited
                await self._low.wait()

    def _work(self) -> None:
        self._prepare()
        while True:
            work, loop, future = self._queue.get()
            # told by whoever takes, as an asker that has gone tells nobody; and only if somebody waits to hear it, for
            # to wake the loop costs time
            if self._awaited and len(self._queue) <= LOW:
                self._awaited = False
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._low.set)
            if future.cancelled():  # its client has gone
                continue
            settle: Callable[[asyncio.Future[Any], Any], None] = _settle
            try:
                value = work()
            except BaseException as error:  # it is the asker's to handle
                settle, value = _fail, error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(settle, future, value)
            del work, future  # not the last query's images until the next one comes


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


Replies = list[Grant | Refused]


class Teller:
    """Asks the ledger about many messages at once.

    What comes while the ledger is at work, or while the worker has enough to do, is gathered for the next call: a call
    costs the replica and the ledger more than all else about a grant, and so little is paid for that is not soon
    answered.

    Args:
        ask: sends requests to the ledger and awaits its replies.
        wanted: waits until more grants are wanted.
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
        finally:  # however it ends, who comes next starts another
            self._task = None

    async def _ask_for(self, group: list[tuple[Sequence[Request], asyncio.Future[Replies]]]) -> None:
        try:
            replies = iter(await self._ask([request for requests, _ in group for request in requests]))
            for requests, future in group:
                _settle(future, [next(replies) for _ in requests])
        except Exception:  # one message's fault must not be another's: each is asked about by itself
            for requests, future in group:
                try:
                    _settle(future, await self._ask(requests))
                except Exception as error:
                    _fail(future, error)
