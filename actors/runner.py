"""Runs a plan on a Ray cluster: trains and serves the victims, hands scenarios to attackers, has the rows written.

The driver only moves references; models and answers go from actor to actor. What needs what:

    benign model -> controls' thefts, marked victims
    marked victim -> its thefts; the measuring of the controls (they are measured with its key)

so controls run while the marked victims are still training. The service and the attackers start while the benign
models train. Of the scenarios that can be started, the longest goes first, so that the last to end are short ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster import Layout
from actors.crew import Crew
from simulator.config import RunConfig
from simulator.display import Display, Task
from simulator.errors import one_line
from simulator.ledger import Ledger
from simulator.plan import OwnerModel, Plan, Scenario
from simulator.results import Row
from simulator.rundir import RunDirectory
from simulator.simulate import World

#: how often a scenario or a training is started again after its process died
ATTEMPTS = 3
#: seconds between two looks at what has finished
POLL = 0.1
#: of so many jobs one has to end before they are looked at, where that takes less than POLL
BATCH = 32
#: seconds to wait for a service that is starting when the run ends
START_PATIENCE = 60.0
#: seconds between two looks at the board and the ledger
REFRESH = 0.5

Done = Callable[[Any], None]
Failed = Callable[[str], None]


@dataclass
class Owner:
    """Where an owner's model is: references to the parts that :meth:`actors.workers.Trainer.train` returns."""

    model: ObjectRef[bytes]
    triggers: ObjectRef[Any]


@dataclass
class Job:
    """One remote call under way, and what to do when it ends. ``again`` starts it anew, in a new process, after its
    process died.

    The last of its references tells that it has ended, and is the only one whose value the driver fetches.
    """

    done: Done
    failed: Failed
    again: Callable[[], list[ObjectRef[Any]]] | None = None
    attempts: int = 1
    refs: list[ObjectRef[Any]] = field(default_factory=list)


