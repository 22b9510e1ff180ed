"""A whole run in one process, without Ray: the scheduler over a bench that computes here, one step after the other.

It computes what the Ray run computes, by the same functions and through the same ledger, and gives equal rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from simulator.errors import one_line
from simulator.experiment.collector import Collector
from simulator.experiment.display import Display
from simulator.experiment.owner import TrainedOwner, train_owner
from simulator.experiment.preflight import prepare
from simulator.experiment.removal import Washed, wash
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import Scheduler, WorkFailed
from simulator.experiment.theft import Theft, run_scenario
from simulator.experiment.world import World
from simulator.models import Classifier
from simulator.plan.config import RunConfig
from simulator.plan.subjects import Marked, OwnerModel, Removed, Stolen, Subject
from simulator.plan.tree import Plan
from simulator.records.rows import Row
from simulator.service.ledger import Ledger
from simulator.service.local import LocalTransport
from simulator.service.log import QueryLog
from simulator.service.victim import VictimService
from simulator.training.predict import choose_device, use_one_thread


class LocalRun:
    """One run in this process, and its bench (see :class:`~simulator.experiment.schedule.Bench`)."""

    def __init__(self, config: RunConfig, plan: Plan, world: World, directory: RunDirectory, display: Display) -> None:
        self._config, self._plan, self._world = config, plan, world
        self._directory, self._display = directory, display
        self._device = choose_device(config.device)
        dataset = world.dataset
        self._collector = Collector(
            *(directory, config, dataset.name, dataset.test, dataset.attacker, self._device),
            world=world.for_attackers(),
        )
        self._ledger = Ledger(directory.ledger, sync=config.sync_ledger)
        self._service = VictimService(self._device, config.resources.precision)
        self._log = QueryLog(directory.query_log.write, plan.attacks) if config.query_log else None
        self._transport = LocalTransport(self._service, self._ledger, self._log)

    def run(self) -> bool:
        """Runs everything that is not done yet; returns whether every row is good.

        A failure becomes a row with its error, and the rest goes on.
        """
        use_one_thread()
        try:
            _run_at_once(self._run())
        finally:
            if self._log is not None:
                self._log.close()
            self._ledger.close()
            if self._log is not None:
                self._directory.settle(self._plan.attacks)
        return all(row.status == "ok" for row in self._directory.rows())

    async def _run(self) -> None:
        scheduler = Scheduler(self, self._directory, self._plan.keys_for, self._display.rows)
        for subject in (*self._plan.victims, *self._directory.open_copies(self._plan)):
            await scheduler.measured(subject)  # one after the other: there is one process

    async def make(self, subject: Subject) -> None:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        try:
            made = self._make(subject)
        except Exception as error:  # every failure becomes a row
            raise WorkFailed(one_line(error), self._spent(subject)) from error
        self._collector.keep(subject, made)

    async def measure(self, subject: Subject, keys: Sequence[Marked]) -> list[Row]:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        return self._collector.measure(subject, keys, self._spent(subject))

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        """See :class:`~simulator.experiment.schedule.Bench`."""
        return self._collector.fail(subject, why, keys, queries)

    def _make(self, subject: Subject) -> TrainedOwner | Theft | Washed:
        if isinstance(subject, Stolen):
            return self._steal(subject)
        with self._display.task(subject.label) as progress:
            if isinstance(subject, Removed):
                target = self._directory.load_model(subject.target)
                transfer = self._directory.load_transfer(subject) if "transfer" in subject.removal.needs else None
                checkpoint = self._directory.checkpoints.checkpoint(subject.id)
                return wash(subject, target, self._world.for_attackers(), transfer, self._device, progress, checkpoint)
            assert isinstance(subject, OwnerModel)
            benign = self._load(subject.benign) if isinstance(subject, Marked) else None
            checkpoint = self._directory.checkpoints.checkpoint(subject.id)
            return train_owner(subject, self._world, benign, self._device, progress, checkpoint)

    def _steal(self, theft: Stolen) -> Theft:
        tokens = self._directory.tokens(theft)
        for account, token in tokens.items():
            self._ledger.open(account, theft.terms(account, token))
        if theft.victim.id not in self._service:
            self._service.add(theft.victim.id, self._load(theft.victim))
        triggers = self._directory.load_triggers(theft.triggers_of) if theft.triggers_of else None
        with self._display.task(theft.label, theft.budget, lambda: self._spent(theft)) as progress:
            return run_scenario(
                theft,
                self._world.for_attackers(),
                self._transport,
                tokens,
                triggers,
                self._device,
                progress,
                record=self._config.records_thefts,
                detectors=self._config.detectors,
                checkpoint=self._directory.checkpoints.checkpoint(theft.id),
            )

    def _load(self, spec: OwnerModel) -> Classifier:
        return self._directory.load_model(spec).to(self._device)

    def _spent(self, subject: Subject) -> int:
        theft = subject.theft
        return sum(self._ledger.spent(account) for account in theft.accounts) if theft else 0


def _run_at_once(work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end, in an event loop of its own.

    Ctrl-C interrupts whatever is being computed. :func:`asyncio.run` would wait for the end of the step under way,
    which is a whole training here.
    """
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
    finally:
        if left := asyncio.all_tasks(loop):  # tasks that waited for the interrupted one
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def run_config(config: RunConfig, out: Path | None = None, data_dir: Path | None = None) -> list[Row]:
    """A whole run from Python: one process, no Ray, nothing printed but failures and warnings.

    Args:
        out: the run directory; ``runs/<time>_<name>`` if not given.
        data_dir: where data sets lie.

    Raises:
        InputError: the configuration does not fit the data, or the directory cannot be written.
    """
    plan, world = prepare(config, data_dir)
    directory = RunDirectory.create(config, out)
    display = Display(Console(stderr=True), total=len(plan.victims) + len(plan.copies), quiet=True)
    with directory.held(), display:
        LocalRun(config, plan, world, directory, display).run()
    return directory.rows()
