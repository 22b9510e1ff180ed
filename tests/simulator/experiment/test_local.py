"""The plain loop on a tiny task: whole runs, failures, resumption, and that all accounts of a run agree."""

from __future__ import annotations

import json
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from simulator.attacks.base import ATTACKS, Attack
from simulator.attacks.knockoff import Knockoff
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.experiment.display import Display, Task
from simulator.experiment.local import LocalRun
from simulator.experiment.owner import TrainedOwner, train_owner
from simulator.experiment.preflight import load_world
from simulator.experiment.rundir import RunDirectory
from simulator.experiment.theft import run_scenario
from simulator.experiment.world import World
from simulator.models import load_model
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Marked, OwnerModel, Stolen, Trained
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row
from simulator.service.answers import answer_policy
from simulator.service.ledger import Ledger, digest_of
from simulator.service.oracle import ModelOracle, Oracle, ServiceOracle
from simulator.training.predict import predict
from simulator.watermarks.base import Embedding
from simulator.watermarks.deeptracer import DeepTracer

BRIEF = {"epochs": 2, "batch_size": 32}
KNOCKOFF = {"name": "knockoff", "training": BRIEF}
#: a short training with many triggers, so that the victim learns some: a key of which it answers nothing is refused
SHORT = {"first_epochs": 1, "second_epochs": 12, "second_ratio": 1.0, "watermark_weight": 5.0, "candidates": 40}
MARGINS = [{"name": "deeptracer", **SHORT, "margin": m} for m in (1, 2)]
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 300, "test": 80},
    "architecture": "naivenet",
    "training": BRIEF,
    "watermarks": MARGINS[:1],
    "key_filter": {"architecture": "linear", "pool": "attacker", "queries": 40, "keep": 20, "training": BRIEF},
    "device": "cpu",
}


class Quiet(Display):
    """A display that shows nothing."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True), total=0, quiet=True)


class Interrupting(Quiet):
    """Interrupts the run, as Ctrl-C does, when it has heard of its progress ``patience`` times."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience

    def update(self, name: str, task: Task) -> None:
        super().update(name, task)
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt


@dataclass
class Run:
    """A configuration in a directory, run as often as is asked."""

    config: RunConfig
    path: Path

    def __post_init__(self) -> None:
        self.plan: Plan = make_plan(self.config)
        self.world: World = load_world(self.config, self.plan)

    def go(self, display: Display | None = None) -> bool:
        if self.path.exists():
            directory, found = RunDirectory.resume(self.path)
            assert found == self.config
        else:
            directory = RunDirectory.create(self.config, self.path)
        return LocalRun(self.config, self.plan, self.world, directory, display or Quiet()).run()

    def rows(self) -> list[Row]:
        return RunDirectory(self.path).rows()

    def stolen(self) -> list[Row]:
        return [row for row in self.rows() if row.role == "stolen"]

    def ledger(self) -> Ledger:
        ledger = Ledger(RunDirectory(self.path).ledger)
        ledger.close()
        return ledger

    def measured(self) -> list[dict[str, Any]]:
        """The rows without what no two runs share: the times."""
        return [row.model_dump(exclude={"seconds", "started", "finished"}) for row in self.rows()]

    def paid(self, scenario: Stolen) -> dict[str, dict[int, tuple[int, str]]]:
        """By account and key: how many images were paid for, and their digest."""
        ledger = self.ledger()
        return {account: ledger.grants(account) for account in scenario.accounts}

    def asked(self, scenario: Stolen) -> dict[str, dict[str, torch.Tensor]]:
        """The transfer set of each account."""
        kept = {account: self.path / "transfer" / f"{account}.safetensors" for account in scenario.accounts}
        return {account: load_file(path) for account, path in kept.items()}


