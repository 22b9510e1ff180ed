"""The workers of one kind (idle, busy and starting actors), and the work that waits for one of them.

Only a worker that has answered gets work. So a worker that finds no room on the cluster, e.g. after the loss of a node,
delays nothing: another takes the work. Ray's own restarts cannot do that: a call belongs to its actor, and waits for
that actor's restart while others are idle (``docs/architecture.md`` has the measurement).
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

#: how often a piece of work is tried if it fails or its process dies, and how many starts in a row may fail
ATTEMPTS = 3


class Workers:
    """The workers of one kind.

    Args:
        kind: their name in messages, such as ``"attacker"``.
        new: starts a worker.
        count: how many workers there should be.
        started: workers that run already; they count towards ``count``.

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
        """Whether a worker is there, idle or busy."""
        return bool(self._idle or self._busy)

    @property
    def waiting(self) -> bool:
        """Whether work waits for a worker."""
        return any(not future.done() for _, _, future in self._waiting)

    async def ready(self) -> None:
        """Returns when every worker that was started has answered, or has failed to start."""
        while self._arriving:
            await asyncio.wait(list(self._arriving.values()))

    def fill(self) -> None:
        """Starts the workers that are missing. It starts none while paused, or after several failed starts in a row."""
        while not self.paused and self._failures < ATTEMPTS and len(self._everyone()) < self._count:
            self._welcome(self._new())

    async def do(self, call: Callable[[Any], Awaitable[Any]], begun: Callable[[], None], priority: float = 0.0) -> Any:
        """Has an idle worker do a piece of work, and returns the result. If the worker dies, another does the work
        again.

        Args:
            call: makes the remote call on a worker, and returns its awaitable.
            begun: called each time that a worker takes the work.
            priority: the waiting work with the lowest value goes first.

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
                if not is_lost(error):  # memory, disk or time may have been short for a while
                    self._give_back(worker)
                    why = one_line(cause)
                    attempts = ATTEMPTS if isinstance(cause, InputError) else attempts + 1
                elif self._drop(worker):
                    why = f"its process died: {one_line(cause)[:200]}"
                    attempts += 1
            except BaseException:  # the run was cancelled
                self._busy.discard(worker)
                raise
            else:
                self._give_back(worker)
                return result
        raise WorkFailed(why)

    def shed(self) -> bool:
        """Ends all starting workers and one other, to free their shares. An idle one goes before a busy one.

        A busy worker's work goes to another. Returns False if there was no idle or busy worker to end.
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

    # -- matching work and workers -----------------------------------------------------------------------------------

    def _everyone(self) -> list[Any]:
        return [*self._idle, *self._busy, *self._arriving]

    async def _take(self, priority: float) -> Any:
        """Waits for an idle worker and marks it as busy."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), future))
        # Matching waits for the end of this turn of the loop: of all work queued in one turn, the lowest value goes
        # first.
        loop.call_soon(self._match)
        return await future

    def _match(self) -> None:
        """Gives idle workers to waiting work. Fails the work if no worker can be started any more."""
        self.fill()
        hopeless = self._failures >= ATTEMPTS and not self._everyone()
        while self._waiting and (self._idle or hopeless):
            _, _, future = heapq.heappop(self._waiting)
            if future.done():  # its caller was cancelled
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
        """Removes a worker that has died or cannot be reached; returns False if :meth:`shed` ended it.

        A lost node may have taken other workers along, so every idle worker must answer again before it gets work.
        """
        self._busy.discard(worker)
        ray.kill(worker)  # a living worker out of reach would keep its share of the cluster
        while self._idle:
            self._welcome(self._idle.popleft(), known=True)
        by_itself = worker not in self._shed
        self._shed.discard(worker)
        self._match()
        return by_itself

    def _welcome(self, worker: Any, *, known: bool = False) -> None:
        self._arriving[worker] = asyncio.get_running_loop().create_task(self._arrive(worker, known))

    async def _arrive(self, worker: Any, known: bool) -> None:
        """Makes a worker idle once it answers.

        Args:
            known: the worker has answered before, so its death is no failed start.
        """
        try:
            await worker.__ray_ready__.remote()
        except RayError as error:
            if not known:
                # the last line of Ray's text is the error; a traceback stands above it
                self._failures, self._why = self._failures + 1, str(error).strip().rpartition("\n")[2][:200]
            ray.kill(worker)  # the worker may live, with only its answer lost, and would keep its share
        else:
            self._failures = 0
            self._idle.append(worker)
        self._arriving.pop(worker, None)
        self._match()
