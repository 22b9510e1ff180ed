"""The scheduler over a bench that makes names instead of models: what is made, when, how often, and what is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.experiment.rundir import RunDirectory
from simulator.experiment.schedule import Scheduler, WorkFailed
from simulator.plan.config import check_config
from simulator.plan.subjects import Marked, Subject
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row

T = TypeVar("T")

CONFIG: dict[str, Any] = {
    "name": "plan",
    "dataset": "digits",
    "watermarks": [{"name": "deeptracer", "margin": 1.0}, {"name": "deeptracer", "margin": 2.0}],
    "scenarios": [
        {
            "attack": "knockoff",
            "pool": "attacker",
            "budget": 9,
            "then": [{"removal": {"name": "pruning", "fraction": [0.1, 0.2]}, "then": [{"removal": "pruning"}]}],
        },
        {"attack": "knockoff", "pool": {"attacker": 1, "triggers": 1}, "budget": 9},
        {"then": [{"removal": "pruning"}]},
    ],
}


def plan(**changes: Any) -> Plan:
    return make_plan(check_config({**CONFIG, **changes}))


class Memory:
    """A run directory of which only the names of its models are known, and a bench that works on it.

    Attributes:
        broken: why a model cannot be made, by its id.
        turns: turns of the event loop that making a model takes, by its id.
        begun, done: ids in the order in which making them began and ended.
        measured: with which keys each model was measured.
        failed: the error and the queries in the rows of a model that failed, by its id.
        at_once: the most models that were being made at a time.
        shown: what the scheduler showed.
    """

    def __init__(self, **broken: str) -> None:
        self.there: set[str] = set()
        self.broken: dict[str, str] = dict(broken)
        self.charged: dict[str, int] = {}
        self.turns: dict[str, int] = {}
        self.begun: list[str] = []
        self.done: list[str] = []
        self.at_once = 0
        self.measured: list[tuple[str, tuple[str, ...]]] = []
        self.failed: dict[str, list[tuple[str, str, int]]] = {}
        self.shown: list[list[Row]] = []

    # -- the run directory

    def has(self, subject: Subject) -> bool:
        return subject.id in self.there

    # -- the bench

    async def make(self, subject: Subject) -> None:
        assert subject.id not in self.there, "made again"
        for needed in (subject.parent, getattr(subject, "triggers_of", None)):
            assert needed is None or needed.id in self.there, f"{subject.label} was begun before {needed.label}"
        self.begun.append(subject.id)
        self.at_once = max(self.at_once, len(self.begun) - len(self.done))
        for _ in range(self.turns.get(subject.id, 1)):
            await asyncio.sleep(0)
        if subject.id in self.broken:
            raise WorkFailed(self.broken[subject.id], self.charged.get(subject.id, 0))
        self.there.add(subject.id)
        self.done.append(subject.id)

    async def measure(self, subject: Subject, keys: Sequence[Marked]) -> list[Row]:
        assert keys
        assert {subject.id, *(of.id for of in keys)} <= self.there
        await asyncio.sleep(0)
        self.measured.append((subject.id, tuple(of.id for of in keys)))
        return [self._row(subject, of) for of in keys]

    async def fail(self, subject: Subject, why: str, keys: Sequence[Marked], queries: int) -> list[Row]:
        self.failed.setdefault(subject.id, []).extend((why, of.id, queries) for of in keys)
        return [self._row(subject, of, status="failed", error=why) for of in keys]

    def _row(self, subject: Subject, of: Marked, **columns: Any) -> Row:
        # what a row says beside these is the collector's business
        return Row(
            scenario_id=subject.id,
            role="stolen",
            victim=of.id,
            dataset="digits",
            watermark=of.watermark.name,
            watermark_params=of.watermark.params_json(),
            architecture="linear",
            seed=0,
            **columns,
        )

    def scheduler(self, made: Plan, **others: Any) -> Scheduler:
        return Scheduler(self, cast(RunDirectory, self), made.keys_for, self.shown.append, **others)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end; whatever asyncio complains of is an error."""

    async def main() -> T:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        try:
            return await asyncio.wait_for(work, 20)
        finally:
            await asyncio.sleep(0)
            assert complaints == []
            assert asyncio.all_tasks() == {asyncio.current_task()}, "work was left behind"

    return asyncio.run(main())


