from typing import Any

import pytest

from simulator.component import BENIGN
from simulator.plan.config import RunConfig, check_config
from simulator.plan.subjects import Plan, Scenario, make_plan, short_hash
from simulator.service.ledger import Terms, hash_token

MARK = {"name": "deeptracer", "margin": 2.0}
THEFT = {"attack": {"name": "knockoff"}, "pool": "patches", "labels": "soft", "budget": 100}


def config(**changes: Any) -> RunConfig:
    base = {"name": "plan", "dataset": "digits", "watermarks": [MARK], "scenarios": [THEFT]}
    return check_config(base | changes)


def plan(**changes: Any) -> Plan:
    return make_plan(config(**changes))


def theft(**changes: Any) -> Scenario:
    """The one theft from a marked victim under a changed scenario."""
    (scenario,) = plan(scenarios=[THEFT | changes], controls=False).scenarios
    return scenario


def ids(found: Plan) -> set[str]:
    """The ids of all that a plan computes."""
    models = {model.id for model in found.benigns + found.victims}
    return models | {scenario.id for scenario in found.scenarios}


def test_the_smallest_plan() -> None:
    found = plan()
    (benign,), (victim,), (control, stolen) = found.benigns, found.victims, found.scenarios
    assert (benign.watermark, benign.key_filter) == (None, None)
    assert victim.benign == benign
    assert benign.id.startswith(f"{BENIGN}-")
    assert victim.id.startswith("deeptracer-")
    assert (control.victim, control.control, stolen.victim, stolen.control) == (benign, True, victim, False)
    assert (stolen.budget, stolen.seed, stolen.triggers_of) == (100, 0, None)


def test_equal_work_has_equal_ids_however_it_is_written() -> None:
    first, again = plan(), plan()
    assert [item.id for item in first.victims + first.scenarios] == [
        item.id for item in again.victims + again.scenarios
    ]
    # what names, draws and spreads a run is not part of the work
    other = plan(name="other", device="cpu", resources={"attackers": 3}, save_transfer_sets=True, sync_ledger=True)
    assert [scenario.id for scenario in other.scenarios] == [scenario.id for scenario in first.scenarios]
    # nor are the other entries of the grid, the order of a pool's parts, and the verdict's threshold
    assert theft(budget=[100]).id == theft().id
    assert theft(pool={"owner": 1, "patches": 2}).id == theft(pool={"patches": 2.0, "owner": 1.0}).id
    assert theft(pool={"parts": "patches"}).id == theft().id
    both = plan(scenarios=[THEFT, THEFT | {"budget": 50}], verification={"threshold": 0.3})
    assert {scenario.id for scenario in first.scenarios} < {scenario.id for scenario in both.scenarios}


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": {"name": "digits", "owner": 800}},
        {"dataset": {"name": "digits", "split_seed": 1}},
        {"architecture": "lenet5"},
        {"training": {"epochs": 99}},
        {"training": {"learning_rate": 2e-3}},
        {"seeds": 1},
    ],
)
def test_what_the_owner_changes_changes_every_id(changes: dict[str, Any]) -> None:
    assert len(ids(plan())) == len(ids(plan(**changes))) == 4
    assert not ids(plan()) & ids(plan(**changes))


def test_a_watermark_changes_its_victim_and_not_the_benign_model_or_the_control() -> None:
    before, after = plan(), plan(watermarks=[MARK | {"margin": 3.0}])
    assert before.benigns[0].id == after.benigns[0].id
    assert before.victims[0].training_id != after.victims[0].training_id
    assert before.victims[0].id != after.victims[0].id
    control, stolen = before.scenarios
    new_control, new_stolen = after.scenarios
    assert control.id == new_control.id
    assert stolen.id != new_stolen.id


@pytest.mark.parametrize("change", [{"keep": 7}, {"stages": "none"}, {"queries": 9}, {"training": {"epochs": 3}}])
def test_the_filter_changes_the_key_and_not_the_weights(change: dict[str, Any]) -> None:
    before, after = plan().victims[0], plan(key_filter=change).victims[0]
    assert before.training_id == after.training_id
    assert before.id != after.id
    assert plan().benigns[0].id == plan(key_filter=change).benigns[0].id


@pytest.mark.parametrize(
    "changes",
    [
        {"attack": {"name": "knockoff", "training": {"epochs": 3}}},
        {"attack": "distillation"},
        {"pool": "owner"},
        {"pool": {"parts": "patches", "size": 50}},
        {"labels": "hard"},
        {"labels": "top-3"},
        {"architecture": "alexnet"},
        {"budget": 101},
        {"accounts": 2},
        {"rounds": ["patches", "owner"]},
        {"pool": "triggers"},
    ],
)
def test_what_the_thief_changes_changes_the_scenario_only(changes: dict[str, Any]) -> None:
    before, after = theft(), theft(**changes)
    assert before.id != after.id
    assert before.victim.id == after.victim.id


def test_the_victims_architecture_is_the_same_by_its_name_as_by_none() -> None:
    """The id is that of none, by which published runs have drawn their randomness."""
    assert theft(architecture="naivenet").id == theft(architecture=None).id == theft().id
    assert theft(architecture="lenet5").id != theft().id
    assert len(plan(scenarios=[THEFT | {"architecture": [None, "naivenet", "lenet5"]}], controls=False).scenarios) == 2
    stages = [plan(scenarios=[{"stages": [THEFT, THEFT | {"architecture": name}]}]) for name in (None, "naivenet")]
    assert ids(stages[0]) == ids(stages[1])
    changed = plan(architecture="lenet5", scenarios=[THEFT | {"architecture": ["lenet5", "naivenet"]}], controls=False)
    assert len(changed.scenarios) == 2


