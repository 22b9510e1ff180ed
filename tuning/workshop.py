"""The workshop: the one actor that does the work of all trials. It uses the same scheduler as a run.

A piece of work is named by the id of the model that it makes: a half-trained victim, a victim, a stolen model. It is
done once, and its result lies in the sweep's directory. A trial that asks again, in this or a later start of the sweep,
gets that result. So a resumed sweep needs no other memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import ray

from actors.bench import CrewBench
from actors.crew import Crew
from simulator.experiment.display import Task
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import Scheduler, WorkFailed
from simulator.files import Folder
from simulator.plan.config import RunConfig
from simulator.plan.subjects import Marked, Stolen, Subject, Trained
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row
from tuning.config import SweepConfig
from tuning.objective import Measured
from tuning.objective import Stolen as StolenFound
from tuning.space import Setting, applied, setting_id

#: begin and end of a piece of work, its wait for a worker included, by ``time.monotonic()`` of this process
Span = tuple[float, float]
#: a row's role, its model's id, and the parameters of the watermark whose key it was measured with
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
        # measurements of victims, half-trained or whole: the rows hold only one benign WSR for all key filters
        self._victims = Folder(Path(path) / "sweep" / "victims", ".json")
        self._rows: dict[Place, Row] = {}
        self._new_rows: list[Row] = []
        self._keep([row for row in self._directory.rows() if row.status == "ok"])
        self._bases: dict[str, RunConfig] = {}
        self._plans: dict[str, tuple[RunConfig, Plan]] = {}
        self._keys: dict[str, tuple[Marked, ...]] = {}

    async def open(self) -> None:
        """Starts the workers. Returns when each has answered, so that no trial waits for a start."""
        self._bench = CrewBench(self._crew, self._directory, self._config.base)
        self._bench.open(self._crew.service)
        self._scheduler = Scheduler(
            self._bench, self._directory, lambda subject: self._keys[subject.id], self._note, retry=True
        )
        await asyncio.gather(self._bench.trainers.ready(), self._bench.attackers.ready())

    async def stage(self, setting: Setting, stage: str) -> dict[str, Any]:
        """Does a stage of a trial for all its seeds, and before it all earlier stages that are not done.

        Returns:
            ``found``: a :class:`Measured` for each seed, as JSON; ``error``: why it failed, or None; ``work``: seconds
            of training, stealing and measuring; ``wait``: seconds of waiting for a worker (both summed over the seeds);
            ``busy``: seconds in which at least one seed had work done or waited for a worker.
        """
        return await self._measure(*self._planned(setting, "search"), self._config.stages(), stage)

    async def confirm(self, setting: Setting) -> dict[str, Any]:
        """Does all stages of a setting on the holdout's seeds, with the attacks of the search and the holdout's own.
        Returns as :meth:`stage`."""
        config, plan = self._planned(setting, "holdout")
        thefts = sum(len(entry.expand()) for entry in config.scenarios)
        stages = ["victim", *(f"attack {at + 1}" for at in range(thefts))]
        return await self._measure(config, plan, stages, stages[-1], at_once=True)

    async def glance(self) -> tuple[dict[str, Task], list[Row]]:
        """The tasks under way, and the rows written since the last call."""
        tasks = await self._bench.glance()
        rows, self._new_rows = self._new_rows, []
        return tasks, rows

    async def spans(self) -> list[Span]:
        """The spans in which work was done or waited for a worker."""
        return [(begun, done) for times in self._bench.times.values() for begun, _, done in times]

    def _planned(self, setting: Setting, part: Literal["search", "holdout"]) -> tuple[RunConfig, Plan]:
        """A setting's run configuration and plan. They are kept, because a trial asks at each stage, and checking and
        planning are a good part of Tune's cost."""
        name = f"{part} {setting_id(setting)}"
        if name not in self._plans:
            if part not in self._bases:
                self._bases[part] = self._config.run_config(part)
            config = applied(self._bases[part], setting)
            plan = make_plan(config)
            self._plans[name] = config, plan
            self._keys |= {subject.id: plan.keys_for(subject) for subject in (*plan.victims, *plan.copies)}
        return self._plans[name]

    async def _measure(
        self, config: RunConfig, plan: Plan, stages: list[str], until: str, *, at_once: bool = False
    ) -> dict[str, Any]:
        asked = time.monotonic()
        by_seed = {
            victim.seed: (victim, [scenario for scenario in plan.scenarios if scenario.victim.id == victim.id])
            for victim in plan.victims
        }
        steps = stages[: stages.index(until) + 1]
        works: set[str] = set()
        results = await asyncio.gather(
            *(self._seed(*by_seed[seed], steps, works, at_once) for seed in config.seeds), return_exceptions=True
        )
        broken = [one for one in results if isinstance(one, BaseException)]
        for one in broken:
            if not isinstance(one, WorkFailed):
                raise one
        # work that another trial began earlier counts from the moment this one asked
        times = [
            (max(begun, asked), max(taken, asked), done)
            for work in works
            for begun, taken, done in self._bench.times.get(work, ())
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
        self, victim: Marked, scenarios: list[Stolen], steps: list[str], works: set[str], at_once: bool
    ) -> Measured:
        """Does the steps of one seed. ``works`` collects the names of the work that they need."""
        works.add(victim.benign.id)
        if "victim" not in steps and steps[-1] in victim.watermark.phases():
            return await self._half(victim, steps[-1], works)
        works.add(victim.id)
        found = await self._whole(victim)
        count = sum(step.startswith("attack") for step in steps)
        works.update(scenario.id for scenario in scenarios[:count])
        thefts = [self._theft(scenario) for scenario in scenarios[:count]]
        rows = list(await asyncio.gather(*thefts)) if at_once else [await theft for theft in thefts]
        return Measured(
            seed=victim.seed,
            **found,
            stolen=tuple(
                StolenFound(
                    attack=_attack(scenario),
                    accuracy=_known(row.accuracy),
                    wsr=_known(row.wsr),
                    low=_known(row.wsr_low),
                )
                for scenario, row in zip(scenarios, rows, strict=False)
            ),
        )

    # -- pieces of work ----------------------------------------------------------------------------------------------

    async def _half(self, victim: Marked, phase: str, works: set[str]) -> Measured:
        """Measures a half-trained victim."""
        name = f"{victim.id}.{phase.replace(' ', '-')}"
        works.add(f"{victim.id}.{phase}")

        async def work() -> dict[str, Any]:
            data = self._victims.read(name)
            if data is None:
                await self._scheduler.made(victim.benign)
                data = json.dumps(asdict(await self._bench.probe(victim, phase))).encode()
                self._victims.write(name, data)
            found: dict[str, Any] = json.loads(data)
            return found

        half = await self._scheduler.once(name, work)
        accuracy = await self._benign_accuracy(victim.benign)
        return Measured(seed=victim.seed, benign_accuracy=accuracy, accuracy=half["accuracy"], victim_wsr=half["wsr"])

    async def _benign_accuracy(self, spec: Trained) -> float:
        """The benign model's accuracy before any key has been measured on it."""

        async def work() -> float:
            await self._scheduler.made(spec)
            return await self._bench.accuracy(spec)

        return await self._scheduler.once(f"accuracy {spec.id}", work)

    async def _whole(self, victim: Marked) -> dict[str, Any]:
        """Measures a victim, or reads what was measured."""
        data = self._victims.read(victim.id)
        if data is None:
            unmarked, marked = await self._rows_of(victim, 2)
            found = {"benign_accuracy": unmarked.accuracy, "benign_wsr": unmarked.wsr}
            found |= {"accuracy": marked.accuracy, "victim_wsr": marked.wsr}
            data = json.dumps(found).encode()
            self._victims.write(victim.id, data)
        whole: dict[str, Any] = json.loads(data)
        return whole

    async def _theft(self, scenario: Stolen) -> Row:
        """The row of a stolen model, measured if need be."""
        (of,) = self._keys[scenario.id]
        place: Place = ("stolen", scenario.id, of.watermark.params_json())
        if place not in self._rows:
            self._keep([(await self._rows_of(scenario, 1))[-1]])
        return self._rows[place]

    async def _rows_of(self, subject: Subject, least: int) -> list[Row]:
        """The rows of a model.

        Raises:
            WorkFailed: it could not be made or measured.
        """
        rows = await self._scheduler.measured(subject)
        failed = [row.error for row in rows if row.status != "ok"]
        if failed or len(rows) < least:
            raise WorkFailed(str(failed[0] if failed else "no rows were written"))
        return rows

    def _note(self, rows: list[Row]) -> None:
        self._new_rows += rows
        self._keep([row for row in rows if row.status == "ok"])

    def _keep(self, rows: Sequence[Row]) -> None:
        self._rows |= {(row.role, row.scenario_id, row.watermark_params): row for row in rows}


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _attack(scenario: Stolen) -> str:
    """An attack's name in a sweep: its method, answers, pool, own architecture and budget."""
    last = scenario.stages[-1]
    parts = ["+".join(stage.attack.name for stage in scenario.stages), scenario.stages[0].labels, last.pool_label]
    parts += [last.architecture] if last.architecture and last.architecture != scenario.victim.architecture else []
    return " ".join([*parts, str(scenario.budget)])


WorkshopActor = ray.remote(num_cpus=0)(Workshop)
