"""The one scheduler: walks the tree of models over a bench, and does every piece of work once.

A *bench* is where models are made and measured: this process (:mod:`simulator.experiment.local`) or a crew of Ray
actors (:mod:`actors.bench`). The scheduler knows what needs what::

    making    a model needs its parent (and a theft the victim whose triggers its pool holds)
    measuring a model needs itself and the keys that concern it

A finished model lies in the run directory, so a resumed run does not make it again. If a model cannot be made, all that
is made from it fails, too, and each failure becomes a row.
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
        """Makes a model whose parent lies in the run directory. Returns once the model lies there, too.

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
    """Makes and measures models, each once, after the models that they need.

    Args:
        keys_for: the victims whose keys a model is measured with.
        show: called with the rows of each model once they are written.
        retry: whether failed work is begun again when it is asked for again, e.g. by the next trial of a sweep. In a
            run it stays failed: otherwise each theft would train its failed victim once more.
    """

    def __init__(
        self,
        bench: Bench,
        directory: RunDirectory,
        keys_for: Callable[[Subject], Sequence[Marked]],
        show: Callable[[list[Row]], None],
        *,
        retry: bool = False,
    ) -> None:
        self._bench, self._directory, self._keys_for, self._show = bench, directory, keys_for, show
        self._retry = retry
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def once(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the work of this name. The work is begun at the first call, or if it failed and ``retry`` is
        set."""
        task = self._tasks.get(name)
        if task is None or (self._retry and task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._tasks[name] = asyncio.ensure_future(work())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it
        return await asyncio.shield(task)  # the work goes on when this caller is cancelled

    async def made(self, subject: Subject) -> None:
        """Makes a model, and first the models that it needs, unless it lies in the run directory.

        Raises:
            WorkFailed: the model, or one that it needs, could not be made.
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
        """The rows of a model, measured with each of its keys. A failure is a row, too."""

        async def work() -> list[Row]:
            rows = await self._measure(subject)
            self._show(rows)
            if self._retry and any(row.status != "ok" for row in rows):
                self._tasks.pop(f"measure {subject.id}", None)
            return rows

        return await self.once(f"measure {subject.id}", work)

    async def _measure(self, subject: Subject) -> list[Row]:
        keys = list(self._keys_for(subject))
        try:
            await self.made(subject)
        except WorkFailed as failed:
            return await self._bench.fail(subject, str(failed), keys, failed.queries)
        rows = []
        for of in list(keys):
            try:
                await self.made(of)
            except WorkFailed as failed:
                keys.remove(of)
                rows += await self._bench.fail(subject, _lost(subject, of, failed), [of], 0)
        return rows + (await self._bench.measure(subject, keys) if keys else [])

    async def measure_all(self, subjects: Iterable[Subject]) -> None:
        """Measures models side by side."""
        await asyncio.gather(*(self.measured(subject) for subject in subjects))


def _needed(subject: Subject) -> Iterable[Subject]:
    """The models that must lie in the run directory before this one can be made."""
    if subject.parent is not None:
        yield subject.parent
    if isinstance(subject, Stolen) and subject.triggers_of is not None:
        yield subject.triggers_of


def _lost(subject: Subject, needed: Subject, failed: WorkFailed) -> str:
    """The error text of a model when one that it needs has failed.

    Example: ``its victim could not be trained: ValueError: …``. A victim takes over its benign model's text unchanged.
    """
    why = str(failed)
    if isinstance(subject, OwnerModel) or why.startswith(LOST):
        return why
    return f"{LOST[0] if isinstance(needed, OwnerModel) else LOST[1]}: {why}"


#: how the error text begins if the needed model is an owner's, and if it is any other
LOST = ("its victim could not be trained", "its target could not be made")
