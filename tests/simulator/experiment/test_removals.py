"""What a thief does after the theft, in a whole run: every removal has its rows and its control, and asks nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from simulator.context import Context
from simulator.data.pool import Pool, PoolSpec
from simulator.experiment.display import Display
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import prepare
from simulator.experiment.removal import Washed, wash
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import Theft, run_scenario
from simulator.experiment.world import World
from simulator.models import Classifier, build
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Removed, Stolen
from simulator.records.rows import Row
from simulator.removals.base import Removal, ThiefTask
from simulator.service.ledger import Ledger

BRIEF = {"epochs": 2, "batch_size": 32}
#: a short training with many triggers, so that the victim learns some: a key of which it answers nothing is refused
SHORT = {"first_epochs": 1, "second_epochs": 12, "second_ratio": 1.0, "watermark_weight": 5.0, "candidates": 40}
PRUNED = {"removal": {"name": "pruning", "fraction": [0.0, 1.0]}}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 300, "test": 80},
    "architecture": "naivenet",
    "training": BRIEF,
    "watermarks": [{"name": "deeptracer", **SHORT, "margin": margin} for margin in (1, 2)],
    "key_filter": {"architecture": "linear", "pool": "attacker", "queries": 40, "keep": 20, "training": BRIEF},
    "scenarios": [
        {
            "attack": {"name": "knockoff", "training": BRIEF},
            "pool": "attacker",
            "labels": "hard",
            "architecture": "lenet5",
            "budget": 50,
            "curve": [20],
            "then": [{**PRUNED, "then": [{"removal": {"name": "pruning", "fraction": 0.5, "scope": "layer"}}]}],
        },
        {"then": [PRUNED]},
    ],
    "device": "cpu",
}


@dataclass
class Run:
    """A configuration in a directory, run as often as is asked."""

    config: RunConfig
    path: Path

    def __post_init__(self) -> None:
        self.plan, self.world = prepare(self.config)
        self.directory = RunDirectory.create(self.config, self.path)

    def go(self) -> bool:
        display = Display(Console(quiet=True), total=0, quiet=True)
        return LocalRun(self.config, self.plan, self.world, self.directory, display).run()

    def rows(self) -> list[Row]:
        return self.directory.rows()

    def of(self, subject: Removed | Stolen) -> list[Row]:
        return [row for row in self.rows() if row.scenario_id == subject.id]

    def spent(self) -> dict[str, int]:
        ledger = Ledger(self.directory.ledger)
        ledger.close()
        return ledger.all_spent()

    def weights(self, subject: Removed | Stolen) -> dict[str, torch.Tensor]:
        return self.directory.load_model(subject).state_dict()

    def removal(self, fraction: float, *, control: bool = False, leaked: bool = False, chain: int = 1) -> Removed:
        return next(
            each
            for each in self.plan.removals
            if each.chain[0].removal.params()["fraction"] == fraction
            and (each.control, each.theft is None, len(each.chain)) == (control, leaked, chain)
        )


def run_of(path: Path, **changes: Any) -> Run:
    return Run(check_config({**CONFIG, **changes}), path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that went well and that no test changes."""
    run = run_of(tmp_path_factory.mktemp("runs") / "whole")
    assert run.go()
    return run


RATES = ("accuracy", "agreement", "wsr", "wsr_low", "wsr_high", "p_value", "verified", "key_samples")


def rates(row: Row) -> list[Any]:
    return [getattr(row, name) for name in RATES]


