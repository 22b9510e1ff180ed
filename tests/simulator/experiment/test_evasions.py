"""Suspects behind evasions, in a whole run: each has its rows and its control, and makes no model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import simulator as exsim
from simulator.component import BENIGN
from simulator.errors import InputError
from simulator.evasions.base import EVASIONS
from simulator.evasions.filters import Filter
from simulator.evasions.outliers import Outliers
from simulator.experiment.collector import Collector
from simulator.experiment.display import Display
from simulator.experiment.local import LocalRun
from simulator.experiment.preflight import prepare
from simulator.experiment.rundir import RunDirectory
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Guarded, Removed, Stolen
from simulator.plan.tree import Plan, make_plan
from simulator.records.rows import Row
from simulator.report.lines import Labels, lines
from simulator.report.plots import wsr_vs_accuracy
from simulator.report.table import markdown_table

BRIEF = {"epochs": 2, "batch_size": 32}
LOF = {"evasion": {"name": "outliers", "features": ["pixels", "logits"], "flag_rate": [0.0, 0.1]}}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "dataset": {"name": "digits", "size": 8, "owner": 120, "attacker": 300, "test": 80},
    "architecture": "naivenet",
    "training": BRIEF,
    "watermarks": [{"name": "deeptracer", "first_epochs": 1, "second_epochs": 2, "candidates": 40}],
    "key_filter": {"architecture": "linear", "pool": "attacker", "queries": 40, "keep": 20, "training": BRIEF},
    "scenarios": [
        {
            "attack": {"name": "knockoff", "training": BRIEF},
            "pool": "attacker",
            "labels": "hard",
            "budget": 50,
            "curve": [20],
            "then": [
                LOF,
                {
                    "removal": {"name": "pruning", "fraction": 0.5},
                    "then": [{"evasion": {"name": "filter", "transform": {"name": "blur", "sigma": [0.0, 2.0]}}}],
                },
            ],
        },
        {"then": [{**LOF, "pool": "owner"}]},
    ],
    "device": "cpu",
}
RATES = ("accuracy", "agreement", "wsr", "wsr_low", "wsr_high", "p_value", "verified", "key_samples")


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

    def row(self, scenario_id: str) -> Row:
        (found,) = (row for row in self.directory.rows() if row.scenario_id == scenario_id)
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that went well and that no test changes."""
    run = Run(check_config(CONFIG), tmp_path_factory.mktemp("runs") / "whole")
    assert run.go()
    return run


def rates(row: Row) -> list[Any]:
    return [getattr(row, name) for name in RATES]


def timeless(row: Row) -> dict[str, Any]:
    return row.model_dump(exclude={"seconds", "started", "finished"})


def idle(guard: Guarded) -> bool:
    if isinstance(guard.evasion, Outliers):
        return guard.evasion.flag_rate == 0
    assert isinstance(guard.evasion, Filter)
    return guard.evasion.transform.idle


def test_a_list_in_a_setting_is_several_suspects_side_by_side(whole: Run) -> None:
    guards = Counter((type(guard.target).__name__, guard.evasion.name, guard.control) for guard in whole.plan.guards)
    wanted = {("Stolen", "outliers"): 4, ("Removed", "filter"): 2}
    for (target, evasion), count in wanted.items():
        assert guards[target, evasion, False] == guards[target, evasion, True] == count
    assert guards["Marked", "outliers", False] == guards["Trained", "outliers", True] == 4
    assert [guard.pool.label if guard.pool else None for guard in whole.plan.guards[::2]].count(None) == 2
    assert whole.plan.copies[-len(whole.plan.guards) :] == whole.plan.guards
    assert len({subject.id for subject in whole.plan.copies}) == len(whole.plan.copies)


