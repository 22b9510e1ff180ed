"""Runs a plan on a Ray cluster: trains and serves the victims, hands scenarios to attackers, has the rows written.

The driver only moves references; models and answers go from actor to actor. What needs what:

    benign model -> controls' thefts, marked victims
    marked victim -> its thefts; the measuring of the controls (they are measured with its key)

so controls run while the marked victims are still training. The service and the attackers start while the benign
models train. Of the scenarios that can be started, the longest goes first, so that the last to end are short ones.

A process, an object or a node that is lost costs time only. What it had in hand goes back into the queue: trained again
from its checkpoint, asked again under the same keys, which the ledger does not charge again. What is done lies on the
driver's node: owners' models from the moment that they are kept, stolen ones from the moment that they are measured.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError

from actors.crew import Crew
from actors.jobs import ATTEMPTS, Deployment, Failed, Job, Jobs
from actors.layout import Layout, nodes
from actors.workers import Pool
from simulator.errors import RunFailed
from simulator.experiment.display import Display, Task
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.world import World
from simulator.plan.config import RunConfig
from simulator.plan.subjects import OwnerModel, Plan, Scenario
from simulator.records.rows import Row
from simulator.service.ledger import Ledger

#: seconds between two looks at the board and the ledger
REFRESH = 0.5
#: seconds between two looks at whether nodes were lost, and what is missing since
LOOK = 5.0
#: seconds that a trainer or the service may be without a place, once nodes were lost, before an attacker makes room
ROOM = 30.0


@dataclass
class Owner:
    """Where an owner's model is: references to parts of it that the collector has returned, on the driver's node."""

    model: ObjectRef[bytes]
    triggers: ObjectRef[Any]


class RayRun:
    """One run on the connected cluster. :meth:`run` does all that is not done yet."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        world: World,
        directory: RunDirectory,
        display: Display,
        layout: Layout,
    ) -> None:
        self._config, self._plan, self._directory, self._display = config, plan, directory, display
        self._layout = layout
        self._jobs = Jobs()
        # by id: to compare scenarios, settings and all, takes longer than to run through thousands of them
        longest_first = sorted(directory.open_scenarios(plan), key=lambda scenario: -scenario.work)
        self._open = {scenario.id: scenario for scenario in longest_first}
        self._owners: dict[str, Owner] = {}
        self._measurable: set[str] = set()
        self._lost: dict[str, str] = {}
        self._thefts: dict[str, tuple[Scenario, ObjectRef[Any]]] = {}
        self._running: dict[str, str] = {}
        self._labels = {spec.id: spec.label for spec in (*plan.benigns, *plan.victims)}
        self._labels |= {scenario.id: scenario.label for scenario in plan.scenarios}
        self._accounts = {scenario.id: tuple(scenario.accounts) for scenario in plan.scenarios}
        self._budgets = {scenario.id: scenario.budget for scenario in plan.scenarios}
        self._refreshed = 0.0
        self._asked: list[ObjectRef[Any]] = []
        self._notices: dict[str, tuple[str, int, int]] = {}
        self._spent: dict[str, int] = {}
        self._open_accounts()
        # Ray starts a few processes at a time, in this order: the training of the benign models waits for nothing but
        # its trainer, and all the rest for the benign models
        self._crew = Crew.start(config, world, directory, layout, trainers=layout.trainers)
        self._ledger, self._board, self._collector = self._crew.ledger, self._crew.board, self._crew.collector
        self._trainers = Pool(self._new_trainer, self._crew.workers)
        # the owner's models all go to one, in their order: a victim is measured beside its benign model
        self._collectors: deque[Any] = deque(self._crew.collectors)
        self._handle: Any = None
        self._attackers = Pool(self._new_attacker)
        self._attackers.fill(layout.attackers)
        self._untrained = deque(plan.benigns)
        self._attempts: Counter[str] = Counter()
        self._nodes, self._looked, self._missing_since = len(nodes()), time.monotonic(), 0.0

    def _open_accounts(self) -> None:
        """Opens every account before there is a ledger actor: a damaged log, or an account that an earlier run of this
        directory opened on other terms, is refused here, in one line."""
        ledger = Ledger(self._directory.ledger, sync=self._config.sync_ledger)
        for scenario in self._open.values():
            for account, token in self._directory.tokens(scenario).items():
                ledger.open(account, scenario.terms(account, token))
        ledger.close()

    def run(self) -> bool:
        """Runs everything that is not done yet; returns whether every row is good.

        What fails becomes a row with its error, and the rest goes on.
        """
        deployment = Deployment(lambda: self._crew.serve(self._plan.attacks))
        try:
            self._start_trainings()
            while self._jobs or self._handle is None or self._untrained or self._open:
                self._jobs.finish_some()
                if self._handle is None and (handle := deployment.handle()) is not None:
                    self._handle = handle
                    self._start_thefts()
                self._muster()
                self._refresh()
        finally:
            deployment.wait()  # else it would go on with a Ray that is gone, and start another
            if self._asked:  # Ray tells the terminal of a call to an actor that is killed
                ray.wait(self._asked, num_returns=len(self._asked), timeout=REFRESH)
            self._crew.dismiss()
            if self._config.query_log:
                ledger = Ledger(self._directory.ledger, sync=self._config.sync_ledger)
                self._directory.restore_query_log(self._plan, ledger)
                ledger.close()
            self._directory.clear_test()
        return all(row.status == "ok" for row in self._directory.rows())

    # -- who works -------------------------------------------------------------------------------------------------

    def _new_trainer(self) -> Any:
        return self._crew.new_trainer()

    def _new_attacker(self) -> Any:
        return self._crew.new_attacker()

    def _worn_out(self, name: str) -> bool:
        """Counts that a piece of work was lost, or failed; whether it is not begun again."""
        self._attempts[name] += 1
        return self._attempts[name] >= ATTEMPTS

    def _muster(self) -> None:
        """Gives work to those who have come, and replaces those who died as far as there is work and room."""
        if self._trainers.look():
            self._start_trainings()
        if self._attackers.look():
            self._start_thefts()
        self._make_room()
        if self._untrained:
            self._trainers.fill(self._layout.trainers)
        if self._open and not self._missing_since:
            self._attackers.fill(self._layout.attackers)
        if self._untrained and (why := self._trainers.lost) is not None:
            self._lose(self._untrained.popleft(), f"no trainer could be started: {why}")
        if self._open and (why := self._attackers.lost) is not None:
            scenario = self._open.pop(next(iter(self._open)))
            self._fail(scenario, f"no attacker could be started: {why}", 0, self._plan.keys_for(scenario))

    def _make_room(self) -> None:
        """After the loss of a node attackers may hold what the trainer or the service needs: they give way, one after
        the other, until both are there again."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked, up = now, len(nodes())
        self._nodes = max(self._nodes, up)
        if up == self._nodes or (self._training() and self._serving()):
            self._missing_since = 0.0
        elif not self._missing_since or (
            now - self._missing_since > ROOM and self._has_place() and self._attackers.shed()
        ):
            self._missing_since = now

    def _has_place(self) -> bool:
        """Whether what is missing would fit a node that is left; else nobody's going would help."""
        missing = [self._layout.trainer] * (not self._training()) + [self._layout.victim] * (not self._serving())
        return all(any(share.fits(node) for node in nodes()) for share in missing)

    def _training(self) -> bool:
        return not self._untrained or self._trainers.working

    def _serving(self) -> bool:
        return self._handle is not None and self._crew.replicas_running() > 0

    # -- the owner's side ------------------------------------------------------------------------------------------

    def _start_trainings(self) -> None:
        while self._untrained and (self._trainers or self._directory.has_owner(self._untrained[0])):
            spec = self._untrained.popleft()
            if self._directory.has_owner(spec):
                self._keep(spec, self._collector.load_owner.options(num_returns=3).remote(spec))
            else:
                self._train(self._trainers.take(), spec)

    def _train(self, trainer: Any, spec: OwnerModel) -> None:
        def free() -> None:
            self._running.pop(spec.id, None)
            self._trainers.give_back(trainer)
            self._start_trainings()

        def done(_: Any) -> None:
            self._keep(spec, self._collector.keep_owner.options(num_returns=3).remote(spec, job.refs[0]))
            free()

        def failed(why: str) -> None:
            self._running.pop(spec.id, None)
            self._trainers.give_back(trainer)
            self._train_again(spec, why)

        def lost(why: str) -> None:
            self._running.pop(spec.id, None)
            self._trainers.drop(trainer)
            self._train_again(spec, f"its process died: {why}")

        self._running[spec.id] = spec.id
        job = Job(done, failed, lost)
        benign = self._owners[spec.benign.id].model if spec.watermark else None
        self._jobs.submit(job, trainer.train.options(num_returns=2).remote(spec, benign))

    def _train_again(self, spec: OwnerModel, why: str) -> None:
        if self._worn_out(spec.id):
            self._lose(spec, why)
        else:
            self._untrained.appendleft(spec)
        self._start_trainings()

    def _keep(self, spec: OwnerModel, refs: Sequence[ObjectRef[Any]]) -> None:
        """Goes on with an owner's model when it is on disk; if it was lost before, it is trained again."""

        def lost(why: str) -> None:
            self._lose(spec, f"whoever measured it died, again and again: {why}")

        def done(_: Any) -> None:
            model, triggers, _seconds = refs
            self._owners[spec.id] = Owner(model, triggers)
            measured = self._collector.measure_owner.remote(spec)
            self._jobs.submit(
                Job(lambda rows: self._measured_owner(spec, rows), lambda why: self._lose(spec, why), lost), [measured]
            )
            if spec.watermark is None:
                # a marked victim needs nothing of the benign one but its weights
                self._untrained.extend(victim for victim in self._plan.victims if victim.benign.id == spec.id)
                self._start_trainings()

        self._jobs.submit(Job(done, lambda why: self._lose(spec, why), lambda why: self._train_again(spec, why)), refs)

    def _measured_owner(self, spec: OwnerModel, rows: list[Row]) -> None:
        self._measurable.add(spec.id)
        if spec.watermark is not None:
            self._display.rows(rows)
        self._measure_thefts()
        self._start_thefts()

    def _lose(self, spec: OwnerModel, why: str) -> None:
        """A model of the owner's could not be trained: it, and all that needs it, become rows with the error."""
        gone = [spec] if spec.watermark else [v for v in self._plan.victims if v.benign.id == spec.id]
        self._lost[spec.id] = why
        self._untrained = deque(other for other in self._untrained if other not in gone)
        for victim in gone:
            self._lost[victim.id] = why
            self._report(self._collector.add_owner_failure.remote(victim, why))
        for scenario in [
            s for s in self._open.values() if {s.victim.id, (s.triggers_of or s.victim).id} & self._lost.keys()
        ]:
            del self._open[scenario.id]
            self._fail(scenario, f"its victim could not be trained: {why}", 0, self._plan.keys_for(scenario))
        self._measure_thefts()

    # -- the attackers' side ---------------------------------------------------------------------------------------

    def _start_thefts(self) -> None:
        """Gives every idle attacker the longest scenario whose victim can be served."""
        for scenario in list(self._open.values()):
            if not self._attackers or self._handle is None:
                return
            of = scenario.triggers_of
            # measured is also: on disk, from where the service takes its models
            if scenario.victim.id not in self._measurable or (of is not None and of.id not in self._measurable):
                continue
            del self._open[scenario.id]
            self._steal(self._attackers.take(), scenario)

    def _steal(self, attacker: Any, scenario: Scenario) -> None:
        tokens = self._directory.tokens(scenario)
        triggers = self._owners[scenario.triggers_of.id].triggers if scenario.triggers_of else None

        def free() -> None:
            self._running.pop(scenario.id, None)
            self._attackers.give_back(attacker)
            self._start_thefts()

        def done(_: Any) -> None:
            self._thefts[scenario.id] = (scenario, job.refs[0])
            self._measure_thefts()
            free()

        def failed(why: str) -> None:  # of a passing want, maybe: of memory, of disk, of time
            self._running.pop(scenario.id, None)
            self._attackers.give_back(attacker)
            self._steal_again(scenario, why)

        def lost(why: str) -> None:
            self._running.pop(scenario.id, None)
            if self._attackers.drop(attacker):
                self._steal_again(scenario, f"its process died: {why}")
            else:  # it made room
                self._open = {scenario.id: scenario} | self._open

        self._running[scenario.id] = scenario.id
        job = Job(done, failed, lost)
        record, detectors = self._config.save_transfer_sets, self._config.detectors
        theft = attacker.run.options(num_returns=2)
        self._jobs.submit(job, theft.remote(self._handle, scenario, tokens, triggers, record, detectors))

    def _steal_again(self, scenario: Scenario, why: str) -> None:
        """The next that is free begins where the checkpoint is; what was asked since is answered without charge."""
        if self._worn_out(scenario.id):
            spent = ray.get(self._ledger.spent.remote(list(scenario.accounts)))
            self._fail(scenario, why, spent, self._plan.keys_for(scenario))
        else:
            self._open = {scenario.id: scenario} | self._open
        self._start_thefts()

    def _measure_thefts(self) -> None:
        """Has every stolen model measured whose keys are all there, or will never be."""
        for scenario, theft in list(self._thefts.values()):
            keys = self._plan.keys_for(scenario)
            if not all(of.id in self._measurable or of.id in self._lost for of in (*keys, scenario.victim)):
                continue
            del self._thefts[scenario.id]
            lost = [of for of in keys if of.id in self._lost]
            if lost:
                why = f"its victim could not be trained: {self._lost[lost[0].id]}"
                self._fail(scenario, why, 0, lost)
            good = [of for of in keys if of.id not in self._lost]
            if good:
                charged = self._ledger.spent.remote(list(scenario.accounts))
                self._collectors.rotate()
                rows = self._collectors[0].add_stolen.remote(scenario, theft, charged, good)
                self._report(rows, partial(self._steal_again, scenario))

    def _fail(self, scenario: Scenario, why: str, queries: int, keys: Sequence[OwnerModel]) -> None:
        self._report(self._collector.add_failure.remote(scenario, why, queries, keys))

    def _report(self, rows: ObjectRef[list[Row]], lost: Failed | None = None) -> None:
        """Shows the rows when they are written."""
        self._jobs.submit(Job(self._display.rows, self._broken, lost or self._broken), [rows])

    def _broken(self, why: str) -> None:
        """A collector that fails cannot be worked around: it ends the run."""
        raise RunFailed(f"the collector failed: {why}")

    # -- what the user sees ----------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Draws. What is drawn is asked for at one look and taken at a later one: nobody waits for a busy ledger."""
        now = time.monotonic()
        if now - self._refreshed < REFRESH:
            return
        self._refreshed = now
        if not self._asked:
            self._asked = [self._board.read.remote(), self._ledger.all_spent.remote()]
        if len(ray.wait(self._asked, num_returns=len(self._asked), timeout=0)[0]) < len(self._asked):
            return
        asked, self._asked = self._asked, []
        try:
            self._notices, self._spent = ray.get(asked)
        except RayActorError:  # one of them is being started again; what was drawn last stays
            return
        tasks = {}
        for name in self._running:
            phase, done, total = self._notices.get(name, ("starting", 0, 1))
            spent = sum(self._spent.get(account, 0) for account in self._accounts.get(name, ()))
            tasks[name] = Task(self._labels[name], phase, done, total, self._budgets.get(name), spent)
        self._display.replace_all(tasks, "" if tasks else self._waited_for())

    def _waited_for(self) -> str:
        """What everybody waits for while no work is under way."""
        if self._untrained:
            return f"waiting for a trainer: {self._layout.trainer}"
        if self._handle is None or (self._missing_since and not self._serving()):
            return f"waiting for the service: {self._layout.victim} for each replica"
        return "measuring" if self._jobs else f"waiting for an attacker: {self._layout.attacker}"