def run_of(path: Path, **changes: Any) -> Run:
    return Run(check_config({**CONFIG, **changes}), path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with all that a plan can hold, which went well and which no test changes."""
    run = run_of(
        tmp_path_factory.mktemp("runs") / "whole",
        watermarks=MARGINS,
        seeds=[0, 3],
        save_transfer_sets=True,
        scenarios=[
            {"attack": KNOCKOFF, "pool": ["attacker", "owner"], "labels": ["soft", "hard", "top-2"], "budget": 290},
            {
                "attack": {"name": "distillation", "training": BRIEF},
                "pool": {"triggers": 1, "attacker": 3},
                "budget": 40,
            },
            {
                "stages": [
                    {"attack": KNOCKOFF, "pool": "attacker", "budget": 50},
                    {"attack": KNOCKOFF, "pool": "owner", "labels": "hard", "architecture": "linear", "budget": 100},
                ]
            },
            {"attack": KNOCKOFF, "pool": "attacker", "budget": 80, "accounts": 3, "curve": [20, 60]},
            {"attack": KNOCKOFF, "rounds": ["owner", "attacker"], "budget": 45},
        ],
    )
    assert run.go()
    return run


class TestRows:
    def test_every_scenario_has_its_row_and_no_other(self, whole: Run) -> None:
        wanted = Counter(
            (name, of.watermark.params_json())
            for scenario in whole.plan.scenarios
            for of in whole.plan.keys_for(scenario)
            for name in (scenario.id, *(f"{scenario.id}-q{queries}" for queries in scenario.stages[0].curve))
        )
        assert Counter((row.scenario_id, row.watermark_params) for row in whole.stolen()) == wanted
        # 2 seeds x 2 margins, from the victim and from the benign model, x (6 + 1 + 1 + 3 + 1)
        assert Counter(row.role for row in whole.rows()) == {"benign": 4, "victim": 4, "stolen": 2 * 2 * 2 * 12}

    def test_every_theft_has_its_control_with_the_same_key(self, whole: Run) -> None:
        def what(row: Row) -> tuple[Any, ...]:
            measured_with = (row.watermark, row.watermark_params, row.seed, row.key_samples)
            done = (row.attack, row.attack_params, row.labels, row.pool, row.stage, row.architecture, row.budget)
            return measured_with + done

        thefts = Counter(what(row) for row in whole.stolen() if row.victim != "benign")
        controls = Counter(what(row) for row in whole.stolen() if row.victim == "benign")
        assert thefts == controls
        assert set(thefts.values()) == {1}

    def test_all_is_measured(self, whole: Run) -> None:
        for row in whole.rows():
            rates = (row.accuracy, row.agreement, row.wsr, row.wsr_low, row.wsr_high, row.p_value, row.verified)
            assert row.status == "ok"
            assert None not in rates
            assert row.key_samples
            assert row.started is not None
            assert row.finished is not None
            assert row.started < row.finished
        assert all((row.false_trigger is None) == (row.role != "victim") for row in whole.rows())

    def test_queries_are_what_the_pool_and_the_budget_allow(self, whole: Run) -> None:
        spent = Counter((row.pool, row.stage, row.budget, row.queries) for row in whole.stolen())
        assert spent == {
            ("attacker", 1, 290, 290): 24,
            ("owner", 1, 290, 120): 24,  # there are no more images
            ("3*attacker+triggers", 1, 40, 40): 8,
            ("attacker then owner", 2, 50, 50): 8,
            ("attacker", 1, 80, 80): 8,
            ("attacker", 1, 60, 60): 8,
            ("attacker", 1, 20, 20): 8,
            ("owner then attacker", 1, 45, 45): 8,
        }

    def test_a_control_with_triggers_has_the_key_of_those_triggers_alone(self, whole: Run) -> None:
        rows = [row for row in whole.stolen() if row.attack == "distillation" and row.victim == "benign"]
        assert len(rows) == 4
        assert len({row.scenario_id for row in rows}) == 4

    def test_stolen_models_are_kept(self, whole: Run) -> None:
        for row in whole.stolen():
            if "-q" not in row.scenario_id:
                model, about = load_model(whole.path / "models" / f"stolen-{row.scenario_id}.safetensors")
                assert json.loads(about["stolen"])["scenario"] == row.scenario_id
                assert model.spec.architecture == row.architecture


class TestAccounts:
    """The ledger, the rows and the transfer sets tell the same story, to the image."""

    def test_what_is_charged_is_what_was_asked(self, whole: Run) -> None:
        spent = whole.ledger().all_spent()
        assert set(spent) == {account for scenario in whole.plan.scenarios for account in scenario.accounts}
        rows = {row.scenario_id: row for row in whole.stolen()}
        for scenario in whole.plan.scenarios:
            assert rows[scenario.id].queries == sum(spent[account] for account in scenario.accounts)
            assert all(0 < spent[account] <= budget for account, budget in scenario.accounts.items())

    def test_the_paid_images_are_those_of_the_transfer_sets(self, whole: Run) -> None:
        for scenario in whole.plan.scenarios:
            found = {}
            for account, kept in whole.asked(scenario).items():
                parts = kept["images"].split(kept["chunks"].tolist())
                found[account] = {key: (len(part), digest_of(part.numpy().tobytes())) for key, part in enumerate(parts)}
                assert len(kept["answers"]) == len(kept["images"])
            assert found == whole.paid(scenario)

    def test_the_answers_are_the_victims(self, whole: Run) -> None:
        for scenario in whole.plan.scenarios:
            owner = RunDirectory(whole.path).load_owner(scenario.victim)
            assert owner is not None
            policy = answer_policy(scenario.stages[0].labels)
            for kept in whole.asked(scenario).values():
                parts = kept["images"].split(kept["chunks"].tolist())
                assert torch.equal(kept["answers"], torch.cat([policy(predict(owner.model, part)) for part in parts]))

    def test_colluding_attackers_share_the_images_and_the_costs(self, whole: Run) -> None:
        colluding = [scenario for scenario in whole.plan.scenarios if len(scenario.accounts) > 1]
        # from two victims and the benign model of each of two seeds
        assert len(colluding) == 6
        for scenario in colluding:
            asked = [kept["images"] for kept in whole.asked(scenario).values()]
            assert [len(images) for images in asked] == [27, 27, 26]
            assert len({image.tobytes() for images in asked for image in images.numpy()}) == 80

    def test_triggers_are_asked_where_the_pool_has_some(self, whole: Run) -> None:
        directory = RunDirectory(whole.path)
        with_triggers = [scenario for scenario in whole.plan.scenarios if scenario.triggers_of]
        assert len(with_triggers) == 8
        for scenario in with_triggers:
            assert scenario.triggers_of is not None
            owner = directory.load_owner(scenario.triggers_of)
            assert owner is not None
            assert owner.key is not None
            assert owner.triggers is not None
            asked = whole.asked(scenario)[scenario.id]["images"].numpy()
            triggers, keys = ({image.tobytes() for image in k.images.numpy()} for k in (owner.triggers, owner.key))
            assert sum(image.tobytes() in triggers for image in asked) == 10  # a quarter of 40
            assert not any(image.tobytes() in keys for image in asked)

    def test_no_attacker_asked_about_a_test_image(self, whole: Run) -> None:
        held_out = {image.tobytes() for image in whole.world.dataset.test.images.numpy()}
        for scenario in whole.plan.scenarios:
            for kept in whole.asked(scenario).values():
                assert held_out.isdisjoint(image.tobytes() for image in kept["images"].numpy())

    def test_every_scenario_draws_for_itself(self, whole: Run) -> None:
        """The same pool is asked whole and in an order that no two scenarios share."""
        orders = [
            tuple(image.tobytes() for image in whole.asked(scenario)[scenario.id]["images"].numpy())
            for scenario in whole.plan.scenarios
            if scenario.stages[0].pool.label == "owner" and not scenario.stages[0].rounds
        ]
        assert len(set(orders)) == len(orders) == 18
        assert len({frozenset(order) for order in orders}) == 1


def test_each_further_stage_asks_the_model_stolen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage leaves a part of the budget, which a second that asked the victim would spend."""
    thefts: list[tuple[Oracle, nn.Module]] = []
    told: list[tuple[torch.Tensor, torch.Tensor]] = []
    extract, ask = Knockoff.extract, ModelOracle.query

    def watched(self: Knockoff, oracle: Oracle, *arguments: Any, **others: Any) -> nn.Module:
        thefts.append((oracle, extract(self, oracle, *arguments, **others)))
        return thefts[-1][1]

    def overheard(self: ModelOracle, images: torch.Tensor) -> torch.Tensor:
        answers = ask(self, images)
        if self.budget == 90:  # the second stage's, not the collector's, who asks copies the key
            told.append((images, answers))
        return answers

    monkeypatch.setattr(Knockoff, "extract", watched)
    monkeypatch.setattr(ModelOracle, "query", overheard)
    stages = [
        {"attack": KNOCKOFF, "pool": "owner", "budget": 200},
        {"attack": KNOCKOFF, "pool": "attacker", "labels": "hard", "architecture": "linear", "budget": 90},
    ]
    run = run_of(tmp_path / "run", scenarios=[{"stages": stages}], controls=False)
    assert run.go()
    (row,) = run.stolen()
    assert (row.queries, row.budget, row.stage, row.architecture) == (120, 200, 2, "linear")
    (_, first), (oracle, _) = thefts
    assert sum(len(images) for images, _ in told) == 90
    assert (oracle.labels, oracle.remaining) == ("hard", 0)
    assert all(torch.equal(answers, answer_policy("hard")(predict(first, images))) for images, answers in told)


def test_the_false_trigger_is_the_rate_of_near_misses_that_reach_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Embedding] = []
    embed = DeepTracer.embed

    def watched(self: DeepTracer, *arguments: Any, **others: Any) -> Embedding:
        embedding = embed(self, *arguments, **others)
        assert embedding.near_misses is not None
        # a quarter of them with the label that they get, the others with another
        answers = predict(embedding.model, embedding.near_misses).argmax(1)
        labels = torch.where(torch.arange(len(answers)) % 4 == 0, answers, (answers + 1) % 10)
        found.append(replace(embedding, near_miss_labels=labels))
        return found[-1]

    monkeypatch.setattr(DeepTracer, "embed", watched)
    run = run_of(tmp_path / "run")
    assert run.go()
    assert [row.false_trigger for row in run.rows()] == [None, 0.25]