def everything(made: Plan) -> list[Subject]:
    return [*made.victims, *made.copies]


def below(subject: Subject, root: Subject) -> bool:
    return any(each == root for each in subject.lineage) or getattr(subject.theft, "triggers_of", None) == root


class TestOnce:
    def test_each_thing_is_made_and_measured_once_however_many_ask(self) -> None:
        made, memory = plan(seeds=[0, 1]), Memory()
        scheduler = memory.scheduler(made)

        async def ask() -> list[list[Row]]:
            await asyncio.gather(*(scheduler.measure_all(everything(made)) for _ in range(3)))
            return await asyncio.gather(*(scheduler.measured(subject) for subject in everything(made) * 2))

        rows = run(ask())
        assert Counter(memory.begun) == dict.fromkeys((each.id for each in (*made.owners, *made.copies)), 1)
        assert sorted(memory.done) == sorted(memory.begun)
        assert sorted(memory.measured) == sorted(
            (each.id, tuple(of.id for of in made.keys_for(each))) for each in everything(made)
        )
        assert len(memory.shown) == len(everything(made))
        assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
        assert [row.scenario_id for found in rows for row in found][:2] == [victim.id for victim in made.victims[:2]]

    def test_a_piece_of_work_of_any_kind_is_done_once(self) -> None:
        begun: list[int] = []

        async def work() -> int:
            begun.append(1)
            await asyncio.sleep(0)
            return 7

        async def ask() -> list[int]:
            scheduler = Memory().scheduler(plan())
            return [
                *await asyncio.gather(*(scheduler.once("x", work) for _ in range(5))),
                await scheduler.once("x", work),
            ]

        assert run(ask()) == [7] * 6
        assert begun == [1]

    def test_work_goes_on_when_the_one_who_asked_goes_away(self) -> None:
        made, memory = plan(), Memory()
        (first, *_) = made.benigns
        memory.turns[first.id] = 20

        async def ask() -> None:
            scheduler = memory.scheduler(made)
            leaving = asyncio.create_task(scheduler.made(first))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            await scheduler.made(first)

        run(ask())
        assert memory.begun == memory.done == [first.id]

    def test_what_lies_in_the_directory_is_not_made_again_nor_what_it_was_made_from(self) -> None:
        made, memory = plan(), Memory()
        leaf = next(each for each in made.removals if len(each.chain) == 2 and not each.control)
        memory.there = {leaf.id, leaf.owner.id}
        rows = run(memory.scheduler(made).measured(leaf))
        assert memory.begun == []
        assert memory.measured == [(leaf.id, (leaf.owner.id,))]
        assert [row.scenario_id for row in rows] == [leaf.id]

    def test_only_what_is_missing_on_the_way_is_made(self) -> None:
        made, memory = plan(), Memory()
        leaf = next(each for each in made.removals if len(each.chain) == 2 and not each.control)
        assert leaf.theft is not None
        memory.there = {leaf.theft.id, leaf.owner.id}
        run(memory.scheduler(made).made(leaf))
        assert memory.begun == [leaf.target.id, leaf.id]


