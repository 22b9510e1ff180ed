"""Workers of one kind that a run has: those that are idle, at work, or started and not there yet.

Work is only given to a worker that has answered, so one for which the cluster has no room, as after the loss of a node,
keeps nothing waiting. Who replaces whom, and when, is the runner's to say.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from actors.jobs import ATTEMPTS


class Pool:
    """The workers that a run has of one kind.

    Args:
        new: starts a worker.
        workers: that have been started already.
    """

    def __init__(self, new: Callable[[], Any], workers: Iterable[Any] = ()) -> None:
        self._new = new
        self._idle: deque[Any] = deque()
        self._busy: Counter[Any] = Counter()
        #: workers that were asked whether they are there, and whether they ever were
        self._arriving: dict[ObjectRef[Any], tuple[Any, bool]] = {}
        self._shed: set[Any] = set()
        self._failures, self._why = 0, ""
        for worker in workers:
            self._ask(worker, False)

    def __bool__(self) -> bool:
        """Whether one is idle."""
        return bool(self._idle)

    @property
    def working(self) -> bool:
        """Whether one is there, idle or at work."""
        return bool(self._idle or self._busy)

    @property
    def lost(self) -> str | None:
        """Why there is none and none will come; None as long as there is hope."""
        return self._why if self._failures >= ATTEMPTS and not self.working and not self._arriving else None

    def fill(self, count: int) -> None:
        """Starts workers until there are ``count``; none after several in a row could not be started."""
        while self._failures < ATTEMPTS and len(self._idle) + self._busy.total() + len(self._arriving) < count:
            self._ask(self._new(), False)

    def look(self) -> bool:
        """Takes in those who have come meanwhile; whether there were any."""
        if not self._arriving:
            return False
        came = False
        for ref in ray.wait(list(self._arriving), num_returns=len(self._arriving), timeout=0)[0]:
            worker, known = self._arriving.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                if not known:
                    # what was raised stands at the end, below a traceback
                    self._failures, self._why = self._failures + 1, str(error).strip().splitlines()[-1][:200]
                continue
            self._failures, came = 0, True
            self._idle.append(worker)
        return came

    def take(self) -> Any:
        """An idle worker, which is at work from now on."""
        worker = self._idle.popleft()
        self._busy[worker] += 1
        return worker

    def give_back(self, worker: Any) -> None:
        """It has done its work."""
        self._busy -= Counter([worker])
        self._idle.append(worker)

    def drop(self, worker: Any) -> bool:
        """It has died, or cannot be reached; returns whether by itself, and not by :meth:`shed`.

        A node may have been lost, and others with it, so those that are idle are asked whether they are still there.
        """
        self._busy -= Counter([worker])
        ray.kill(worker)  # one that lives on out of reach would keep its share of the cluster
        while self._idle:
            self._ask(self._idle.popleft(), True)
        by_itself = worker not in self._shed
        self._shed.discard(worker)
        return by_itself

    def shed(self) -> bool:
        """Gives up the share of one worker, an idle one if possible, and of all that have not come yet.

        The caller learns of the end of one that was at work as of any other's death. False where there was none.
        """
        for worker, _ in self._arriving.values():
            ray.kill(worker)
        self._arriving.clear()
        if self._idle:
            ray.kill(self._idle.pop())
            return True
        for worker in self._busy.keys() - self._shed:
            self._shed.add(worker)
            ray.kill(worker)
            return True
        return False

    def _ask(self, worker: Any, known: bool) -> None:
        self._arriving[worker.__ray_ready__.remote()] = worker, known
