"""The one scheduler: walks the tree of models over a bench, and does every piece of work once.

A *bench* is where models are made and measured: this process (:mod:`simulator.experiment.local`) or a crew of Ray
actors (:mod:`actors.bench`). The scheduler knows what needs what::

    making    a model needs its parent (and a theft the victim whose triggers its pool holds)
    measuring a model needs itself and the keys that concern it

What is made lies in the run directory, so work that was done before the program was killed is not done again.
A model that cannot be made fails everything that is made from it, and each failure becomes a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from simulator.experiment.rundir import RunDirectory
from simulator.plan.subjects import Marked, OwnerModel, Stolen, Subject
from simulator.records.rows import Row

T = TypeVar("T")


class WorkFailed(Exception):
    """A piece of work has failed. Its text stands in the rows.

    Args:
        queries: victim images that were charged for it.
    """

    def __init__(self, why: str, queries: int = 0) -> None:
        super().__init__(why)
        self.queries = queries


class Bench(Protocol):
    """Where models are made and measured."""

    async def make(self, subject: Subject) -> None:
        """Makes a model whose parent lies in the run directory, and returns when it lies there, too.

        Raises:
            WorkFailed: it could not be made.
        """
        ...

    async def measure(self, subject: Subject, keys: Sequence[Marked]) -> list[Row]:
        """Measures a model that lies in the run directory with each of the keys, and writes the rows."""
        ...

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        """Writes the rows of a model that could not be made."""
        ...


class Scheduler:
    """Makes and measures models, each once, with whatever they need.

    Args:
        keys_for: the victims whose keys a model is measured with.
        show: is given the rows as they are written.
        retry: whether work that failed is begun again when somebody asks again, as the next trial of a sweep does. In a
            run it stays failed: every theft asks for its victim, and none of them should train it once more.
    """

    def __init__(
        self,
        bench: Bench,
        directory: RunDirectory,
        keys_for: Callable[[Subject], Sequence[Marked]],
        show: Callable[[list[Row]], None],
        *,
        retry: bool = True,
    ) -> None:
        self._bench, self._directory, self._keys_for, self._show = bench, directory, keys_for, show
        self._retry = retry
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def once(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a piece of work, which is begun if nobody has begun it, or if it failed and is tried again."""
        task = self._tasks.get(name)
        if task is None or (self._retry and task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._tasks[name] = asyncio.ensure_future(work())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio complains of it
        return await asyncio.shield(task)  # the work goes on when the one who asked goes away

    async def made(self, subject: Subject) -> None:
        """Returns when a model lies in the run directory.

        Raises:
            WorkFailed: it, or a model that it is made from, could not be made.
        """

        async def work() -> None:
            if not self._directory.has(subject):
                for needed in _needed(subject):
                    try:
                        await self.made(needed)
                    except WorkFailed as failed:
                        raise WorkFailed(_lost(subject, needed, failed), failed.queries) from failed
                if subject.kept is subject:  # else the model that was needed is all there is to make
                    await self._bench.make(subject)

        await self.once(f"make {subject.id}", work)

    async def measured(self, subject: Subject) -> list[Row]:
        """The rows of a model, with each of its keys. A row says what failed."""

        async def work() -> list[Row]:
            keys = list(self._keys_for(subject))
            try:
                await self.made(subject)
            except WorkFailed as failed:
                rows = await self._bench.fail(subject, str(failed), keys, failed.queries)
                self._show(rows)
                return rows
            rows = []
            for of in list(keys):
                try:
                    await self.made(of)
                except WorkFailed as failed:
                    keys.remove(of)
                    rows += await self._bench.fail(subject, _lost(subject, of, failed), [of], 0)
            if keys:
                rows += await self._bench.measure(subject, keys)
            self._show(rows)
            if any(row.status != "ok" for row in rows):
                self._tasks.pop(f"measure {subject.id}", None)  # whoever asks again has it tried again
            return rows

        return await self.once(f"measure {subject.id}", work)

    async def measure_all(self, subjects: Iterable[Subject]) -> None:
        """Measures models side by side."""
        await asyncio.gather(*(self.measured(subject) for subject in subjects))


def _needed(subject: Subject) -> Iterable[Subject]:
    """What has to lie in the run directory before a model can be made."""
    if subject.parent is not None:
        yield subject.parent
    if isinstance(subject, Stolen) and subject.triggers_of is not None:
        yield subject.triggers_of


def _lost(subject: Subject, needed: Subject, failed: WorkFailed) -> str:
    """Why a model fails when one that it needs has failed.

    Example: ``its victim could not be trained: ValueError: …``. A victim has its benign model's reason as it is.
    """
    why = str(failed)
    if isinstance(subject, OwnerModel) or why.startswith(LOST):
        return why
    return f"{LOST[0] if isinstance(needed, OwnerModel) else LOST[1]}: {why}"


#: how the reasons begin that a model takes from one that it needs
LOST = ("its victim could not be trained", "its target could not be made")