class TestNeeds:
    @given(data=st.data())
    def test_a_model_is_begun_when_all_that_it_needs_is_there(self, data: st.DataObject) -> None:
        """Over random trees, in any order of asking, with work of any length: :meth:`Memory.make` looks at it."""
        made = data.draw(trees())
        memory = Memory()
        everyone = [*made.owners, *made.copies]
        memory.turns = {each.id: data.draw(st.integers(0, 6), label=each.label) for each in everyone}
        memory.there = set()
        for each in everyone:  # an earlier run made some of them, but none without its parent
            if (each.parent is None or each.parent.id in memory.there) and data.draw(st.booleans()):
                memory.there.add(each.id)
        before = set(memory.there)
        asked = data.draw(st.permutations(everything(made)))
        run(memory.scheduler(made).measure_all(asked))
        assert len(set(memory.begun)) == len(memory.begun)
        assert set(memory.begun) == {each.id for each in needed(asked, made, before)}
        assert {subject for subject, _ in memory.measured} == {each.id for each in asked}

    @given(data=st.data())
    def test_asked_for_one_it_makes_its_line_and_no_other(self, data: st.DataObject) -> None:
        made = data.draw(trees())
        subject = data.draw(st.sampled_from([*made.owners, *made.copies]))
        memory = Memory()
        run(memory.scheduler(made).made(subject))
        assert set(memory.begun) == {each.id for each in line(subject)}
        # the line in its order
        assert [each for each in memory.begun if each in {one.id for one in subject.lineage}] == [
            each.id for each in reversed(list(subject.lineage))
        ]

    def test_the_triggers_victim_comes_before_the_control_that_is_given_its_triggers(self) -> None:
        made, memory = plan(), Memory()
        control = next(each for each in made.scenarios if each.control and each.triggers_of)
        assert control.triggers_of is not None
        memory.turns[control.triggers_of.id] = 30
        run(memory.scheduler(made).made(control))
        assert memory.done == [made.benigns[0].id, control.triggers_of.id, control.id]

    def test_controls_run_while_marked_victims_are_still_training(self) -> None:
        made, memory = plan(), Memory()
        memory.turns = {victim.id: 50 for victim in made.victims}
        run(memory.scheduler(made).measure_all(everything(made)))
        control = next(each for each in made.scenarios if each.control and not each.triggers_of)
        assert memory.done.index(control.id) < min(memory.done.index(victim.id) for victim in made.victims)
        # but it is measured with all of its keys
        assert dict(memory.measured)[control.id] == tuple(victim.id for victim in made.victims)

    def test_siblings_are_made_side_by_side(self) -> None:
        made, memory = plan(), Memory()
        memory.turns = {each.id: 9 for each in made.removals}
        theft = next(each for each in made.scenarios if not each.control)
        siblings = [each for each in made.removals if each.target == theft]
        both = [each.id for each in siblings]
        run(memory.scheduler(made).measure_all(siblings))
        assert (len(both), memory.begun[-2:], memory.done[-2:], memory.at_once) == (2, both, both, 2)


