"""The notice board: actors post how far their work is, and the driver reads it to draw the display."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle

#: seconds between two notices of one task, at least; the display shows no more
INTERVAL = 0.5

#: phase, steps done, steps in total
Notice = tuple[str, int, int]


class Board:
    """The last notice of every task."""

    def __init__(self) -> None:
        self._notices: dict[str, Notice] = {}

    async def post(self, task: str, notice: Notice) -> None:
        """Replaces a task's notice."""
        self._notices[task] = notice

    async def read(self) -> dict[str, Notice]:
        """Every task's last notice."""
        return dict(self._notices)  # a copy, as Ray packs it in another thread while new notices come in


BoardActor = ray.remote(num_cpus=0, max_restarts=-1)(Board)


class Posting:
    """A progress listener that posts to the board every :data:`INTERVAL` seconds at most.

    It does not wait for the board: a notice may be lost, and the next one replaces it.
    """

    def __init__(self, board: ActorHandle[Any], task: str) -> None:
        self._board, self._task, self._last = board, task, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= INTERVAL:
            self._last = now
            self._board.post.remote(self._task, (phase, done, total))
