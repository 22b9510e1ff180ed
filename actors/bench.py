"""The bench on Ray: what the scheduler's work becomes as calls to a crew.

The driver moves no models. A worker takes its parent's model off the shelf, and its call returns when the collector has
kept what it made. Dependencies are therefore a matter of the run directory, and a lost process, object or node costs
only the work that it had in hand: that goes on elsewhere from its checkpoint, and pays nothing twice.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError

from actors.crew import Crew
from actors.failures import innermost
from actors.workers import Workers
from simulator.errors import RunFailed, one_line
from simulator.experiment.display import Task
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import WorkFailed
from simulator.plan.config import RunConfig
from simulator.plan.subjects import Marked, OwnerModel, Removed, Stolen, Subject
from simulator.records.rows import Row

#: when a piece of work was begun, when a worker had it, and when it was done, by ``time.monotonic()`` of this process
Times = tuple[float, float, float]


class CrewBench:
    """The bench of a run or a sweep (see :class:`~simulator.experiment.schedule.Bench`).

    Args:
        config: which thefts are recorded and watched.
        started: trainers that the crew has started already.

    Attributes:
        times: by a model's id, of every piece of work that was done for it.
    """

    def __init__(self, crew: Crew, directory: RunDirectory, config: RunConfig, *, started: Sequence[Any] = ()) -> None:
        self._crew, self._directory, self._config = crew, directory, config
        self.trainers = Workers("trainer", crew.new_trainer, crew.layout.trainers, started)
        self.attackers = Workers("attacker", crew.new_attacker, crew.layout.attackers)
        self.times: dict[str, list[Times]] = {}
        self._running: dict[str, tuple[Subject, str]] = {}
        # every model of the owner's goes to the first: a victim is measured beside its benign model
        self._collectors = itertools.cycle(crew.collectors)
        self._service: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def open(self, service: Any) -> None:
        """Lets the thefts begin: the service answers."""
        self._service.set_result(service)

    @property
    def serving(self) -> bool:
        """Whether the service has been up."""
        return self._service.done()

    # -- the scheduler's side ----------------------------------------------------------------------------------------

    async def make(self, subject: Subject) -> None:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        if isinstance(subject, Stolen):
            await self._steal(subject)
            return
        with self._timed(subject, subject.label) as begun:
            if isinstance(subject, Removed):
                collector = next(self._collectors)
                await self.attackers.do(lambda one: one.wash.remote(subject, self._crew.shelf, collector), begun)
            else:
                await self.trainers.do(
                    lambda one: one.train.remote(subject, self._crew.shelf, self._crew.collector), begun
                )

    async def _steal(self, theft: Stolen) -> None:
        crew, accounts = self._crew, list(theft.accounts)
        tokens = self._directory.tokens(theft)
        terms = {account: theft.terms(account, token) for account, token in tokens.items()}
        service = await asyncio.shield(self._service)
        collector, triggers = next(self._collectors), None
        if theft.triggers_of is not None:
            triggers = crew.collector.triggers.remote(theft.triggers_of)
        with self._timed(theft, theft.label) as begun:
            await crew.ledger.open.remote(terms, dict.fromkeys(terms, theft.attack))
            record, detectors = self._config.records_thefts, self._config.detectors
            try:
                await self.attackers.do(
                    lambda one: one.steal.remote(service, theft, tokens, triggers, collector, record, detectors),
                    begun,
                    priority=-theft.work,
                )
            except WorkFailed as failed:
                raise WorkFailed(str(failed), await crew.ledger.spent.remote(accounts)) from failed

    async def measure(self, subject: Subject, keys: Sequence[Marked]) -> list[Row]:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        owners = isinstance(subject, OwnerModel)
        collector = self._crew.collector if owners else next(self._collectors)
        theft = subject.theft
        charged = self._crew.ledger.spent.remote(list(theft.accounts)) if theft else 0
        with self._timed(subject, "") as begun:
            begun()
            return await self._collected(collector.measure.remote(subject, keys, charged))

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        return await self._collected(self._crew.collector.fail.remote(subject, why, keys, queries))

    async def _collected(self, rows: Any) -> list[Row]:
        """What a collector returns. One that fails cannot be worked around: it ends the run."""
        try:
            found: list[Row] = await rows
        except RayError as error:
            raise RunFailed(f"the collector failed: {one_line(innermost(error))}") from error
        return found

    # -- a sweep's side ----------------------------------------------------------------------------------------------

    async def probe(self, subject: Marked, phase: str) -> Any:
        """A half-trained victim (see :func:`simulator.experiment.owner.train_phase`).

        Raises:
            WorkFailed: it could not be trained.
        """
        with self._timed(subject, f"{subject.label}, {phase}", f"{subject.id}.{phase}") as begun:
            return await self.trainers.do(lambda one: one.train_phase.remote(subject, self._crew.shelf, phase), begun)

    async def accuracy(self, spec: OwnerModel) -> float:
        """The accuracy of an owner's model that lies in the run directory, in [0, 1]."""
        found: float = await self._crew.collector.accuracy.remote(spec)
        return found

    # -- what the user sees ------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, subject: Subject, label: str, name: str = "") -> Iterator[Callable[[], None]]:
        """A span of waiting for a worker and of work; the function that it gives tells that a worker has it now.

        Args:
            label: what progress lines call it; empty where they do not show it.
        """
        name, begun = name or subject.id, time.monotonic()
        taken: list[float] = []

        def begin() -> None:
            taken.append(time.monotonic())
            if label:
                self._running[name] = (subject, label)

        try:
            yield begin
        finally:
            done = time.monotonic()
            self.times.setdefault(name, []).append((begun, taken[0] if taken else done, done))
            if label:
                self._running.pop(name, None)

    async def glance(self) -> dict[str, Task]:
        """What is under way. A board or a ledger that is being started again shows nothing."""
        try:
            notices, spent = await asyncio.gather(self._crew.board.read.remote(), self._crew.ledger.all_spent.remote())
        except RayActorError:
            return {}
        tasks = {}
        for name, (subject, label) in list(self._running.items()):
            phase, done, total = notices.get(subject.id, ("starting", 0, 1))
            accounts = subject.accounts if isinstance(subject, Stolen) else {}
            budget = subject.budget if isinstance(subject, Stolen) else None
            tasks[name] = Task(label, phase, done, total, budget, sum(spent.get(account, 0) for account in accounts))
        return tasks