class TestFailure:
    def test_a_benign_model_takes_all_of_its_seed_along(self) -> None:
        made = plan(seeds=[0, 1])
        lost = made.benigns[1]
        memory = Memory(**{lost.id: "RuntimeError: diverged"})
        run(memory.scheduler(made).measure_all(everything(made)))
        assert {each.id for each in made.copies if each.seed == 1} < set(memory.failed)
        for each in everything(made):
            assert (each.id in memory.failed) == (each.seed == 1)
            for why, _, queries in memory.failed.get(each.id, []):
                # a victim has its benign model's reason as it is
                assert why == ("" if isinstance(each, Marked) else VICTIM) + "RuntimeError: diverged"
                assert queries == 0
            assert len(memory.failed.get(each.id, [])) == (len(made.keys_for(each)) if each.seed == 1 else 0)
        assert not any(each in {one.id for one in everything(made) if one.seed == 1} for each in memory.begun)

    def test_a_victim_takes_its_thefts_and_their_removals_along_and_its_keys_rows(self) -> None:
        made = plan()
        lost, other = made.victims
        memory = Memory(**{lost.id: "RuntimeError: diverged"})
        run(memory.scheduler(made).measure_all(everything(made)))
        for each in everything(made):
            keys = made.keys_for(each)
            failed = memory.failed.get(each.id, [])
            if below(each, lost):
                assert failed == [
                    (("" if each == lost else VICTIM) + "RuntimeError: diverged", of.id, 0) for of in keys
                ]
                assert each.id not in memory.there
            elif each.control:
                # the control itself is good: it has a row with each key that there is
                assert failed == [(f"{VICTIM}RuntimeError: diverged", lost.id, 0)] * (lost in keys)
                assert (each.id, tuple(of.id for of in keys if of != lost)) in memory.measured
            else:
                assert failed == []
                assert (each.id, (other.id,)) in memory.measured

    def test_a_theft_takes_its_removals_along_with_what_it_was_charged(self) -> None:
        made = plan()
        lost = next(each for each in made.scenarios if not each.control and each.triggers_of is None)
        memory = Memory(**{lost.id: "MemoryError: out of memory"})
        memory.charged[lost.id] = 5
        run(memory.scheduler(made).measure_all(everything(made)))
        assert memory.failed.pop(lost.id) == [("MemoryError: out of memory", lost.owner.id, 5)]
        children = [each for each in made.removals if each.theft == lost]
        assert len(children) == 4
        for each in children:  # a removal of a removal has the same reason, and not a reason of a reason
            assert memory.failed.pop(each.id) == [(f"{TARGET}MemoryError: out of memory", lost.owner.id, 5)]
        assert memory.failed == {}
        assert len(memory.measured) == len(everything(made)) - 1 - len(children)

    def test_a_removal_takes_along_what_follows_it_and_not_its_siblings(self) -> None:
        made = plan()
        lost = next(each for each in made.removals if each.theft is not None and len(each.chain) == 1)
        memory = Memory(**{lost.id: "ValueError: no"})
        run(memory.scheduler(made).measure_all(everything(made)))
        (child,) = (each for each in made.removals if each.target == lost)
        assert set(memory.failed) == {lost.id, child.id}
        assert {why for why, _, _ in memory.failed[lost.id]} == {"ValueError: no"}
        assert {why for why, _, _ in memory.failed[child.id]} == {f"{TARGET}ValueError: no"}

    def test_a_removal_of_the_owners_own_model_is_lost_with_it(self) -> None:
        made = plan(scenarios=[{"then": [{"removal": "pruning"}]}], controls=False)
        memory = Memory(**{made.victims[0].id: "ValueError: no"})
        run(memory.scheduler(made).measured(made.removals[0]))
        assert memory.failed[made.removals[0].id] == [(f"{VICTIM}ValueError: no", made.victims[0].id, 0)]

    @given(data=st.data())
    def test_whatever_fails_every_model_has_its_rows(self, data: st.DataObject) -> None:
        made = data.draw(trees())
        everyone = [*made.owners, *made.copies]
        memory = Memory(**dict.fromkeys((each.id for each in everyone if data.draw(st.integers(0, 3)) == 0), "why"))
        asked = data.draw(st.permutations(everything(made)))
        run(memory.scheduler(made, retry=data.draw(st.booleans())).measure_all(asked))
        for each in asked:
            good = [of for subject, keys in memory.measured if subject == each.id for of in keys]
            bad = [of for _, of, _ in memory.failed.get(each.id, [])]
            assert sorted(good + bad) == sorted(of.id for of in made.keys_for(each))
            makeable = memory.broken.keys().isdisjoint(one.id for one in line(each))
            keyed = {of.id for of in made.keys_for(each) if memory.broken.keys().isdisjoint(one.id for one in line(of))}
            assert set(good) == (keyed if makeable else set())

    def test_what_is_no_failure_of_work_is_the_callers(self) -> None:
        """The disk is full, or somebody presses Ctrl-C: no row says so, and whoever asks is told."""
        made, memory = plan(), Memory()

        async def full(subject: Subject) -> None:
            raise OSError("no space left on device")

        memory.make = full  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no space left"):
            run(memory.scheduler(made).measured(made.victims[0]))
        assert memory.failed == {}