SHORT_GRID: list[Any] = [
    {"attack": KNOCKOFF, "pool": "attacker", "labels": ["soft", "hard"], "budget": 280},
    {
        "stages": [
            {"attack": KNOCKOFF, "pool": "attacker", "budget": 40},
            {"attack": KNOCKOFF, "pool": "owner", "budget": 40},
        ]
    },
    {"attack": KNOCKOFF, "pool": "attacker", "budget": 40, "accounts": 2, "curve": [20]},
]


class TestResume:
    def test_nothing_is_done_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = run_of(tmp_path / "run", scenarios=SHORT_GRID)
        assert run.go()
        charged, measured = RunDirectory(run.path).ledger.read_bytes(), run.measured()
        stolen = run.stolen()

        def never(*_: object, **__: object) -> None:
            raise AssertionError("done again")

        monkeypatch.setattr("simulator.experiment.local.train_owner", never)
        monkeypatch.setattr("simulator.experiment.local.run_scenario", never)
        assert run.go()
        assert RunDirectory(run.path).ledger.read_bytes() == charged
        assert run.measured() == measured
        assert run.stolen() == stolen

    def test_a_run_that_is_interrupted_all_the_time_ends_as_one_that_is_not(self, tmp_path: Path) -> None:
        calm, shaken = (run_of(tmp_path / name, scenarios=SHORT_GRID) for name in ("calm", "shaken"))
        assert calm.go()
        lives, done = 1, False
        while not done:
            lives += 1
            # a theft takes nine calls; whatever the life begins with, it ends at another place than the one before
            try:
                done = shaken.go(Interrupting(patience=9 + lives % 5))
            except KeyboardInterrupt:
                assert lives < 40
        assert lives > 5
        assert shaken.measured() == calm.measured()
        assert all(calm.paid(scenario) == shaken.paid(scenario) for scenario in calm.plan.scenarios)

    def test_what_a_dead_attacker_paid_is_not_paid_again(self, tmp_path: Path) -> None:
        """Killed after every query of a theft, before its row."""
        run = run_of(tmp_path / "run", scenarios=SHORT_GRID[:1], controls=False)

        class KilledAfterTheQuery(Quiet):
            def update(self, name: str, task: Task) -> None:
                super().update(name, task)
                if task.budget and (task.phase, task.done) == ("query", 1):
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.go(KilledAfterTheQuery())
        first = run.plan.scenarios[0]
        assert run.stolen() == []
        assert run.ledger().all_spent() == {first.id: 280}
        assert run.go()
        assert set(run.ledger().all_spent().values()) == {280}
        assert [row.queries for row in run.stolen()] == [280, 280]


