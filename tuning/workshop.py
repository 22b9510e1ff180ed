"""Where the work of all trials is done: one queue for the shared trainers, attackers and collector.

Every piece of work is named by the id of what it makes (a half-trained victim, a victim, a stolen model), is done once,
and lies in the sweep's directory afterwards. So a trial that asks again, in this start of the sweep or in a later one,
is answered from there: that is the whole of resuming.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import ray
from ray import ObjectRef

from actors.crew import Crew
from simulator.experiment.display import Task
from simulator.experiment.rundir import RunDirectory
from simulator.files import Folder
from simulator.plan.config import RunConfig
from simulator.plan.subjects import OwnerModel, Plan, Scenario, make_plan
from simulator.records.rows import Row
from tuning.config import SweepConfig
from tuning.objective import Measured, Stolen
from tuning.space import Setting, applied, setting_id
from tuning.workers import Workers, WorkFailed

#: from when to when a piece of work waited for a worker or was in its hands, ``time.monotonic()`` of this process
Span = tuple[float, float]
#: when a piece of work was begun, when a worker had it, and when it was done
Times = tuple[float, float, float]
#: a row's role, its scenario's or model's id, and the parameters of the watermark whose key it was measured with
Place = tuple[str, str, str]


def union(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one of the spans."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def idle(spans: Iterable[Span]) -> float:
    """Seconds between the first span's beginning and the last one's end that no span covers."""
    spans = list(spans)
    whole = max((last for _, last in spans), default=0.0) - min((first for first, _ in spans), default=0.0)
    return whole - union(spans)


class Workshop:
    """The actor's class; its methods run side by side in one event loop."""

    def __init__(self, path: str, config: SweepConfig, crew: Crew) -> None:
        self._directory, self._config, self._crew = RunDirectory(Path(path)), config, crew
        # what was measured of victims, half-trained or whole; the rows keep one benign WSR for all key filters
        self._victims = Folder(Path(path) / "sweep" / "victims", ".json")
        self._rows: dict[Place, Row] = {}
        self._keep([row for row in self._directory.rows() if row.status == "ok"])
        self._works: dict[str, asyncio.Task[Any]] = {}
        self._times: dict[str, list[Times]] = {}
        self._bases: dict[str, RunConfig] = {}
        self._plans: dict[str, tuple[RunConfig, Plan]] = {}
        self._running: dict[str, tuple[str, int | None, tuple[str, ...]]] = {}
        self._new_rows: list[Row] = []
        self._trainers = Workers(crew.new_trainer, crew.layout.trainers)
        self._attackers = Workers(crew.new_attacker, crew.layout.attackers)

    async def ready(self) -> None:
        """Returns when every worker has started, so that no trial waits for that."""
        everyone = [*self._trainers.everyone, *self._attackers.everyone]
        await asyncio.gather(*(one.__ray_ready__.remote() for one in everyone))

    async def stage(self, setting: Setting, stage: str) -> dict[str, Any]:
        """Does a stage of a trial for all of its seeds, and all stages before it that are not done.

        Returns:
            ``found``: a :class:`Measured` for each seed, as JSON; ``error``: why it failed, or None; ``work``: seconds
            of training, stealing and measuring; ``wait``: seconds of waiting for a worker, both of all seeds together;
            ``busy``: seconds in which something of it was being done or waited for a worker.
        """
        return await self._measure(*self._planned(setting, "search"), self._config.stages(), stage)

    async def confirm(self, setting: Setting) -> dict[str, Any]:
        """As :meth:`stage`, all of it: on the seeds and with the attacks that the search does not see, too."""
        config, plan = self._planned(setting, "holdout")
        thefts = sum(len(entry.expand()) for entry in config.scenarios)
        stages = ["victim", *(f"attack {at + 1}" for at in range(thefts))]
        return await self._measure(config, plan, stages, stages[-1], at_once=True)

    async def glance(self) -> tuple[dict[str, Task], list[Row]]:
        """What is under way, and the rows written since the last look."""
        notices, spent = await asyncio.gather(self._crew.board.read.remote(), self._crew.ledger.all_spent.remote())
        tasks = {}
        for name, (label, budget, accounts) in list(self._running.items()):
            phase, done, total = notices.get(name.partition(".")[0], ("starting", 0, 1))
            tasks[name] = Task(label, phase, done, total, budget, sum(spent.get(one, 0) for one in accounts))
        rows, self._new_rows = self._new_rows, []
        return tasks, rows

    async def spans(self) -> list[Span]:
        """When a worker had something to do, or something waited for one."""
        return [(begun, done) for times in self._times.values() for begun, _, done in times]

    def _planned(self, setting: Setting, part: Literal["search", "holdout"]) -> tuple[RunConfig, Plan]:
        """A setting's run configuration and plan. A trial asks once for each stage, and checking and planning take a
        good part of what Tune costs."""
        name = f"{part} {setting_id(setting)}"
        if name not in self._plans:
            if part not in self._bases:
                self._bases[part] = self._config.run_config(part)
            config = applied(self._bases[part], setting)
            self._plans[name] = config, make_plan(config)
        return self._plans[name]

    async def _measure(
        self, config: RunConfig, plan: Plan, stages: list[str], until: str, *, at_once: bool = False
    ) -> dict[str, Any]:
        asked = time.monotonic()
        works: set[str] = set()
        by_seed = {
            victim.seed: (victim, [scenario for scenario in plan.scenarios if scenario.victim.id == victim.id])
            for victim in plan.victims
        }
        steps = stages[: stages.index(until) + 1]
        results = await asyncio.gather(
            *(self._seed(plan, *by_seed[seed], steps, works, at_once) for seed in config.seeds), return_exceptions=True
        )
        broken = [one for one in results if isinstance(one, BaseException)]
        for one in broken:
            if not isinstance(one, WorkFailed):
                raise one
        # what another trial began before this one asked counts from then on
        times = [
            (max(begun, asked), max(taken, asked), done)
            for work in works
            for begun, taken, done in self._times.get(work, ())
            if done > asked
        ]
        return {
            "found": [one.model_dump(mode="json") for one in results if isinstance(one, Measured)],
            "error": str(broken[0]) if broken else None,
            "work": sum(done - taken for _, taken, done in times),
            "wait": sum(taken - begun for begun, taken, _ in times),
            "busy": union((begun, done) for begun, _, done in times),
        }

    async def _seed(
        self,
        plan: Plan,
        victim: OwnerModel,
        scenarios: list[Scenario],
        steps: list[str],
        works: set[str],
        at_once: bool,
    ) -> Measured:
        """The steps of one seed. ``works`` collects the names of the work that they needed and had not been done."""
        assert victim.watermark is not None
        await self._owner(victim.benign, plan, works)
        if "victim" not in steps and steps[-1] in victim.watermark.phases():
            half = await self._phase(victim, steps[-1], plan, works)
            accuracy = await self._benign_accuracy(victim.benign)
            return Measured(
                seed=victim.seed, benign_accuracy=accuracy, accuracy=half["accuracy"], victim_wsr=half["wsr"]
            )
        await self._owner(victim, plan, works)
        count = sum(step.startswith("attack") for step in steps)
        thefts = [self._theft(scenario, plan, works) for scenario in scenarios[:count]]
        rows = list(await asyncio.gather(*thefts)) if at_once else [await theft for theft in thefts]
        data = self._victims.read(victim.id)
        assert data is not None
        return Measured(
            seed=victim.seed,
            **json.loads(data),
            stolen=tuple(
                Stolen(
                    attack=_attack(scenario),
                    accuracy=_known(row.accuracy),
                    wsr=_known(row.wsr),
                    low=_known(row.wsr_low),
                )
                for scenario, row in zip(scenarios, rows, strict=False)
            ),
        )

    # -- pieces of work ----------------------------------------------------------------------------------------------

    async def _once(self, name: str, works: set[str], work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The result of a piece of work, which is begun if nobody has begun it. One that failed may be tried again."""
        task = self._works.get(name)
        if task is None or (task.done() and task.exception() is not None):
            works.add(name)
            task = self._works[name] = asyncio.ensure_future(work())
        elif not task.done():
            works.add(name)
        return await asyncio.shield(task)  # who asked may go away; the work goes on

    @contextmanager
    def _timed(self, name: str, label: str, scenario: Scenario | None = None) -> Iterator[Callable[[], None]]:
        """A span of waiting for a worker and of work; the function that it gives tells that a worker has it now."""
        begun = time.monotonic()
        taken: list[float] = []

        def begin() -> None:
            taken.append(time.monotonic())
            budget = scenario.budget if scenario else None
            self._running[name] = (label, budget, tuple(scenario.accounts) if scenario else ())

        try:
            yield begin
        finally:
            done = time.monotonic()
            self._times.setdefault(name, []).append((begun, taken[0] if taken else done, done))
            self._running.pop(name, None)

    async def _owner(self, spec: OwnerModel, plan: Plan, works: set[str]) -> list[Any]:
        """An owner's model, trained, on the shelf and measured: references to what the collector returns."""

        def kept(refs: Sequence[ObjectRef[Any]]) -> list[Any]:
            # whoever trains on from it needs a benign model's weights; a marked one's would lie in memory for nothing
            return [None if spec.watermark else refs[0], *refs[1:]]

        async def work() -> list[Any]:
            known = spec.watermark is None or self._victims.read(spec.id) is not None
            if self._directory.has_owner(spec) and known:
                return kept(self._crew.collector.load_owner.options(num_returns=3).remote(spec))
            benign = (await self._owner(spec.benign, plan, works))[0] if spec.watermark else None
            try:
                return kept(await self._train(spec, benign))
            except WorkFailed as error:
                self._note(await self._crew.collector.add_owner_failure.remote(spec, str(error)))
                raise

        return list(await self._once(spec.id, works, work))

    async def _train(self, spec: OwnerModel, benign: Any) -> list[Any]:
        collector = self._crew.collector
        with self._timed(spec.id, spec.label) as begin:
            if self._directory.has_owner(spec):
                begin()
                refs = list(collector.load_owner.options(num_returns=3).remote(spec))
            else:
                refs = await self._trainers.do(
                    lambda one: one.train.options(num_returns=2).remote(spec, benign),
                    begin,
                    lambda refs: collector.keep_owner.options(num_returns=3).remote(spec, refs[0]),
                )
            rows = await collector.measure_owner.remote(spec)
        self._note(rows)
        if rows:
            unmarked, marked = rows
            found = {"benign_accuracy": unmarked.accuracy, "benign_wsr": unmarked.wsr}
            found |= {"accuracy": marked.accuracy, "victim_wsr": marked.wsr}
            self._victims.write(spec.id, json.dumps(found).encode())
        return refs

    async def _phase(self, spec: OwnerModel, phase: str, plan: Plan, works: set[str]) -> dict[str, Any]:
        """A half-trained victim's accuracy and WSR."""
        name = f"{spec.id}.{phase.replace(' ', '-')}"

        async def work() -> dict[str, Any]:
            data = self._victims.read(name)
            if data is None:
                benign = (await self._owner(spec.benign, plan, works))[0]
                with self._timed(name, f"{spec.label}, {phase}") as begin:
                    refs = await self._trainers.do(lambda one: [one.train_phase.remote(spec, benign, phase)], begin)
                data = json.dumps(asdict(await refs[0])).encode()
                self._victims.write(name, data)
            found: dict[str, Any] = json.loads(data)
            return found

        return dict(await self._once(name, works, work))

    async def _theft(self, scenario: Scenario, plan: Plan, works: set[str]) -> Row:
        """A stolen model's row."""
        (of,) = plan.keys_for(scenario)
        assert of.watermark is not None
        place: Place = ("stolen", scenario.id, of.watermark.params_json())

        async def work() -> Row:
            if place not in self._rows:
                triggers = (await self._owner(of, plan, works))[1] if scenario.triggers_of else None
                await self._steal(scenario, of, triggers)
            return self._rows[place]

        row: Row = await self._once(scenario.id, works, work)
        return row

    async def _steal(self, scenario: Scenario, of: OwnerModel, triggers: Any) -> None:
        collector, ledger, accounts = self._crew.collector, self._crew.ledger, list(scenario.accounts)
        tokens = self._directory.tokens(scenario)
        record = self._config.base.save_transfer_sets

        def run(attacker: Any) -> list[Any]:
            return list(
                attacker.run.options(num_returns=2).remote(self._crew.service, scenario, tokens, triggers, record)
            )

        with self._timed(scenario.id, scenario.label, scenario) as begin:
            terms = {account: scenario.terms(account, token) for account, token in tokens.items()}
            await ledger.open.remote(terms, dict.fromkeys(terms, scenario.attack))
            try:
                (rows,) = await self._attackers.do(
                    run,
                    begin,
                    lambda refs: [collector.add_stolen.remote(scenario, refs[0], ledger.spent.remote(accounts), [of])],
                )
            except WorkFailed as error:
                spent = ledger.spent.remote(accounts)
                self._note(await collector.add_failure.remote(scenario, str(error), spent, [of]))
                raise
            rows = await rows
        self._note(rows)
        failed = [row.error for row in rows if row.status != "ok"]
        if failed:
            raise WorkFailed(str(failed[0]))

    async def _benign_accuracy(self, spec: OwnerModel) -> float:
        """The benign model's accuracy before any key has been measured on it."""

        async def work() -> float:
            accuracy: float = await self._crew.collector.benign_accuracy.remote(spec)
            return accuracy

        return float(await self._once(f"{spec.id}.accuracy", set(), work))

    def _note(self, rows: list[Row]) -> None:
        self._new_rows += rows
        self._keep([row for row in rows if row.status == "ok"])

    def _keep(self, rows: Sequence[Row]) -> None:
        self._rows |= {(row.role, row.scenario_id, row.watermark_params): row for row in rows}


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _attack(scenario: Scenario) -> str:
    """What tells an attack of a sweep from the others."""
    last = scenario.stages[-1]
    parts = ["+".join(stage.attack.name for stage in scenario.stages), scenario.stages[0].labels, last.pool_label]
    parts += [last.architecture] if last.architecture and last.architecture != scenario.victim.architecture else []
    return " ".join([*parts, str(scenario.budget)])


WorkshopActor = ray.remote(num_cpus=0)(Workshop)