class TestRetry:
    @pytest.mark.parametrize("where", ["benign", "victim", "theft", "removal"])
    def test_work_that_failed_is_tried_again_when_asked_again(self, where: str) -> None:
        made = plan(controls=False)
        leaf = next(each for each in made.removals if len(each.chain) == 2)
        assert leaf.theft is not None
        places: dict[str, Subject] = {"theft": leaf.theft, "removal": leaf.target}
        lost = places.get(where) or (made.benigns[0] if where == "benign" else made.victims[0])
        memory = Memory(**{lost.id: "why"})

        async def ask() -> list[list[Row]]:
            scheduler = memory.scheduler(made, retry=True)
            rows = [await scheduler.measured(leaf) for _ in range(2)]
            memory.broken.clear()
            return [*rows, await scheduler.measured(leaf), await scheduler.measured(leaf)]

        *failed, good, again = run(ask())
        assert [row.status for rows in failed for row in rows] == ["failed"] * 2
        assert [row.status for row in good] == ["ok"]
        assert good is again
        assert Counter(memory.begun)[lost.id] == 3
        assert Counter(memory.begun)[leaf.id] == 1
        assert len(memory.measured) == 1

    def test_a_failure_that_many_wait_for_is_tried_once(self) -> None:
        made = plan()
        memory = Memory(**{made.benigns[0].id: "why"})
        run(memory.scheduler(made).measure_all(everything(made)))
        assert memory.begun == [made.benigns[0].id]

    def test_a_run_tries_nothing_again_whenever_it_is_asked(self) -> None:
        """One after the other, as a run in one process does: each asks when the one before has failed."""
        made = plan()
        lost: list[Subject] = [made.victims[0], made.scenarios[-1]]
        memory = Memory(**dict.fromkeys((each.id for each in lost), "why"))

        async def ask() -> None:
            scheduler = memory.scheduler(made, retry=False)
            for _ in range(2):
                for subject in everything(made):
                    await scheduler.measured(subject)

        run(ask())
        assert set(Counter(memory.begun).values()) == {1}
        assert {each.id for each in lost} < set(memory.begun)

    def test_rows_that_say_of_a_failure_are_measured_again(self) -> None:
        """The model is good, and what it was measured with was not."""
        made, memory = plan(controls=False), Memory()
        measure, bad = memory.measure, [True]

        async def measured(subject: Subject, keys: Sequence[Marked]) -> list[Row]:
            rows = await measure(subject, keys)
            if bad:
                return [row.model_copy(update={"status": "failed", "error": "the ledger charged 4"}) for row in rows]
            return rows

        memory.measure = measured  # type: ignore[method-assign]

        async def ask() -> list[str]:
            scheduler = memory.scheduler(made, retry=True)
            first = await scheduler.measured(made.scenarios[0])
            bad.clear()
            return [row.status for row in (*first, *await scheduler.measured(made.scenarios[0]))]

        assert run(ask()) == ["failed", "ok"]
        assert len(set(memory.begun)) == len(memory.begun)


# -- random trees -----------------------------------------------------------------------------------------------------

VICTIM, TARGET = "its victim could not be trained: ", "its target could not be made: "

FRACTIONS = st.sampled_from([0.1, 0.2, 0.3])
THEN = st.recursive(
    st.builds(lambda fraction: {"removal": {"name": "pruning", "fraction": fraction}}, FRACTIONS),
    lambda inner: st.builds(lambda entry, then: {**entry, "then": then}, inner, st.lists(inner, max_size=2)),
    max_leaves=4,
)
SCENARIOS = st.builds(
    lambda pool, budget, then: {"attack": "knockoff", "pool": pool, "budget": budget, "then": then},
    st.sampled_from(["attacker", {"attacker": 1, "triggers": 1}]),
    st.sampled_from([9, [9, 10]]),
    st.lists(THEN, max_size=2),
) | st.builds(lambda then: {"then": then}, st.lists(THEN, min_size=1, max_size=2))


@st.composite
def trees(draw: st.DrawFn) -> Plan:
    margins = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=3, unique=True))
    return plan(
        watermarks=[{"name": "deeptracer", "margin": margin} for margin in margins],
        seeds=draw(st.sampled_from([[0], [0, 1]])),
        scenarios=draw(st.lists(SCENARIOS, max_size=3)),
        controls=draw(st.booleans()),
    )


def line(subject: Subject) -> list[Subject]:
    """All that a model is made from, itself included."""
    found = list(subject.lineage)
    theft = subject.theft
    return found + (list(theft.triggers_of.lineage) if theft is not None and theft.triggers_of else [])


def needed(asked: Sequence[Subject], made: Plan, there: set[str]) -> list[Subject]:
    """What has to be made of the models asked for and of those whose keys concern them."""
    wanted: list[Subject] = []

    def want(subject: Subject) -> None:
        if subject.id not in there:
            wanted.append(subject)
            for each in (subject.parent, getattr(subject, "triggers_of", None)):
                if each is not None:
                    want(each)

    for subject in asked:
        want(subject)
        for of in made.keys_for(subject):
            want(of)
    return wanted