def test_every_suspect_has_a_row_and_no_model(whole: Run) -> None:
    found = {row.scenario_id: row for row in whole.directory.rows() if row.role == "guarded"}
    assert found.keys() == {guard.id for guard in whole.plan.guards}
    for guard in whole.plan.guards:
        row = found[guard.id]
        assert row.status == "ok"
        assert None not in rates(row)
        assert (row.parent, row.victim) == (guard.target.id, BENIGN if guard.control else guard.owner.id)
        pool = {"pool": guard.pool.label} if guard.pool else {}
        assert row.evasion == guard.evasion.name
        assert json.loads(row.evasion_params or "") == guard.evasion.params() | pool
        assert (row.removal is not None) == isinstance(guard.target, Removed)
        assert (row.attack is not None) == (guard.theft is not None)
        flags = (row.flagged_benign, row.flagged_key, row.flagged_auc)
        assert (None in flags) == (guard.evasion.name == "filter") == (flags == (None,) * 3)
        assert whole.directory.has(guard)
        assert guard.file == guard.target.file
    models = {path.stem for path in (whole.path / "models").glob("*.safetensors")}
    assert models == {subject.file for subject in (*whole.plan.owners, *whole.plan.copies)} | {
        f"{theft.file}-q20" for theft in whole.plan.scenarios
    }


def test_an_evasion_of_no_strength_measures_what_its_model_does(whole: Run) -> None:
    tried = 0
    for guard in filter(idle, whole.plan.guards):
        before, after = whole.row(guard.target.id), whole.row(guard.id)
        if isinstance(guard.target, Stolen | Removed):
            assert rates(after) == rates(before)
        else:
            assert (after.accuracy, after.wsr) == (before.accuracy, before.wsr)
            assert after.agreement == 1
        assert after.flagged_benign in (None, 0)
        assert after.flagged_key in (None, 0)
        tried += 1
    assert tried == 10


def test_a_suspect_that_lies_is_measured_by_its_lies(whole: Run) -> None:
    lying = [guard for guard in whole.plan.guards if not idle(guard) and guard.evasion.name == "outliers"]
    for guard in lying:
        row, open_ = whole.row(guard.id), whole.row(guard.target.id)
        assert row.flagged_benign is not None
        assert row.flagged_key is not None
        assert row.accuracy is not None
        assert open_.accuracy is not None
        assert 0 < row.flagged_benign < 0.4
        assert abs(row.accuracy - open_.accuracy) <= row.flagged_benign + 1e-9
        assert row.wsr is not None
        assert open_.wsr is not None
        assert abs(row.wsr - open_.wsr) <= row.flagged_key + 1e-9
    assert any(whole.row(guard.id).accuracy != whole.row(guard.target.id).accuracy for guard in lying)


def test_another_process_measures_the_same_from_what_lies_on_disk(whole: Run) -> None:
    directory, test = whole.directory, whole.world.dataset.test
    directory.save_test(test)
    directory.save_world(whole.world)
    world = directory.load_world()
    assert world is not None
    assert len(world.dataset.test) == 0
    collector = Collector(directory, whole.config, whole.world.dataset.name, directory.load_test()[0], world=world)
    for guard in whole.plan.guards[:5]:
        (row,) = collector.measure(guard, whole.plan.keys_for(guard), 50 if guard.theft else 0)
        assert timeless(row) == timeless(whole.row(guard.id))
    directory.clear_test()
    assert directory.load_world() is None
    assert not list((whole.path / "checkpoints").glob("*"))


def test_a_run_that_is_resumed_measures_what_lacks_a_row(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.config, tmp_path / "again")
    assert run.go()
    assert run.directory.open_copies(run.plan) == []
    for part in (run.path / "results").glob(f"part-{run.plan.guards[0].id}-*"):
        part.unlink()
    assert run.directory.open_copies(run.plan) == [run.plan.guards[0]]
    before = {path: path.stat().st_mtime_ns for path in (run.path / "models").iterdir()}
    assert run.go()
    assert {path: path.stat().st_mtime_ns for path in (run.path / "models").iterdir()} == before
    assert sorted(map(str, map(timeless, run.directory.rows()))) == sorted(
        map(str, map(timeless, whole.directory.rows()))
    )


def test_what_cannot_be_made_cannot_be_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("simulator.experiment.local.run_scenario", broken)
    run = Run(check_config({**CONFIG, "scenarios": CONFIG["scenarios"][:1], "controls": False}), tmp_path / "run")
    assert not run.go()
    for guard in run.plan.guards:
        row = run.row(guard.id)
        assert (row.role, row.status, row.evasion) == ("guarded", "failed", guard.evasion.name)
        assert row.error is not None
        assert "no room" in row.error