class Deployment:
    """The service as it starts, in a thread of its own: the run goes on meanwhile."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(start,), daemon=True)
        self._thread.start()

    def _run(self, start: Callable[[], Any]) -> None:
        try:
            self._result = start()
        except BaseException as error:
            self._error = error

    def handle(self) -> Any:
        """The service's handle, or None while it starts.

        Raises:
            BaseException: what kept it from starting.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def wait(self) -> None:
        """Waits until it has started, or could not."""
        self._thread.join(START_PATIENCE)


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
        self._jobs: dict[ObjectRef[Any], Job] = {}
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
        self._trainers: deque[Any] = deque(self._crew.workers)
        # the owner's models all go to one, in their order: a victim is measured beside its benign model
        self._collectors: deque[Any] = deque(self._crew.collectors)
        self._handle: Any = None
        self._attackers: deque[Any] = deque(self._new_attacker() for _ in range(layout.attackers))
        self._untrained = deque(plan.benigns)

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
            while self._jobs or self._handle is None:
                self._finish_some()
                if self._handle is None and (handle := deployment.handle()) is not None:
                    self._handle = handle
                    self._start_thefts()
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

    # -- jobs ------------------------------------------------------------------------------------------------------

    def _submit(self, job: Job, refs: Sequence[ObjectRef[Any]]) -> None:
        job.refs = list(refs)
        self._jobs[refs[-1]] = job

    def _finish_some(self) -> None:
        """Waits a moment for jobs to end, and goes on from those that have."""
        if not self._jobs:
            time.sleep(POLL)
            return
        # one look costs time for every job: where they are many, it is worth waiting until some have ended
        jobs = list(self._jobs)
        for ref in ray.wait(jobs, num_returns=1 + len(jobs) // BATCH, timeout=POLL)[0]:
            self._finish(ref)

    def _finish(self, ref: ObjectRef[Any]) -> None:
        job = self._jobs.pop(ref)
        try:
            value = ray.get(ref)
        except RayTaskError as error:  # first, for it is also of its cause's type, which may be another actor's death
            job.failed(one_line(error.cause))
            return
        except RayError as error:  # the process died, or ran out of memory
            if job.again is not None and job.attempts < ATTEMPTS:
                job.attempts += 1
                self._submit(job, job.again())
            else:
                job.failed(f"its process died {job.attempts} times: {one_line(error)[:200]}")
            return
        job.done(value)

    def _new_trainer(self) -> Any:
        return self._crew.new_trainer()

    def _new_attacker(self) -> Any:
        return self._crew.new_attacker()

    # -- the owner's side ------------------------------------------------------------------------------------------

    def _start_trainings(self) -> None:
        while self._trainers and self._untrained:
            self._train(self._trainers.popleft(), self._untrained.popleft())

    def _train(self, trainer: Any, spec: OwnerModel) -> None:
        benign = self._owners[spec.benign.id].model if spec.watermark else None

        worker = [trainer]

        def start() -> list[ObjectRef[Any]]:
            if self._directory.has_owner(spec):
                return list(self._collector.load_owner.options(num_returns=4).remote(spec))
            return list(worker[-1].train.options(num_returns=4).remote(spec, benign))

        def again() -> list[ObjectRef[Any]]:
            worker.append(self._new_trainer())
            return start()

        def free() -> None:
            self._running.pop(spec.id, None)
            self._trainers.append(worker[-1])
            self._start_trainings()

        def done(_: Any) -> None:
            model, owner, triggers, _seconds = job.refs
            self._owners[spec.id] = Owner(model, triggers)
            if spec.watermark is None:
                # a marked victim needs nothing of the benign one but its weights
                self._untrained.extend(victim for victim in self._plan.victims if victim.benign.id == spec.id)
            measured = self._collector.add_owner.remote(spec, owner)
            self._submit(
                Job(lambda rows: self._measured_owner(spec, rows), lambda why: self._lose(spec, why)), [measured]
            )
            free()

        def failed(why: str) -> None:
            self._lose(spec, why)
            free()

        self._running[spec.id] = spec.id
        job = Job(done, failed, again)
        self._submit(job, start())

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
            self._steal(self._attackers.popleft(), scenario)

    def _steal(self, attacker: Any, scenario: Scenario) -> None:
        tokens = self._directory.tokens(scenario)
        triggers = self._owners[scenario.triggers_of.id].triggers if scenario.triggers_of else None

        worker = [attacker]

        def start() -> list[ObjectRef[Any]]:
            record, detectors = self._config.save_transfer_sets, self._config.detectors
            theft = worker[-1].run.options(num_returns=2)
            return list(theft.remote(self._handle, scenario, tokens, triggers, record, detectors))

        def again() -> list[ObjectRef[Any]]:
            worker.append(self._new_attacker())
            return start()

        def free() -> None:
            self._running.pop(scenario.id, None)
            self._attackers.append(worker[-1])
            self._start_thefts()

        def done(_: Any) -> None:
            self._thefts[scenario.id] = (scenario, job.refs[0])
            self._measure_thefts()
            free()

        def failed(why: str) -> None:
            spent = ray.get(self._ledger.spent.remote(list(scenario.accounts)))
            self._fail(scenario, why, spent, self._plan.keys_for(scenario))
            free()

        self._running[scenario.id] = scenario.id
        job = Job(done, failed, again)
        self._submit(job, start())

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
                self._report(self._collectors[0].add_stolen.remote(scenario, theft, charged, good))

    def _fail(self, scenario: Scenario, why: str, queries: int, keys: Sequence[OwnerModel]) -> None:
        self._report(self._collector.add_failure.remote(scenario, why, queries, keys))

    def _report(self, rows: ObjectRef[list[Row]]) -> None:
        """Shows the rows when they are written. A collector that fails cannot be worked around: it ends the run."""

        def failed(why: str) -> None:
            raise RuntimeError(f"the collector failed: {why}")

        self._submit(Job(self._display.rows, failed), [rows])

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
        self._display.replace_all(tasks, "measuring" if not tasks else "")