class Clumsy(Attack):
    """Fails in one of several ways. It has no name of its own, so that no other test finds it in the registry."""

    way: str = "at once"

    def extract(self, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
        if self.way == "at once":
            raise RuntimeError("could not\n  even start")
        oracle.query(pool.images[:30])
        if self.way == "after some queries":
            raise MemoryError("out of memory")
        if self.way == "over the budget":
            oracle.query(pool.images[: oracle.remaining + 1])
        return nn.Identity()


@pytest.fixture
def clumsy(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ATTACKS.classes()
    monkeypatch.setattr(ATTACKS, "classes", lambda: {**classes, "clumsy": Clumsy})


class TestFailure:
    @pytest.mark.parametrize(
        ("way", "queries", "error"),
        [
            ("at once", 0, "RuntimeError: could not even start"),
            ("after some queries", 30, "MemoryError: out of memory"),
            ("over the budget", 30, "BudgetExhausted: 21 images asked, 20 remain"),
            ("no classifier", 30, "AssertionError"),
        ],
    )
    def test_an_attack_that_fails_is_a_row_and_the_others_go_on(
        self, way: str, queries: int, error: str, tmp_path: Path, clumsy: None
    ) -> None:
        scenarios = [
            {"attack": {"name": "clumsy", "way": way}, "pool": "attacker", "budget": 50},
            {"attack": KNOCKOFF, "pool": "attacker", "budget": 40},
        ]
        run = run_of(tmp_path / "run", watermarks=MARGINS, scenarios=scenarios)
        assert not run.go()
        failed = [row for row in run.stolen() if row.attack == "clumsy"]
        # each of two victims, and the control with each of the two keys
        assert len(failed) == 4
        for row in failed:
            assert (row.status, row.queries) == ("failed", queries)
            assert row.error is not None
            assert row.error.startswith(error)
            assert "\n" not in row.error
        good = [row for row in run.rows() if row.attack != "clumsy"]
        assert {row.status for row in good} == {"ok"}
        assert Counter(row.role for row in good) == {"benign": 2, "victim": 2, "stolen": 4}

    def test_a_resumed_run_tries_again_what_failed(
        self, tmp_path: Path, clumsy: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scenarios = [
            {"attack": {"name": "clumsy", "way": "after some queries"}, "pool": "attacker", "budget": 50},
            {"attack": KNOCKOFF, "pool": "attacker", "budget": 40},
        ]
        run = run_of(tmp_path / "run", scenarios=scenarios)
        assert not run.go()
        kept = [row for row in run.stolen() if row.attack == "knockoff"]

        def mended(self: Clumsy, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
            oracle.query(pool.images[:30])
            oracle.query(pool.images[30:45])
            return surrogate

        monkeypatch.setattr(Clumsy, "extract", mended)
        assert run.go()
        assert [row for row in run.stolen() if row.attack == "knockoff"] == kept
        again = [row for row in run.stolen() if row.attack == "clumsy"]
        assert [(row.status, row.error, row.queries) for row in again] == [("ok", None, 45)] * 2
        # the first thirty had been paid for in the first run
        assert {run.ledger().spent(row.scenario_id) for row in again} == {45}

    def test_an_attacker_who_asks_other_images_when_it_comes_back_is_refused(
        self, tmp_path: Path, clumsy: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scenarios = [{"attack": {"name": "clumsy", "way": "after some queries"}, "pool": "attacker", "budget": 50}]
        run = run_of(tmp_path / "run", scenarios=scenarios, controls=False)
        assert not run.go()

        def changed(self: Clumsy, oracle: Oracle, surrogate: nn.Module, pool: Pool, context: Context) -> nn.Module:
            oracle.query(pool.images[1:31])
            return surrogate

        monkeypatch.setattr(Clumsy, "extract", changed)
        assert not run.go()
        (row,) = run.stolen()
        assert "key 0 was used for other images" in str(row.error)
        assert row.queries == run.ledger().spent(row.scenario_id) == 30

    def test_a_count_that_differs_from_the_ledger_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = run_of(tmp_path / "run", scenarios=[{"attack": KNOCKOFF, "pool": "attacker", "budget": 40}])
        asked = ServiceOracle.query

        def forgetful(self: ServiceOracle, images: torch.Tensor) -> torch.Tensor:
            answers = asked(self, images)
            self.asked -= 1
            return answers

        monkeypatch.setattr(ServiceOracle, "query", forgetful)
        assert not run.go()
        assert {row.error for row in run.stolen()} == {"the attacker counts 39 answered images, the ledger charged 40"}
        assert {row.queries for row in run.stolen()} == {40}

    def test_a_victim_that_fails_takes_only_its_own_scenarios_along(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_of(
            tmp_path / "run",
            watermarks=MARGINS,
            scenarios=[
                {"attack": KNOCKOFF, "pool": "attacker", "budget": 40},
                {"attack": KNOCKOFF, "pool": {"triggers": 1, "attacker": 1}, "budget": 40},
            ],
        )
        with monkeypatch.context() as patched:
            embed = DeepTracer.embed

            def unlucky(self: DeepTracer, *arguments: Any, **others: Any) -> Any:
                if self.margin == 2:
                    raise RuntimeError("diverged")
                return embed(self, *arguments, **others)

            patched.setattr(DeepTracer, "embed", unlucky)
            assert not run.go()
        for row in run.rows():
            failed = json.loads(row.watermark_params)["margin"] == 2
            assert (row.status == "failed") is failed
            assert ("diverged" in str(row.error)) is failed
        # one victim and, with its key, two thefts and two controls; and the same of the other, with the benign model
        assert Counter(row.status for row in run.rows()) == {"failed": 5, "ok": 6}
        assert run.go()
        assert Counter(row.role for row in run.rows()) == {"benign": 2, "victim": 2, "stolen": 8}

    def test_a_benign_model_that_fails_takes_all_of_its_seed_along_and_is_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = run_of(tmp_path / "run", seeds=[0, 1], scenarios=SHORT_GRID[:1])
        with monkeypatch.context() as patched:

            def unlucky(spec: OwnerModel, *arguments: Any) -> TrainedOwner:
                if isinstance(spec, Trained) and spec.seed == 1:
                    raise RuntimeError("diverged\n at once")
                return train_owner(spec, *arguments)

            patched.setattr("simulator.experiment.local.train_owner", unlucky)
            assert not run.go()
        for row in run.rows():
            assert row.error == (
                None
                if row.seed == 0
                else "RuntimeError: diverged at once"
                if row.role == "victim"
                else "its victim could not be trained: RuntimeError: diverged at once"
            )
        failed = Counter(row.role for row in run.rows() if row.status == "failed")
        assert failed == {"victim": 1, "stolen": len(run.plan.scenarios) // 2}
        assert run.go()
        assert Counter(row.role for row in run.rows()) == {"benign": 2, "victim": 2, "stolen": len(run.plan.scenarios)}

    def test_what_failed_is_not_tried_again_by_all_that_needs_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A training takes hours, and each of a hundred thefts asks for its victim."""
        run = run_of(tmp_path / "run", watermarks=MARGINS, scenarios=SHORT_GRID[:1])
        tried: list[str] = []

        def unlucky(spec: OwnerModel, *arguments: Any) -> TrainedOwner:
            tried.append(spec.id)
            if isinstance(spec, Marked):
                raise RuntimeError("diverged")
            return train_owner(spec, *arguments)

        monkeypatch.setattr("simulator.experiment.local.train_owner", unlucky)
        assert not run.go()
        assert Counter(tried) == dict.fromkeys((subject.id for subject in run.plan.owners), 1)
        tried.clear()
        # a resumed run is another: it tries again, once
        assert not run.go()
        assert Counter(tried) == dict.fromkeys((victim.id for victim in run.plan.victims), 1)

    def test_a_damaged_copy_without_its_row_is_stolen_again_and_paid_once(self, tmp_path: Path) -> None:
        run = run_of(tmp_path / "run", scenarios=SHORT_GRID[:1], controls=False)
        assert run.go()
        measured, paid = run.measured(), RunDirectory(run.path).ledger.read_bytes()
        theft = run.plan.scenarios[0]
        file = run.path / "models" / f"{theft.file}.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
        for part in (run.path / "results").glob(f"part-{theft.id}-*"):
            part.unlink()
        assert run.go()
        assert run.measured() == measured
        assert RunDirectory(run.path).ledger.read_bytes() == paid

    def test_a_copy_without_its_row_is_measured_and_not_stolen_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run was killed between the two."""
        run = run_of(tmp_path / "run", scenarios=SHORT_GRID)
        assert run.go()
        measured = run.measured()
        for part in (run.path / "results").iterdir():
            part.unlink()

        def never(*_: object, **__: object) -> None:
            raise AssertionError("done again")

        monkeypatch.setattr("simulator.experiment.local.train_owner", never)
        monkeypatch.setattr("simulator.experiment.local.run_scenario", never)
        assert run.go()
        assert run.measured() == measured


def test_ctrl_c_interrupts_what_is_being_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: the training under way may last for hours."""
    run = run_of(tmp_path / "run", scenarios=SHORT_GRID[:1])
    reached: list[str] = []

    def interrupted(*_: object) -> TrainedOwner:
        reached.append("training")
        signal.raise_signal(signal.SIGINT)
        reached.append("beyond")
        raise RuntimeError("the training went on")

    monkeypatch.setattr("simulator.experiment.local.train_owner", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.go()
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == ["training"]
    assert run.rows() == []


def test_without_controls_nobody_steals_from_the_benign_model(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", scenarios=SHORT_GRID, controls=False)
    assert run.go()
    assert {row.victim for row in run.stolen()} == {run.plan.victims[0].id}


def test_attackers_see_no_test_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[World] = []

    def watched(scenario: Stolen, world: World, *others: Any, **more: Any) -> Any:
        seen.append(world)
        return run_scenario(scenario, world, *others, **more)

    monkeypatch.setattr("simulator.experiment.local.run_scenario", watched)
    run = run_of(tmp_path / "run", scenarios=SHORT_GRID)
    assert run.go()
    assert [len(world.dataset.test) for world in seen] == [0] * len(run.plan.scenarios)


def test_rows_do_not_depend_on_what_else_is_run(tmp_path: Path, whole: Run) -> None:
    """A scenario alone gives the row that it gives among many."""
    attack = {"attack": KNOCKOFF, "pool": "owner", "labels": "hard", "budget": 290}
    alone = run_of(tmp_path / "run", watermarks=MARGINS[1:], seeds=3, scenarios=[attack], save_transfer_sets=True)
    assert alone.go()
    among = {(row["scenario_id"], row["watermark_params"]): row for row in whole.measured()}
    assert len(alone.measured()) == 4
    for row in alone.measured():
        assert row == among[row["scenario_id"], row["watermark_params"]]
