"""The bench on Ray: it turns the scheduler's work into calls to a crew.

The driver moves no models. A worker takes the parent's model off the shelf, and its call returns once the collector has
kept the new model. So all dependencies lie in the run directory, and a lost process, object or node costs only the work
it had in hand. Another worker continues that work from its checkpoint, and pays for no query twice.
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
from actors.failures import innermost, is_lost
from actors.workers import Workers
from simulator.errors import RunFailed, one_line
from simulator.experiment.display import Task
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import WorkFailed
from simulator.plan.config import RunConfig
from simulator.plan.subjects import Marked, OwnerModel, Removed, Stolen, Subject
from simulator.records.rows import Row

#: when a piece of work was asked for, when a worker took it, and when it was done, by ``time.monotonic()`` of this
#: process
Times = tuple[float, float, float]


class CrewBench:
    """The bench of a run or a sweep (see :class:`~simulator.experiment.schedule.Bench`).

    Args:
        config: says whether thefts are recorded, and which detectors watch them.
        started: trainers that the crew has started already.

    Attributes:
        times: the times of each piece of work, by the id of its model (``<id>.<phase>`` for a half-trained victim).
    """

    def __init__(self, crew: Crew, directory: RunDirectory, config: RunConfig, *, started: Sequence[Any] = ()) -> None:
        self._crew, self._directory, self._config = crew, directory, config
        self.trainers = Workers("trainer", crew.new_trainer, crew.layout.trainers, started)
        self.attackers = Workers("attacker", crew.new_attacker, crew.layout.attackers)
        self.times: dict[str, list[Times]] = {}
        self._running: dict[str, tuple[Subject, str]] = {}
        # All models of the owner go to the first collector, which measures a victim beside its benign model.
        self._collectors = itertools.cycle(crew.collectors)
        self._service: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def open(self, service: Any) -> None:
        """Lets the thefts begin. ``service`` is the handle of the running service."""
        self._service.set_result(service)

    @property
    def serving(self) -> bool:
        """Whether the service has ever been up."""
        return self._service.done()

    # -- called by the scheduler -------------------------------------------------------------------------------------

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

        async def steal(attacker: Any) -> None:
            # Accounts are opened once an attacker is free. If they were opened before, the theft that the ledger
            # answers first would get the attacker, and not the longest theft.
            await crew.ledger.open.remote(terms, dict.fromkeys(terms, theft.attack))
            record, detectors = self._config.records_thefts, self._config.detectors
            await attacker.steal.remote(service, theft, tokens, triggers, collector, record, detectors)

        with self._timed(theft, theft.label) as begun:
            try:
                await self.attackers.do(steal, begun, priority=-theft.work)
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
            try:
                found: list[Row] = await collector.measure.remote(subject, keys, charged)
            except RayError as error:
                if not is_lost(error):
                    raise _broken(error) from error
                # e.g. a model so large that the collector runs out of memory each time
                why = f"whoever measured it died, again and again: {one_line(innermost(error))[:200]}"
                return await self.fail(subject, why, keys, charged)
            return found

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        try:
            rows: list[Row] = await self._crew.collector.fail.remote(subject, why, keys, queries)
        except RayError as error:
            raise _broken(error) from error
        return rows

    # -- called by a sweep -------------------------------------------------------------------------------------------

    async def probe(self, subject: Marked, phase: str) -> Any:
        """Trains a victim to the end of a phase (see :func:`simulator.experiment.owner.train_phase`).

        Raises:
            WorkFailed: it could not be trained.
        """
        with self._timed(subject, f"{subject.label}, {phase}", f"{subject.id}.{phase}") as begun:
            return await self.trainers.do(lambda one: one.train_phase.remote(subject, self._crew.shelf, phase), begun)

    async def accuracy(self, spec: OwnerModel) -> float:
        """The test accuracy, in [0, 1], of an owner's model that lies in the run directory."""
        found: float = await self._crew.collector.accuracy.remote(spec)
        return found

    # -- shown to the user -------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, subject: Subject, label: str, name: str = "") -> Iterator[Callable[[], None]]:
        """Notes the times of a piece of work. The yielded function is to be called when a worker takes the work.

        Args:
            label: its name in progress lines; empty if they do not show it.
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
        """The tasks under way, by name. None are shown while the board or the ledger restarts."""
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


def _broken(error: RayError) -> RunFailed:
    """The error that ends a run whose collector failed, because nothing can replace the collector."""
    return RunFailed(f"the collector failed: {one_line(innermost(error))}")
