"""An event loop in virtual time: where everybody waits, its clock jumps to the moment at which somebody goes on."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from typing import Any


class Stuck(Exception):
    """Everybody waits, and nothing will happen any more."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An asyncio loop without files, signals and threads. It sees nothing of the real clock."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._now

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        """As ``call_soon``: there is one thread."""
        return self.call_soon(callback, *args, context=context)

    def _run_once(self) -> None:
        """One turn: all that is ready, or what comes first. The base class would look at files, too.

        Raises:
            Stuck: nothing will happen any more.
        """
        ready, scheduled = self._ready, self._scheduled
        while not ready:
            if not scheduled:
                raise Stuck("everybody waits, and nothing will happen any more")
            timer = heapq.heappop(scheduled)
            if not timer.cancelled():
                self._now = timer.when()
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
