"""A run's bench that hears of every piece of work when a worker has it, for those who disturb runs on purpose."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from actors.bench import CrewBench
from simulator.plan.subjects import Subject


@dataclass(frozen=True)
class Place:
    """Where a worker is: its node, its process there, and the GPUs that it was given."""

    node: str
    process: int
    gpus: tuple[int, ...]


def place_of(_: object) -> Place:
    """The place of the actor that is asked."""
    return Place(ray.get_runtime_context().get_node_id(), os.getpid(), tuple(int(gpu) for gpu in ray.get_gpu_ids()))


class WatchedBench(CrewBench):
    """Calls :meth:`given` whenever a worker was given a model to make."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._subject: ContextVar[Subject] = ContextVar("subject")  # each piece of work is a task of its own
        for workers in (self.trainers, self.attackers):
            workers.do = partial(self._do, workers.do)

    async def given(self, subject: Subject, place: Place) -> None:
        """A worker works on a model; what is done here is done meanwhile."""

    async def make(self, subject: Subject) -> None:
        """As a run's bench."""
        self._subject.set(subject)
        await super().make(subject)

    async def _do(
        self, do: Callable[..., Awaitable[Any]], call: Callable[[Any], Awaitable[Any]], *arguments: Any, **options: Any
    ) -> Any:
        async def watched(worker: Any) -> Any:
            place = worker.__ray_call__.remote(place_of)  # before its work, which it would have to end first
            work = asyncio.ensure_future(call(worker))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            await self.given(self._subject.get(), await place)
            return await work

        return await do(watched, *arguments, **options)
