"""The workers of one kind: actors that are idle, at work, or on their way, and the work that waits for one of them.

Work is given to a worker that has answered. A worker for which the cluster has no room, as after the loss of a node,
therefore keeps nothing waiting: another takes its work. Ray's own restarts cannot do that, for a call belongs to its
actor: it waits for the restart while others are idle (``docs/architecture.md`` has the measurement).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from actors.failures import innermost, is_lost
from simulator.errors import InputError, one_line
from simulator.experiment.schedule import WorkFailed

#: how often a piece of work is begun when its process dies or it fails, and how many starts in a row may fail
ATTEMPTS = 3


class Workers:
    """The workers of one kind.

    Args:
        kind: what they are called in messages, such as ``"attacker"``.
        new: starts a worker.
        count: how many there are to be.
        started: workers that have been started already; they count.

    Attributes:
        paused: no worker is started while this is true.
    """

    def __init__(self, kind: str, new: Callable[[], Any], count: int, started: Iterable[Any] = ()) -> None:
        self._kind, self._new, self._count = kind, new, count
        self._idle: deque[Any] = deque()
        self._busy: set[Any] = set()
        self._arriving: dict[Any, asyncio.Task[None]] = {}
        self._waiting: list[tuple[float, int, asyncio.Future[Any]]] = []
        self._numbers = itertools.count()
        self._shed: set[Any] = set()
        self._failures, self._why = 0, ""
        self.paused = False
        for worker in started:
            self._welcome(worker)
        self.fill()

    @property
    def working(self) -> bool:
        """Whether one is there, idle or at work."""
        return bool(self._idle or self._busy)

    @property
    def waiting(self) -> bool:
        """Whether work waits for one."""
        return any(not future.done() for _, _, future in self._waiting)

    async def ready(self) -> None:
        """Returns when every worker that was started has answered, or has failed to start."""
        while self._arriving:
            await asyncio.wait(list(self._arriving.values()))

    def fill(self) -> None:
        """Starts workers until there are as many as there are to be; none after several in a row failed to start."""
        while not self.paused and self._failures < ATTEMPTS and len(self._everyone()) < self._count:
            self._welcome(self._new())

    async def do(self, call: Callable[[Any], Awaitable[Any]], begun: Callable[[], None], priority: float = 0.0) -> Any:
        """Has an idle worker do something, and gives its result; another does it again when the worker dies.

        Args:
            call: makes the remote call on a worker, and gives what is to be awaited.
            begun: told each time that a worker has it.
            priority: of all that wait, the work of the least value goes first.

        Raises:
            WorkFailed: the work failed or was lost several times, its input is wrong, or no worker could be started.
        """
        why = ""
        attempts = 0
        while attempts < ATTEMPTS:
            worker = await self._take(priority)
            begun()
            try:
                result = await call(worker)
            except RayError as error:
                cause = innermost(error)
                if not is_lost(error):  # it may have failed of a passing want: of memory, of disk, of time
                    self._give_back(worker)
                    why = one_line(cause)
                    attempts = ATTEMPTS if isinstance(cause, InputError) else attempts + 1
                elif self._drop(worker):
                    why = f"its process died: {one_line(cause)[:200]}"
                    attempts += 1
            except BaseException:  # the run is over
                self._busy.discard(worker)
                raise
            else:
                self._give_back(worker)
                return result
        raise WorkFailed(why)

    def shed(self) -> bool:
        """Gives up the share of one worker, an idle one if there is one, and of all that have not come yet.

        The work of one that was at work goes to another. False where there was no worker to give up.
        """
        for worker, task in list(self._arriving.items()):
            task.cancel()
            self._arriving.pop(worker)
            ray.kill(worker)
        if self._idle:
            ray.kill(self._idle.pop())
            return True
        for worker in self._busy - self._shed:
            self._shed.add(worker)
            ray.kill(worker)
            return True
        return False

    # -- who waits, and who comes ------------------------------------------------------------------------------------

    def _everyone(self) -> list[Any]:
        return [*self._idle, *self._busy, *self._arriving]

    async def _take(self, priority: float) -> Any:
        """An idle worker, which is at work from now on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), future))
        # after this turn of the loop: of all that begin to wait in one turn, the one of least value goes first
        loop.call_soon(self._match)
        return await future

    def _match(self) -> None:
        """Gives idle workers to those who wait; tells them when none will come."""
        self.fill()
        hopeless = self._failures >= ATTEMPTS and not self._everyone()
        while self._waiting and (self._idle or hopeless):
            _, _, future = heapq.heappop(self._waiting)
            if future.done():  # nobody waits there any more
                continue
            if hopeless:
                future.set_exception(WorkFailed(f"no {self._kind} could be started: {self._why}"))
                continue
            worker = self._idle.popleft()
            self._busy.add(worker)
            future.set_result(worker)

    def _give_back(self, worker: Any) -> None:
        self._busy.discard(worker)
        self._idle.append(worker)
        self._match()

    def _drop(self, worker: Any) -> bool:
        """Takes leave of a worker that has died or cannot be reached; returns whether it did so by itself.

        A node may have been lost, and others with it, so those that are idle are asked whether they are still there.
        """
        self._busy.discard(worker)
        ray.kill(worker)  # one that lives on out of reach would keep its share of the cluster
        while self._idle:
            self._welcome(self._idle.popleft(), known=True)
        by_itself = worker not in self._shed
        self._shed.discard(worker)
        self._match()
        return by_itself

    def _welcome(self, worker: Any, *, known: bool = False) -> None:
        self._arriving[worker] = asyncio.get_running_loop().create_task(self._arrive(worker, known))

    async def _arrive(self, worker: Any, known: bool) -> None:
        """Takes a worker in when it answers.

        Args:
            known: it has answered before, so its death is no failed start.
        """
        try:
            await worker.__ray_ready__.remote()
        except RayError as error:
            if not known:
                # what was raised stands at the end, below a traceback
                self._failures, self._why = self._failures + 1, str(error).strip().rpartition("\n")[2][:200]
            ray.kill(worker)  # its answer may be lost alone: then it lives, and would keep its share
        else:
            self._failures = 0
            self._idle.append(worker)
        self._arriving.pop(worker, None)
        self._match()
