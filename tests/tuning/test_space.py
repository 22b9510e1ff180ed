"""The search space: wrong ones are one clear line, and an enumeration depends on nothing but its seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulator.cli import main
from simulator.errors import InputError
from simulator.plan.config import read_config
from tuning.config import read_sweep
from tuning.proposals import Learned, proposals
from tuning.space import Axis, applied, check_space, grid, random, setting_id, value_at

BASE = read_config("digits")
SPACE = {
    "watermarks.0.margin": Axis.model_validate({"loguniform": [0.5, 10]}),
    "watermarks.0.centroid": Axis.model_validate({"choice": ["batch", "learnable"]}),
    "watermarks.0.source_classes": Axis.model_validate({"grid": [2, 4]}),
}
SWEEP = """
base: {{from: digits, scenarios: [{{attack: knockoff, pool: patches, budget: 300}}]}}
space: {{{space}}}
trials: 3
{more}
"""


def refused(path: Path, capsys: Any, space: str, more: str = "") -> str:
    """What ``exsim sweep`` says of a configuration: exit status 2 and one line."""
    path.write_text(SWEEP.format(space=space, more=more))
    assert main(["sweep", str(path), "--out", str(path.parent / "out")]) == 2
    assert not (path.parent / "out").exists()
    message: str = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("watermarks.0.margn: {uniform: [1, 2]}", "'margn' is not one of candidates"),
        ("watermarks.1.margin: {uniform: [1, 2]}", "'1' is not one of 0"),
        ("watermarks.0.margin: {unifrom: [1, 2]}", "did you mean 'uniform'?"),
        ("watermarks.0.margin: {uniform: [2, 1]}", "lower 2 is not below upper 1"),
        ("watermarks.0.margin: {uniform: [1]}", "must be numbers: [lower, upper]"),
        ("watermarks.0.margin: {loguniform: [0, 1]}", "lower 0 must be above 0"),
        ("watermarks.0.margin: {quniform: [0, 1, 0]}", "q 0 must be above 0"),
        ("watermarks.0.first_epochs: {randint: [1, 2.5]}", "must be whole numbers"),
        ("watermarks.0.margin: 3", "3 is not a domain; allowed: one of uniform"),
        ("watermarks.0.margin: {choice: []}", "must be at least one value"),
        # values that the field refuses, before anything runs
        ("watermarks.0.margin: {uniform: [-1, 2]}", "margin: Input should be greater than 0, found -1"),
        ("watermarks.0.first_epochs: {uniform: [1.0, 2.5]}", "valid integer"),
        ("watermarks.0.centroid: {choice: [batch, median]}", "found 'median'"),
        ("architecture: {choice: [naivenet, navienet]}", "did you mean 'naivenet'?"),
        ("watermarks.0.source_classes: {choice: [4, 10]}", "Input should be 2, 4, 6 or 8, found 10"),
        ("scenarios.0.labels: {choice: [[soft, hard], soft]}", "changes the number of"),
        ("scenarios.0.labels: {choice: [soft, top-11]}", "top-1 to top-10"),
        ("key_filter.queries: {choice: [500, 100000000000]}", "this machine has"),
        ("dataset.owner: {randint: [100, 200]}", "cannot be searched: all trials share name, seeds, dataset"),
        ("", "nothing is searched"),
    ],
)
def test_a_wrong_space_is_one_clear_line(tmp_path: Path, capsys: Any, space: str, says: str) -> None:
    assert says in refused(tmp_path / "sweep.yaml", capsys, space)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("search: grid", "search 'grid' takes choice or grid, found uniform"),
        ("search: tpe", "search"),
        ("seeds: [0, 0]", "must be at least one, all different"),
        ("seeds: [100]", "must be others than seeds, [100]"),
        ("halving: {keep: {attack 3: .5}}", "'attack 3' is not one of phase 1, victim, attack 1, attack"),
        ("loggers: [tensorbord]", "'tensorbord' is not one of tensorboard"),
        ("trails: 3", "trails: no such setting; 'trails' is not one of name, base, space"),
        ("halving: {braket: 3}", "halving.braket: no such setting; 'braket' is not one of bracket, keep"),
        ("search: {method: random, sede: 3}", "did you mean 'seed'?"),
    ],
)
def test_other_wrong_settings_are_one_clear_line(tmp_path: Path, capsys: Any, more: str, says: str) -> None:
    assert says in refused(tmp_path / "sweep.yaml", capsys, "watermarks.0.margin: {uniform: [1, 2]}", more)


def test_random_settings_depend_on_seed_and_number_alone() -> None:
    settings = random(BASE, SPACE, 9, seed=3)
    assert settings == random(BASE, SPACE, 9, seed=3)
    assert settings[:5] == random(BASE, SPACE, 5, seed=3)
    assert settings[1:] != random(BASE, SPACE, 9, seed=4)[1:]
    assert settings[0] == {
        "watermarks.0.centroid": "batch",
        "watermarks.0.margin": 1.0,
        "watermarks.0.source_classes": 4,
    }
    assert len({setting_id(one) for one in settings}) == 9
    # a grid's values come in turns, the others within their domains
    assert [one["watermarks.0.source_classes"] for one in settings[1:]] == [2, 4] * 4
    assert all(0.5 <= one["watermarks.0.margin"] <= 10 for one in settings)
    for one in settings:
        assert applied(BASE, one).watermarks[0].model_dump()["margin"] == one["watermarks.0.margin"]


def test_an_exhausted_space_gives_fewer_settings() -> None:
    space = {"watermarks.0.centroid": SPACE["watermarks.0.centroid"]}
    assert [one["watermarks.0.centroid"] for one in random(BASE, space, 9, seed=0)] == ["batch", "learnable"]


def test_a_grid_is_every_combination_and_the_default() -> None:
    space = {path: axis for path, axis in SPACE.items() if path != "watermarks.0.margin"}
    settings = grid(BASE, space)
    assert settings[0] == {"watermarks.0.centroid": "batch", "watermarks.0.source_classes": 4}
    assert len(settings) == 4
    with pytest.raises(InputError, match="takes choice or grid, found loguniform"):
        grid(BASE, SPACE)


@pytest.mark.parametrize("method", ["optuna", "optuna-pareto"])
def test_optuna_proposes_the_same_again_whatever_the_order_of_the_results(tmp_path: Path, method: str) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "sweep.yaml"
    space = "watermarks.0.margin: {loguniform: [0.5, 10]}, watermarks.0.centroid: {choice: [batch, learnable]}"
    path.write_text(SWEEP.format(space=space, more=f"search: {method}\nhalving: {{bracket: 3}}"))
    config = read_sweep(str(path), ["trials=15"])

    def settings(backwards: bool) -> list[Any]:
        found = proposals(config)
        assert isinstance(found, Learned)
        proposed: list[Any] = []
        while len(proposed) < found.total:
            first = len(proposed)
            batch = [found.propose(at) for at in range(first, first + 3)]
            assert not found.ready(first + 3)
            proposed += batch
            for at in range(first + 2, first - 1, -1) if backwards else range(first, first + 3):
                margin = proposed[at]["watermarks.0.margin"]
                stage = "attack 1" if at % 3 else "victim"
                report = {"guaranteed": -margin, "drop": margin / 100, "worst_wsr": 0.5, "stage": stage}
                found.learn(at, None if at == 4 else report | {"last_stage": "attack 1"})
            assert found.ready(first + 3)
        return proposed

    first = settings(False)
    assert first == settings(True)
    assert first[0] == {"watermarks.0.centroid": "batch", "watermarks.0.margin": 1.0}
    assert all(0.5 <= one["watermarks.0.margin"] <= 10 for one in first)
    if method == "optuna":  # it has learnt that small margins are better
        late = [one["watermarks.0.margin"] for one in first[12:]]
        assert sum(late) / len(late) < sum(one["watermarks.0.margin"] for one in first[1:10]) / 9


@pytest.mark.parametrize(("aggregate", "told"), [("mean", "mean_wsr"), ("min", "worst_wsr"), ("lower", "worst_wsr")])
def test_two_objectives_are_the_drop_and_the_wsr_that_is_aggregated(aggregate: str, told: str) -> None:
    pytest.importorskip("optuna")
    learned = proposals(read_sweep("coupling", [f"objective.aggregate={aggregate}"]))
    assert isinstance(learned, Learned)
    report = {"guaranteed": 0.1, "drop": 0.02, "mean_wsr": 0.7, "worst_wsr": 0.4, "last_stage": "attack 5"}
    assert learned._values(report | {"stage": "attack 5"})["floor"] == report[told]
    # what was not measured counts as 0
    assert learned._values(report | {"stage": "attack 4"}) == {"guaranteed": 0.1, "drop": 0.02, "floor": 0.0}


def test_the_sweep_over_the_coupling_takes_every_value_of_its_space() -> None:
    config = read_sweep("coupling")
    assert len(list(check_space(config.base, config.space))) >= 2 * len(config.space)
    assert config.default()["watermarks.0.margin.relative"] == 0.25
    assert config.default()["watermarks.0.inter_warmup"] == 0.0
    assert len(config.holdout.seeds) >= 4


def test_a_sweeps_yaml_reads_back_equal(tmp_path: Path) -> None:
    for preset in ("digits", "fashion-mnist-quick", "coupling"):
        config = read_sweep(preset)
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        assert read_sweep(str(tmp_path / "again.yaml")) == config
        # the order of the dimensions is that of the map's axes
        assert list(read_sweep(str(tmp_path / "again.yaml")).space) == list(config.space)


def test_overrides_reach_the_base_that_a_preset_names() -> None:
    config = read_sweep("digits", ["base.watermarks.0.first_epochs=3", "seeds=[7]", "halving=null"])
    assert config.base.watermarks[0].model_dump()["first_epochs"] == 3
    assert config.seeds == (7,)
    assert config.rungs() == {}


def test_a_setting_that_is_left_out_of_dumps_can_be_searched() -> None:
    base = read_config("digits")
    assert value_at(base, "watermarks.0.inter_warmup") == 0.0
    path = "watermarks.0.inter_warmup"
    assert applied(base, {path: 0.25}).watermarks[0].params()["inter_warmup"] == 0.25
    with pytest.raises(InputError, match=r"margin.relative: no such setting"):
        value_at(base, "watermarks.0.margin.relative")