def test_stages_count_with_their_order() -> None:
    one, two = THEFT, THEFT | {"attack": "distillation"}
    (first,) = plan(scenarios=[{"stages": [one, two]}], controls=False).scenarios
    (second,) = plan(scenarios=[{"stages": [two, one]}], controls=False).scenarios
    assert len({first.id, second.id, theft().id}) == 3
    assert [stage.attack.name for stage in first.stages] == ["knockoff", "distillation"]


def test_a_grid_has_a_theft_for_every_seed_watermark_and_entry_and_its_controls_first() -> None:
    found = plan(
        seeds=[0, 5],
        watermarks=[MARK, MARK | {"margin": 1.0}],
        scenarios=[THEFT | {"labels": ["soft", "hard"]}, THEFT | {"attack": "distillation"}],
    )
    assert (len(found.benigns), len(found.victims), len(found.scenarios)) == (2, 4, 2 * 3 + 4 * 3)
    assert [scenario.control for scenario in found.scenarios] == [True] * 6 + [False] * 12
    for items in (found.benigns, found.victims, found.scenarios):
        assert len({item.id for item in items}) == len(items)
    assert {victim.benign for victim in found.victims} == set(found.benigns)


def test_the_same_work_twice_is_done_once() -> None:
    found = plan(watermarks=[MARK, MARK], scenarios=[THEFT, THEFT])
    assert (len(found.victims), len(found.scenarios)) == (1, 2)


def test_without_controls_or_watermarks_nothing_is_stolen_from_the_benign_model() -> None:
    assert not any(scenario.control for scenario in plan(controls=False).scenarios)
    assert plan(watermarks=[]).scenarios == ()
    assert plan(scenarios=[]).scenarios == ()
    assert len(plan(scenarios=[]).victims) == 1


def test_a_pool_with_triggers_needs_those_of_one_victim() -> None:
    found = plan(watermarks=[MARK, MARK | {"margin": 1.0}], scenarios=[THEFT | {"pool": {"triggers": 1, "patches": 9}}])
    controls = [scenario for scenario in found.scenarios if scenario.control]
    thefts = [scenario for scenario in found.scenarios if not scenario.control]
    # one control for each victim's triggers, measured with that victim's key alone
    assert [control.triggers_of for control in controls] == list(found.victims)
    assert len({control.id for control in controls}) == 2
    assert [found.keys_for(control) for control in controls] == [(victim,) for victim in found.victims]
    assert all(scenario.triggers_of == scenario.victim for scenario in thefts)


def test_triggers_in_a_later_round_count_too() -> None:
    scenario = theft(rounds=["patches", "triggers"])
    assert scenario.triggers_of == scenario.victim


def test_triggers_in_a_later_stage_count_too() -> None:
    stages = [THEFT, THEFT | {"pool": "triggers"}]
    (scenario,) = plan(scenarios=[{"stages": stages}], controls=False).scenarios
    assert scenario.triggers_of == scenario.victim


def test_a_control_is_measured_with_every_key_of_its_seed() -> None:
    found = plan(seeds=[0, 1], watermarks=[MARK, MARK | {"margin": 1.0}])
    for scenario in found.scenarios:
        keys = found.keys_for(scenario)
        if scenario.control:
            assert len(keys) == 2
            assert {key.seed for key in keys} == {scenario.seed}
        else:
            assert keys == (scenario.victim,)


def test_the_terms_of_a_scenario_never_hold_its_token() -> None:
    scenario = theft(labels="hard")
    terms = scenario.terms(scenario.id, "secret")
    assert terms == Terms(scenario.victim.id, "hard", 100, hash_token("secret"))
    assert "secret" not in str(terms)


@pytest.mark.parametrize(("accounts", "shares"), [(1, [100]), (2, [50, 50]), (3, [34, 33, 33]), (100, [1] * 100)])
def test_colluding_attackers_share_the_budget_exactly(accounts: int, shares: list[int]) -> None:
    scenario = theft(accounts=accounts)
    assert list(scenario.accounts.values()) == shares
    assert [scenario.terms(account, "secret").budget for account in scenario.accounts] == shares
    assert all(account.startswith(scenario.id) for account in scenario.accounts)


def test_labels_of_models_and_scenarios_say_what_they_are() -> None:
    found = plan()
    assert [item.label for item in found.benigns + found.victims] == [
        "train benign (seed 0)",
        "train deeptracer (seed 0)",
    ]
    assert [scenario.label for scenario in found.scenarios] == [
        "knockoff soft patches from benign (seed 0)",
        "knockoff soft patches from deeptracer (seed 0)",
    ]


def test_short_hash_depends_on_every_part_and_on_no_order_of_keys() -> None:
    assert short_hash("a", {"x": 1, "y": 2}) == short_hash("a", {"y": 2, "x": 1})
    assert len({short_hash("a", "b"), short_hash("ab"), short_hash("b", "a"), short_hash(["a", "b"])}) == 4
    assert len(short_hash(1)) == 12
    # ids of earlier runs are found again: this value must never change
    assert short_hash("a", 1, None) == "30780d0daa72"


def test_the_work_of_a_scenario_grows_with_its_images_and_its_epochs() -> None:
    attack = {"name": "knockoff", "training": {"epochs": 3}}
    assert theft(attack=attack).work == 300
    assert theft(attack=attack, budget=200).work == 600
    (two,) = plan(
        scenarios=[{"stages": [THEFT | {"attack": attack}, THEFT | {"budget": 10}]}], controls=False
    ).scenarios
    assert two.work == 300 + 10 * 100