class TestRows:
    def test_every_model_has_its_row_with_each_key_that_concerns_it(self, whole: Run) -> None:
        wanted = Counter(
            (removed.id, of.watermark.params_json())
            for removed in whole.plan.removals
            for of in whole.plan.keys_for(removed)
        )
        found = [row for row in whole.rows() if row.role == "removed"]
        assert Counter((row.scenario_id, row.watermark_params) for row in found) == wanted
        # (2 thefts + their control with two keys) x 4 removals, and (2 victims + the benign model with two keys) x 2
        assert len(found) == 4 * 4 + 4 * 2
        assert all(row.status == "ok" and None not in rates(row) for row in found)

    def test_a_removal_of_no_strength_measures_what_its_theft_does(self, whole: Run) -> None:
        for control in (False, True):
            removed = whole.removal(0.0, control=control)
            assert removed.theft is not None
            before, after = whole.of(removed.theft), whole.of(removed)
            assert [rates(row) for row in after] == [rates(row) for row in before]
            stolen, washed = whole.weights(removed.theft), whole.weights(removed)
            assert all(torch.equal(value, washed[name]) for name, value in stolen.items())

    def test_a_leaked_model_that_is_left_alone_measures_what_the_owners_does(self, whole: Run) -> None:
        victim = {row.watermark_params: row for row in whole.rows() if row.role == "victim"}
        benign = {row.watermark_params: row for row in whole.rows() if row.role == "benign"}
        for removed in whole.plan.removals:
            if removed.theft is None and removed.removal.params()["fraction"] == 0:
                owners = benign if removed.control else victim
                for row in whole.of(removed):
                    own = owners[row.watermark_params]
                    assert [rates(row)[at] for at in (0, 2, 6)] == [rates(own)[at] for at in (0, 2, 6)]
                    assert row.agreement == 1

    def test_a_model_without_weights_gives_one_answer_and_carries_nothing(self, whole: Run) -> None:
        answers = whole.directory.load_model(whole.removal(1.0))(whole.world.dataset.test.images).argmax(1)
        (answer,) = set(answers.tolist())
        (row,) = whole.of(whole.removal(1.0))
        assert row.accuracy == float((whole.world.dataset.test.labels == answer).double().mean())

    def test_the_columns_are_its_thefts_and_its_own(self, whole: Run) -> None:
        removed = whole.removal(1.0)
        assert removed.theft is not None
        (row,), stolen = whole.of(removed), whole.of(removed.theft)[-1]
        same = ("victim", "attack", "attack_params", "labels", "pool", "stage", "budget", "accounts", "architecture")
        assert [getattr(row, name) for name in same] == [getattr(stolen, name) for name in same]
        assert (row.queries, stolen.queries, row.architecture) == (50, 50, "lenet5")
        assert (row.removal, stolen.removal) == ("pruning", None)
        assert json.loads(str(row.removal_params)) == {"fraction": 1.0, "scope": "global"}
        assert row.started is not None
        assert stolen.started is not None
        assert stolen.started < row.started

    def test_a_chain_names_all_of_its_removals(self, whole: Run) -> None:
        (row,) = whole.of(whole.removal(1.0, chain=2))
        assert row.removal == "pruning+pruning"
        assert json.loads(str(row.removal_params)) == [
            {"fraction": 1.0, "scope": "global"},
            {"fraction": 0.5, "scope": "layer"},
        ]

    def test_a_leaked_model_has_no_attack_and_no_query(self, whole: Run) -> None:
        for control in (False, True):
            removed = whole.removal(1.0, leaked=True, control=control)
            for row in whole.of(removed):
                assert (row.attack, row.budget, row.queries, row.labels, row.pool) == (None,) * 5
                assert row.victim == ("benign" if control else removed.owner.id)
                assert (row.removal, row.architecture) == ("pruning", "naivenet")

    def test_nothing_is_paid_for_a_removal(self, whole: Run) -> None:
        assert whole.spent() == {theft.id: 50 for theft in whole.plan.scenarios}
        assert len(whole.plan.scenarios) == 3


