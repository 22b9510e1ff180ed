"""The trainers and attackers that the trials of a sweep share: who is free gets the next piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from actors.jobs import ATTEMPTS, innermost, is_lost
from simulator.errors import one_line


class WorkFailed(Exception):
    """A piece of work has failed; its text is for the rows."""


class Workers:
    """Idle workers of one kind, and those in use."""

    def __init__(self, new: Callable[[], Any], count: int) -> None:
        self._new = new
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._arriving: set[asyncio.Task[None]] = set()
        self.everyone = [new() for _ in range(count)]
        for worker in self.everyone:
            self._idle.put_nowait(worker)

    async def do(
        self,
        call: Callable[[Any], Sequence[ObjectRef[Any]]],
        begin: Callable[[], None],
        keep: Callable[[list[Any]], Sequence[ObjectRef[Any]]] = lambda refs: refs,
    ) -> list[Any]:
        """Has an idle worker do something, another if its process dies; the references, of which the last is there.

        Args:
            keep: hands what was done to whoever keeps it; what was lost with its node before that is done again. Its
                references are returned.

        Raises:
            WorkFailed: the work itself failed, or was lost again and again.
        """
        died = ""
        for _ in range(ATTEMPTS):
            worker = await self._idle.get()
            begin()
            try:
                refs = list(call(worker))
                await refs[-1]
            except RayError as error:
                if not is_lost(error):
                    self._idle.put_nowait(worker)
                    raise WorkFailed(one_line(innermost(error))) from None
                died = one_line(innermost(error))[:200]
                self._replace(worker)
                while not self._idle.empty():  # a node may have been lost, and others with it
                    self._welcome(self._idle.get_nowait())
                continue
            self._idle.put_nowait(worker)
            try:
                kept = list(keep(refs))
                await kept[-1]
                return kept
            except RayError as error:
                if not is_lost(error):
                    raise
                died = one_line(innermost(error))[:200]
        raise WorkFailed(f"its process died {ATTEMPTS} times: {died}")

    def _replace(self, worker: Any) -> None:
        """Starts another, which gets work when it is there: the cluster may have no room for it before others end."""
        ray.kill(worker)
        self._welcome(self._new())

    def _welcome(self, worker: Any) -> None:
        """Takes a worker in when it answers, or another in its place."""

        async def arrive() -> None:
            one = worker
            for _ in range(ATTEMPTS):
                try:
                    await one.__ray_ready__.remote()
                except RayError:
                    one = self._new()
                    continue
                break
            self._idle.put_nowait(one)  # one that could not be started says why to whoever gives it work

        task = asyncio.get_running_loop().create_task(arrive())
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)