def test_the_report_shows_it_under_its_model_with_its_control(whole: Run) -> None:
    rows = whole.directory.rows()
    found = [line for line in lines(rows) if line.row.role == "guarded"]
    assert len(found) == 10
    assert all(len(line.controls) == 1 and line.controls[0].role == "guarded" for line in found)
    names = [Labels(lines(rows)).attack(line.row) for line in lines(rows) if line.row.origin == "stolen"]
    assert names[-1] == "knockoff then pruning behind filter(transform.sigma=2.0)"
    assert "knockoff behind outliers(logits, flag_rate=0.1, attacker)" in names
    table = markdown_table(rows)
    assert "flagged key %" in table
    assert "victim behind outliers(pixels, flag\\_rate=0.1, owner)" in table
    assert "behind outliers" in wsr_vs_accuracy(lines(rows))


def test_from_python_its_model_is_the_one_behind_it(whole: Run) -> None:
    run = exsim.Run(whole.path)
    for guard in whole.plan.guards:
        model = run.model(whole.row(guard.id))
        kept = whole.directory.load_model(guard).state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


class TestSettings:
    def plan(self, *then: dict[str, Any]) -> Plan:
        return make_plan(check_config({**CONFIG, "scenarios": [{"then": list(then)}], "controls": False}))

    def test_lists_of_a_transform_and_of_transforms_are_side_by_side(self) -> None:
        blurs = {"name": "blur", "sigma": [0.5, 1.0]}
        plan = self.plan({"evasion": {"name": "filter", "transform": [blurs, "noise", {"name": "crop"}]}})
        made = [guard.evasion for guard in plan.guards]
        transforms = [
            {"name": "blur", "sigma": 0.5},
            {"name": "blur", "sigma": 1.0},
            {"name": "noise"},
            {"name": "crop"},
        ]
        assert made == [EVASIONS.make({"name": "filter", "transform": each}) for each in transforms]

    def test_the_same_evasion_of_the_same_model_is_one_suspect(self) -> None:
        plan = self.plan({"evasion": "outliers"}, {"evasion": ["outliers", {"name": "outliers", "detector": "lof"}]})
        assert len(plan.guards) == 1
        assert len(self.plan({"evasion": "outliers"}, {"evasion": "outliers", "pool": "owner"}).guards) == 2
        assert len(self.plan({"evasion": "filter"}, {"evasion": "filter", "pool": "owner"}).guards) == 1

    def test_a_resolved_configuration_is_read_back(self) -> None:
        config = check_config(CONFIG)
        assert check_config(config.model_dump(mode="json")) == config
        assert config.evades
        assert not check_config({**CONFIG, "scenarios": [{"then": [{"removal": "pruning"}]}]}).evades

    @pytest.mark.parametrize(
        ("then", "says"),
        [
            ({"evasion": "outliers", "removal": "pruning"}, "'removal' and 'evasion' are both given"),
            ({"pool": "owner"}, "give a removal, or an evasion in its place"),
            ({"evasion": []}, "give a removal, or an evasion in its place"),
            ({"evasion": {"name": "outliers", "detector": []}}, "detector: an empty list hides nothing"),
            ({"evasion": {"name": "filter", "transform": {"name": "blur", "sigma": []}}}, "sigma: an empty list"),
            ({"evasion": "outliers", "then": [{"removal": "pruning"}]}, "nothing follows an evasion"),
            ({"evasion": "outlier"}, "did you mean 'outliers'?"),
        ],
    )
    def test_a_wrong_entry_is_one_line(self, then: dict[str, Any], says: str) -> None:
        with pytest.raises(InputError) as caught:
            self.plan(then)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("pool", "says"),
        [
            ({"parts": {"attacker": 1}, "size": 24}, "24 images are too few"),
            ("triggers", "'triggers' is for thefts; an evasion's pool has none"),
        ],
    )
    def test_a_pool_that_does_not_do_is_refused_before_anything_runs(self, pool: object, says: str) -> None:
        then = [{"evasion": "outliers", "pool": pool}]
        with pytest.raises(InputError, match=says):
            prepare(check_config({**CONFIG, "scenarios": [{"then": then}]}))