class TestResume:
    def test_nothing_is_done_twice_and_what_lacks_its_row_is_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_of(tmp_path / "run")
        assert run.go()
        before = {row.identity: rates(row) for row in run.rows()}
        lost = run.removal(1.0, chain=2)
        for part in (run.path / "results").glob(f"part-{lost.id}-*"):
            part.unlink()

        def never(*_: object, **__: object) -> None:
            raise AssertionError("done again")

        for name in ("train_owner", "run_scenario", "wash"):
            monkeypatch.setattr(f"simulator.experiment.local.{name}", never)
        assert run.go()
        assert {row.identity: rates(row) for row in run.rows()} == before

    def test_a_removal_that_is_added_needs_no_new_theft(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scenario = {name: value for name, value in CONFIG["scenarios"][0].items() if name != "then"}
        first = run_of(tmp_path / "run", scenarios=[scenario])
        assert first.go()
        config = check_config({**CONFIG, "scenarios": CONFIG["scenarios"][:1]})
        plan, world = prepare(config)

        def never(*_: object, **__: object) -> None:
            raise AssertionError("stolen again")

        monkeypatch.setattr("simulator.experiment.local.run_scenario", never)
        display = Display(Console(quiet=True), total=0, quiet=True)
        assert LocalRun(config, plan, world, first.directory, display).run()
        assert Counter(row.role for row in first.rows())["removed"] == 4 * 4


class TestFailure:
    def test_a_theft_that_fails_is_tried_once_and_takes_its_removals_along(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_of(tmp_path / "run")
        lost = next(theft for theft in run.plan.scenarios if not theft.control)
        tried: list[str] = []
        with monkeypatch.context() as patched:

            def unlucky(theft: Stolen, world: World, transport: Any, tokens: Any, *others: Any, **more: Any) -> Theft:
                tried.append(theft.id)
                made = run_scenario(theft, world, transport, tokens, *others, **more)
                if theft.id == lost.id:
                    raise MemoryError("out of memory")
                return made

            patched.setattr("simulator.experiment.local.run_scenario", unlucky)
            assert not run.go()
        assert Counter(tried) == {theft.id: 1 for theft in run.plan.scenarios}
        for row in run.rows():
            subject = next((each for each in run.plan.copies if each.id == row.scenario_id), None)
            failed = subject is not None and subject.theft == lost
            assert (row.status == "failed") == failed
            if failed:
                assert (
                    row.error
                    == ("" if subject == lost else "its target could not be made: ") + "MemoryError: out of memory"
                )
                assert row.queries == 50
        assert Counter(row.status for row in run.rows())["failed"] == 1 + 4
        assert run.go()
        assert run.spent()[lost.id] == 50

    def test_a_removal_that_fails_takes_what_follows_it_along_and_no_sibling(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_of(tmp_path / "run", controls=False, watermarks=CONFIG["watermarks"][:1])
        lost = run.removal(1.0)
        with monkeypatch.context() as patched:

            def unlucky(subject: Removed, *others: Any) -> Washed:
                if subject.id == lost.id:
                    raise ValueError("a layer\nof no weights")
                return wash(subject, *others)

            patched.setattr("simulator.experiment.local.wash", unlucky)
            assert not run.go()
        errors = {row.scenario_id: row.error for row in run.rows() if row.status == "failed"}
        assert errors == {
            lost.id: "ValueError: a layer of no weights",
            run.removal(1.0, chain=2).id: "its target could not be made: ValueError: a layer of no weights",
        }
        assert run.go()


class Curious(Removal):
    """Remembers the pool that it was given. It has no name of its own, so that no registry holds it."""

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        assert task.pool is not None
        drawn = torch.randint(0, 255, (4,), generator=context.generator)
        SEEN.append((task.pool, drawn, model.training))
        return model.train()


SEEN: list[tuple[Pool, torch.Tensor, bool]] = []


class TestWash:
    """One removal by itself: it is given what a thief has, and nothing else."""

    def wash(self, world: World, removed: Removed) -> Classifier:
        target = build("naivenet", channels=1, size=8, classes=10, generator=torch.Generator().manual_seed(1))
        made = wash(removed, target, world, None, torch.device("cpu"))
        assert made.seconds >= 0
        assert made.started.tzinfo is not None
        return made.model

    def test_the_pool_has_neither_a_key_nor_a_test_image(self) -> None:
        plan, world = prepare(check_config(CONFIG))
        SEEN.clear()
        pools = [PoolSpec(parts={part: 1.0}) for part in ("attacker", "owner", "patches")]
        for pool in pools:
            model = self.wash(world.for_attackers(), Removed(plan.scenarios[0], Curious(name="curious"), pool))
            assert not any(module.training for module in model.modules())
        held_out = {image.tobytes() for image in world.dataset.test.images.numpy()}
        for pool, _, training in SEEN:
            assert held_out.isdisjoint(image.tobytes() for image in pool.images.numpy())
            assert not training
        assert [len(pool) for pool, _, _ in SEEN] == [300, 120, 10_000]

    def test_the_id_decides_what_is_drawn(self) -> None:
        plan, world = prepare(check_config(CONFIG))
        SEEN.clear()
        pool = PoolSpec(parts={"attacker": 1.0}, size=40)
        for target in (plan.scenarios[0], plan.scenarios[0], plan.scenarios[1]):
            torch.manual_seed(len(SEEN))
            self.wash(world.for_attackers(), Removed(target, Curious(name="curious"), pool))
        (first, drawn, _), (again, drawn_again, _), (other, drawn_other, _) = SEEN
        assert torch.equal(first.images, again.images)
        assert torch.equal(drawn, drawn_again)
        assert not torch.equal(first.images, other.images)
        assert not torch.equal(drawn, drawn_other)

    def test_attackers_see_no_test_image_in_a_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        worlds: list[World] = []

        def watched(subject: Removed, target: Classifier, world: World, *others: Any) -> Washed:
            worlds.append(world)
            return wash(subject, target, world, *others)

        monkeypatch.setattr("simulator.experiment.local.wash", watched)
        run = run_of(tmp_path / "run", controls=False, watermarks=CONFIG["watermarks"][:1])
        assert run.go()
        assert [len(world.dataset.test) for world in worlds] == [0] * len(run.plan.removals)
