"""Work that failed: in a run it fails all that needs it, and is not begun again. In a sweep a later trial may ask."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import Scheduler, WorkFailed
from simulator.plan.config import check_config
from simulator.plan.subjects import Marked, Removed, Subject
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row
from simulator.removals.pruning import Pruning


@pytest.fixture
def plan() -> Plan:
    """Two victims, and two thefts from each of them and from the benign model."""
    return make_plan(
        check_config(
            {
                "name": "failures",
                "dataset": "digits",
                "watermarks": [{"name": "deeptracer"}, {"name": "ewe"}],
                "scenarios": [{"attack": "knockoff", "budget": [100, 200]}],
            }
        )
    )


#: a row of which the scheduler asks no more
FAILED: Any = SimpleNamespace(status="failed")


class Bench:
    """Makes nothing, and fails at one model as often as it is told to."""

    def __init__(self, bad: Subject, times: int) -> None:
        self.bad, self.times, self.made, self.failed = bad.id, times, Counter[str](), dict[str, str]()

    async def make(self, subject: Subject) -> None:
        self.made[subject.id] += 1
        if subject.id == self.bad and self.made[subject.id] <= self.times:
            raise WorkFailed("ValueError: no")

    async def measure(self, subject: Subject, keys: Sequence[Marked]) -> list[Row]:
        return []

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        self.failed |= {f"{subject.id} {of.id}": why for of in keys}
        return [FAILED]


def scheduled(bench: Bench, plan: Plan, path: Path, **options: Any) -> Scheduler:
    return Scheduler(bench, RunDirectory(path), plan.keys_for, lambda _: None, **options)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_failed_is_not_begun_again_by_each_that_needs_it(plan: Plan, tmp_path: Path, at_once: bool) -> None:
    bad, good = plan.victims
    bench = Bench(bad, 10**6)

    async def run() -> None:
        scheduler, subjects = scheduled(bench, plan, tmp_path), (*plan.victims, *plan.copies)
        if at_once:
            await scheduler.measure_all(subjects)
        else:
            for subject in subjects:
                await scheduler.measured(subject)

    asyncio.run(run())
    thefts = [theft for theft in plan.scenarios if theft.victim.id != bad.id]
    assert bench.made == {subject.id: 1 for subject in (*plan.owners, *thefts)}
    lost = "its victim could not be trained: ValueError: no"
    controls = [theft for theft in plan.scenarios if theft.control]
    from_bad = [theft for theft in plan.scenarios if theft.victim.id == bad.id]
    assert bench.failed == {
        f"{bad.id} {bad.id}": "ValueError: no",
        **{f"{theft.id} {bad.id}": lost for theft in (*from_bad, *controls)},
    }
    assert good.id in bench.made


def test_a_failed_theft_fails_the_removals_that_follow_it(plan: Plan, tmp_path: Path) -> None:
    theft = next(theft for theft in plan.scenarios if not theft.control)
    removals = [Removed(theft, Pruning(fraction=fraction), None) for fraction in (0.2, 0.4)]
    bench = Bench(theft, 10**6)

    async def run() -> None:
        scheduler = scheduled(bench, plan, tmp_path)
        for subject in (theft, *removals):
            await scheduler.measured(subject)

    asyncio.run(run())
    assert bench.made[theft.id] == 1
    assert not {removed.id for removed in removals} & bench.made.keys()
    (of,) = plan.keys_for(theft)
    assert bench.failed == {
        f"{theft.id} {of.id}": "ValueError: no",
        **{f"{removed.id} {of.id}": "its target could not be made: ValueError: no" for removed in removals},
    }


def test_a_sweep_may_begin_it_again(plan: Plan, tmp_path: Path) -> None:
    (victim, _) = plan.victims
    bench = Bench(victim.benign, 1)

    async def run() -> None:
        scheduler = scheduled(bench, plan, tmp_path, retry=True)
        await scheduler.measured(victim)
        await scheduler.measured(victim)

    asyncio.run(run())
    assert bench.made == {victim.benign.id: 2, victim.id: 1}
    assert bench.failed == {f"{victim.id} {victim.id}": "ValueError: no"}
