"""The plain loop: a whole run in one process, without Ray, one step after the other.

It computes what the Ray runner computes, by the same functions and through the same ledger, and gives equal rows.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from simulator.errors import one_line
from simulator.experiment.collector import Collector
from simulator.experiment.display import Display
from simulator.experiment.owner import TrainedOwner, train_owner
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import run_scenario
from simulator.experiment.world import World
from simulator.plan.config import RunConfig
from simulator.plan.subjects import OwnerModel, Plan, Scenario
from simulator.records.rows import Row
from simulator.service.ledger import Ledger
from simulator.service.local import LocalTransport
from simulator.service.log import QueryLog
from simulator.service.victim import VictimService
from simulator.training.predict import choose_device, use_one_thread


class LocalRun:
    """One run, step by step. :meth:`run` does all that is not done yet."""

    def __init__(self, config: RunConfig, plan: Plan, world: World, directory: RunDirectory, display: Display) -> None:
        self._config, self._plan, self._world = config, plan, world
        self._directory, self._display = directory, display
        self._device = choose_device(config.device)
        self._owners: dict[str, TrainedOwner] = {}
        self._failed: dict[str, str] = {}
        self._collector = Collector(
            directory.path, config, world.dataset.name, world.dataset.test, world.dataset.attacker
        )
        self._ledger = Ledger(directory.ledger, sync=config.sync_ledger)
        self._service = VictimService(self._device, config.resources.precision)
        self._log = QueryLog(directory.query_log.write, plan.attacks) if config.query_log else None
        self._transport = LocalTransport(self._service, self._ledger, self._log)

    def run(self) -> bool:
        """Runs everything that is not done yet; returns whether every row is good.

        What fails becomes a row with its error, and the rest goes on.
        """
        use_one_thread()
        try:
            for spec in self._plan.benigns:
                self._benign(spec)
            for spec in self._plan.victims:
                self._display.rows(self._victim(spec))
            for scenario in self._directory.open_scenarios(self._plan):
                self._display.rows(self._scenario(scenario))
        finally:
            if self._log is not None:
                self._log.close()
                self._directory.restore_query_log(self._plan, self._ledger)
            self._ledger.close()
        return all(row.status == "ok" for row in self._directory.rows())

    def _train(self, spec: OwnerModel) -> TrainedOwner:
        owner = self._directory.load_owner(spec)
        if owner is None:
            benign = self._owners[spec.benign.id].model if spec.watermark else None
            with self._display.task(spec.label) as progress:
                checkpoint = self._directory.checkpoints.checkpoint(spec.id)
                owner = train_owner(spec, self._world, benign, self._device, progress, checkpoint)
            self._directory.save_owner(spec, owner)
            self._directory.checkpoints.clear(spec.id)
        self._owners[spec.id] = owner
        self._service.add(spec.id, owner.model)
        return owner

    def _benign(self, spec: OwnerModel) -> None:
        """Trains a benign model. Where that fails, all that needs it becomes rows with the error, each in its turn."""
        try:
            owner = self._train(spec)
        except Exception as error:
            self._failed[spec.id] = one_line(error)
            return
        self._collector.add_benign(spec, owner.model, owner.seconds, owner.started)

    def _victim(self, spec: OwnerModel) -> list[Row]:
        if spec.benign.id in self._failed:
            return self._lose(spec, self._failed[spec.benign.id])
        try:
            owner = self._train(spec)
        except Exception as error:  # whatever fails becomes a row
            return self._lose(spec, one_line(error))
        assert owner.key is not None
        return self._collector.add_victim(spec, owner.model, owner.key, owner.seconds, owner.started)

    def _lose(self, spec: OwnerModel, why: str) -> list[Row]:
        self._failed[spec.id] = why
        return self._collector.add_owner_failure(spec, why)

    def _scenario(self, scenario: Scenario) -> list[Row]:
        keys = [of for of in self._plan.keys_for(scenario) if of.id not in self._failed]
        lost = [of for of in self._plan.keys_for(scenario) if of.id in self._failed]
        rows = []
        for of in lost:
            error = f"its victim could not be trained: {self._failed[of.id]}"
            rows += self._collector.add_failure(scenario, error, 0, [of])
        if not keys:
            return rows
        tokens = self._directory.tokens(scenario)
        for account, token in tokens.items():
            self._ledger.open(account, scenario.terms(account, token))
        triggers = self._owners[scenario.triggers_of.id].triggers if scenario.triggers_of else None
        try:
            with self._display.task(scenario.label, scenario.budget, lambda: self._spent(scenario)) as progress:
                theft = run_scenario(
                    scenario,
                    self._world.for_attackers(),
                    self._transport,
                    tokens,
                    triggers,
                    self._device,
                    progress,
                    record=self._config.save_transfer_sets,
                    detectors=self._config.detectors,
                    checkpoint=self._directory.checkpoints.checkpoint(scenario.id),
                )
        except Exception as error:
            every = self._plan.keys_for(scenario)
            return self._collector.add_failure(scenario, one_line(error), self._spent(scenario), every)
        self._directory.save_theft(scenario, theft)
        self._directory.checkpoints.clear(scenario.id)
        return rows + self._collector.add_stolen(scenario, theft, self._spent(scenario), keys)

    def _spent(self, scenario: Scenario) -> int:
        return sum(self._ledger.spent(account) for account in scenario.accounts)


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
    display = Display(Console(stderr=True), total=len(plan.scenarios), quiet=True)
    with directory.held(), display:
        LocalRun(config, plan, world, directory, display).run()
    return directory.rows()
