"""Estimates of a plan: closed forms of the work, torch's count of operations, and how parts make up the clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from simulator.attacks.base import ATTACKS, Attack
from simulator.data.dataset import DataConfig, Outline, load, outline
from simulator.plan.config import check_config, read_config
from simulator.plan.estimate import (
    BACKWARD,
    PROCESS,
    TRAINED,
    Estimate,
    Speed,
    Work,
    architectures,
    calibrate,
    estimate,
    memory,
    operations,
    owner_work,
    removal_work,
    span,
    theft_work,
)
from simulator.plan.settings_file import presets
from simulator.plan.tree import make_plan
from simulator.training.recipe import Recipe
from simulator.watermarks.base import WATERMARKS

DATA = Outline(classes=10, channels=1, size=8, owner=1000, attacker=300, test=100)
RECIPE = {"epochs": 6, "batch_size": 50}


def plan(**changes: Any) -> Any:
    base = {
        "name": "x",
        "dataset": "digits",
        "architecture": "linear",
        "training": {"epochs": 4},
        "watermarks": [{"name": "deeptracer", "first_epochs": 3, "second_epochs": 2}],
        "key_filter": {"architecture": "lenet5", "queries": 200, "keep": 50, "training": {"epochs": 5}},
        "scenarios": [{"attack": {"name": "knockoff", "training": RECIPE}, "budget": 400}],
    }
    config = check_config(base | changes)
    return config, make_plan(config)


def images(data: Outline = DATA, **stage: Any) -> int:
    """What the one stage of a scenario trains on."""
    _, made = plan(scenarios=[stage], controls=False)
    return theft_work(made.scenarios[0], data).trained["linear"]


def test_a_theft_asks_no_more_than_a_foreign_set_has() -> None:
    stage = {"attack": {"name": "knockoff", "training": RECIPE}, "pool": "svhn", "budget": 400}
    counted = [images(replace(DATA, foreign=foreign), **stage) for foreign in ({}, {"svhn": 70})]
    assert counted == [6 * 400, 6 * 70]


def test_the_owners_work() -> None:
    _, made = plan()
    assert owner_work(made.benigns[0], DATA).trained == {"linear": 1000 * 4}
    victim = owner_work(made.victims[0], DATA)
    # phases with 1 % and 10 % of triggers; the filter's surrogate
    assert victim.trained == {"linear": round(1000 * (3 * 1.01 + 2 * 1.1)), "lenet5": 200 * 5}
    assert victim.answered == {"linear": 200}


def test_a_theft_trains_on_what_it_can_ask_in_every_epoch() -> None:
    knockoff = {"name": "knockoff", "training": RECIPE}
    assert images(attack=knockoff, budget=400) == 400 * 6
    assert images(attack=knockoff, budget=400, curve=[100, 200]) == (100 + 200 + 400) * 6
    assert images(attack=knockoff, budget=400, pool="attacker") == 300 * 6


def test_attacks_of_many_rounds() -> None:
    jbda = {"name": "jbda", "seeds": 10, "rounds": 3, "training": RECIPE, "round_training": {"epochs": 2}}
    assert images(attack=jbda, budget=1000) == 80 * 6 + (10 + 20 + 40) * 2
    active = {"name": "activethief", "iterations": 2, "initial": 0.2, "training": RECIPE}
    assert images(attack=active, budget=100) == 100 * 6 + (20 + 60) * 6
    # DFME: of 7 batches asked in an iteration, 5 are the student's
    dfme = {"name": "dfme", "training": {"batch_size": 10}}
    assert images(attack=dfme, budget=7000) == 5000
    # DisGUIDE: one of one, three replayed, two students
    disguide = {"name": "disguide", "training": {"batch_size": 10}}
    assert images(attack=disguide, budget=1000) == 1000 * (1 + 3) * 2


def test_a_second_stage_asks_the_first_stages_model() -> None:
    attack = {"name": "knockoff", "training": RECIPE}
    stages = [{"attack": attack, "budget": 100}, {"attack": attack, "budget": 200, "architecture": "lenet5"}]
    _, made = plan(scenarios=[{"stages": stages}], controls=False)
    work = theft_work(made.scenarios[0], DATA)
    assert (work.trained, work.answered) == ({"linear": 600, "lenet5": 1200}, {"linear": 200})


#: of every scheme's defaults with a recipe of 30 epochs, as the estimates have had them from the start
PASSES = {
    "abstract": 30 * 1.02,
    "badnets": 30 * 1.1,
    "composite": 30 * 1.2,
    "content": 30 * 1.1,
    "deeptracer": 100 * 1.01 + 100 * 1.1,
    "ewe": 10 + 20 * 1.5,
    "exponential_weighting": 60,
    "frontier_stitching": 40,
    "function_coupled": 30 * (1 + 10 / 128),
    "margin": 30,
    "mea_defender": 30 * 1.0101 + 30 * 1.44,
    "noise": 30 * 1.1,
    "unrelated": 30 * 1.1,
}


@pytest.mark.parametrize("name", PASSES)
def test_how_often_the_owners_images_are_gone_through(name: str) -> None:
    assert WATERMARKS.make({"name": name}).passes(Recipe(epochs=30)) == PASSES[name]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"name": "deeptracer", "first_epochs": 0, "second_epochs": 3}, 3 * 1.1),
        ({"name": "mea_defender", "first_epochs": 0, "second_epochs": 5}, 5 * 1.44),
        ({"name": "ewe", "clean_epochs": 6, "clean_batches": 4}, 6 + 24 * 1.25),
        ({"name": "ewe", "clean_epochs": 0, "watermark_epochs": 4}, 4 * 1.5),
        ({"name": "exponential_weighting", "embedding_epochs": 7}, 37),
        ({"name": "frontier_stitching", "fine_tuning_epochs": 3}, 33),
        # its ratio is of the fusion, not of the triggers
        ({"name": "function_coupled", "ratio": 0.7, "trigger_share": 0.25}, 30 * 1.25),
    ],
)
def test_schedules_of_their_own(settings: dict[str, Any], wanted: float) -> None:
    assert WATERMARKS.make(settings).passes(Recipe(epochs=30)) == wanted


@pytest.mark.parametrize(
    ("name", "soft", "hard"),
    [
        # 1,000 images of a larger pool, and 100 for a point of the curve; in the epochs of each default recipe
        ("distillation", 1100 * 100, 1100 * 100),
        ("knockoff", 1100 * 100, 1100 * 100),
        ("jbda", 1100 * 100 + (150 + 300 + 600 + 3 * 1000) * 10, 1100 * 100 + (150 + 300 + 600 + 3 * 1000) * 10),
        ("activethief", 1100 * 100 + 5050 * 100, 1100 * 100 + 5050 * 100),
        # of 7 batches asked 5 are the student's; with hard labels of 6
        ("dfme", 715, 834),
        ("disguide", 1000 * 4 * 2, 1000 * 4 * 2),
    ],
)
def test_what_the_attacks_train_on(name: str, soft: int, hard: int) -> None:
    attack = ATTACKS.make({"name": name})
    assert [attack.trained_images(1000, 5000, (100,), labels) for labels in ("soft", "hard")] == [soft, hard]


def test_an_attack_that_says_nothing_trains_on_all_it_asks() -> None:
    class Silent(Attack):
        def extract(self, *_: object) -> nn.Module:  # type: ignore[override]
            return nn.Identity()

    assert Silent.model_construct().trained_images(400, 300, (), "soft") == 300 * Recipe().epochs


@pytest.mark.parametrize("name", WATERMARKS.classes())
def test_every_watermark_costs_at_least_an_epoch_and_no_schedule_explodes(name: str) -> None:
    epochs = WATERMARKS.make({"name": name}).passes(Recipe(epochs=100))
    assert 1 <= epochs <= 300


def test_operations_and_memory_of_a_linear_layer() -> None:
    assert operations("linear", DATA) == 2 * 64 * 10
    parameters = 64 * 10 + 10
    assert memory("linear", DATA, 1) >= PROCESS + TRAINED * parameters
    # what a batch adds is in proportion to it
    first, second, third = (memory("naivenet", DATA, batch) for batch in (1, 2, 3))
    assert second - first == third - second > 0


def test_the_sum_of_a_plan() -> None:
    config, made = plan()
    speeds = {name: Speed(2.0, 1.0, 7) for name in architectures(made)}
    found = estimate(config, made, DATA, speeds)
    assert found.queries == 2 * 400
    assert found.serving == 800
    # a control and a theft, each with one key; the victim and the benign model
    assert found.measuring == 2 * 150 + 2 * 150
    assert found.thefts == (2 * 2400, 2 * 2400)
    assert found.owners[0] == 2 * 4000
    assert found.trained == 4000 + 5230 + 1000 + 2 * 2400
    answered = 200 + 800 + 600
    assert found.operations == 7 * (BACKWARD * found.trained + answered)
    assert found.seconds == 2 * found.trained + answered
    assert len(found.lines()) == 3


def test_the_clock() -> None:
    found = Estimate((10.0, 20.0), (5.0, 5.0, 5.0, 9.0), 3.0, 1.0, {}, 0, 0, 0.0)
    assert found.wall(attackers=1, trainers=1, replicas=1, collectors=1, threads=99) == 30 + 24
    assert found.wall(attackers=2, trainers=2, replicas=1, collectors=1, threads=99) == 20 + 12
    # no theft is shared between attackers
    assert found.wall(attackers=99, trainers=2, replicas=1, collectors=1, threads=99) == 20 + 9
    # and nothing is faster than all threads together
    assert found.wall(attackers=99, trainers=2, replicas=1, collectors=1, threads=1) == found.seconds == 58


def test_a_measured_speed_is_positive_and_training_is_dearer() -> None:
    speed = calibrate("naivenet", DATA, 64, patience=0.1)
    assert 0 < speed.answer < speed.train
    assert speed.seconds("naivenet", Work()) == 0


def test_a_batch_that_no_memory_holds_is_not_measured_as_a_whole() -> None:
    assert calibrate("linear", DATA, 10**12, patience=0.0).train > 0


@pytest.mark.parametrize("preset", presets())
def test_every_preset_has_an_estimate(preset: str) -> None:
    config = read_config(preset)
    made = make_plan(config)
    speeds = {name: Speed(1e-4, 1e-5, 1) for name in architectures(made)}
    found = estimate(config, made, outline(config.dataset), speeds)
    assert found.seconds > 0
    assert all(seconds > 0 for seconds in (*found.owners, *found.thefts[: len(made.scenarios)]))
    costs = zip(made.removals, found.thefts[len(made.scenarios) :], strict=True)
    assert all((seconds > 0) == bool(removed.removal.needs) for removed, seconds in costs)


@pytest.mark.parametrize("changes", [{}, {"owner": 600, "attacker": 100, "test": 50, "size": 12}])
def test_an_outline_is_that_of_the_data_set(changes: dict[str, int]) -> None:
    config = DataConfig(name="digits", **changes)
    data = load(config)
    parts = (len(data.owner), len(data.attacker), len(data.test))
    assert outline(config) == Outline(data.classes, data.channels, data.size, *parts)


@pytest.mark.parametrize(("seconds", "text"), [(1.234, "1.2 s"), (61, "61 s"), (600, "10 min"), (7300, "2.0 h")])
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_removal_costs_its_epochs_over_what_it_has_and_a_fresh_net_of_another_kind_is_known() -> None:
    removals = [
        {"name": "fine_tuning", "epochs": 3, "share": 0.5},
        {"name": "fine_tuning", "epochs": 3, "data": "transfer", "labels": "answers"},
        {"name": "distillation", "epochs": 2, "architecture": "lenet5"},
    ]
    scenario = {"attack": "knockoff", "pool": "attacker", "budget": 60, "then": [{"removal": removals}]}
    config = check_config(
        {
            "name": "few",
            "dataset": {"name": "digits", "attacker": 100},
            "watermarks": ["badnets"],
            "scenarios": [scenario],
        }
    )
    plan = make_plan(config)
    assert "lenet5" in architectures(plan)
    works = [removal_work(removed, outline(config.dataset)) for removed in plan.removals[-3:]]
    assert [dict(work.trained) for work in works] == [{"naivenet": 150}, {"naivenet": 180}, {"lenet5": 200}]
