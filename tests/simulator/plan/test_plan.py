from typing import Any

import pytest

from simulator.component import BENIGN
from simulator.plan.config import RunConfig, check_config, read_config
from simulator.plan.subjects import Marked, Removed, Stolen, Trained, short_hash
from simulator.plan.tree import Plan, make_plan
from simulator.service.ledger import Terms, hash_token

MARK = {"name": "deeptracer", "margin": 2.0}
THEFT = {"attack": {"name": "knockoff"}, "pool": "patches", "labels": "soft", "budget": 100}


def config(**changes: Any) -> RunConfig:
    base = {"name": "plan", "dataset": "digits", "watermarks": [MARK], "scenarios": [THEFT]}
    return check_config(base | changes)


def plan(**changes: Any) -> Plan:
    return make_plan(config(**changes))


def theft(**changes: Any) -> Stolen:
    """The one theft from a marked victim under a changed scenario."""
    (scenario,) = plan(scenarios=[THEFT | changes], controls=False).scenarios
    return scenario


def ids(found: Plan) -> set[str]:
    """The ids of all that a plan computes."""
    return {subject.id for subject in (*found.owners, *found.copies)}


def test_the_smallest_plan() -> None:
    found = plan()
    (benign,), (victim,), (control, stolen) = found.benigns, found.victims, found.scenarios
    assert (type(benign), type(victim), type(control), type(stolen)) == (Trained, Marked, Stolen, Stolen)
    assert (benign.parent, benign.benign, benign.control) == (None, benign, True)
    assert victim.benign == victim.parent == benign
    assert (victim.control, victim.dataset, victim.training) == (False, benign.dataset, benign.training)
    assert (found.owners, found.copies, found.removals) == ((benign, victim), (control, stolen), ())
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


# -- ids --------------------------------------------------------------------------------------------------------------


def test_the_ids_of_published_runs_never_change() -> None:
    """Run directories are resumed, and randomness is drawn, by them: these stand in committed results."""
    found = make_plan(read_config("digits"))
    assert [(subject.id, subject.file) for subject in found.owners] == [
        ("benign-d4e5e05327fd", "benign-d4e5e05327fd"),
        ("deeptracer-3cfc15a0dd29", "deeptracer-3cfc15a0dd29"),
    ]
    ids = [subject.id for subject in found.copies]
    assert ids[:3] == ["3d9391680db9", "bf850d54387a", "0740df9253a4"]
    assert sorted(ids)[:3] == ["04af885d2a1d", "0740df9253a4", "0e0a8e59f968"]
    assert (len(set(ids)), len(ids)) == (18, 18)
    assert all(subject.file == f"stolen-{subject.id}" for subject in found.copies)


# -- what follows a model ---------------------------------------------------------------------------------------------

PRUNING = {"name": "pruning", "fraction": 0.5}


def pruned(fraction: float) -> dict[str, Any]:
    return {"name": "pruning", "fraction": fraction}


def fractions(removals: tuple[Removed, ...]) -> list[float]:
    return [removed.removal.params()["fraction"] for removed in removals]


def test_siblings_have_one_parent_and_no_theft_of_their_own() -> None:
    then = [{"removal": {"name": "pruning", "fraction": [0.2, 0.4, 0.6]}}, {"removal": pruned(0.9)}]
    alone, found = plan(), plan(scenarios=[THEFT | {"then": then}])
    assert found.scenarios == alone.scenarios
    assert found.copies == (*found.scenarios, *found.removals)
    assert len(found.removals) == 4 * 2
    for theft in found.scenarios:
        after = tuple(removed for removed in found.removals if removed.parent == theft)
        assert fractions(after) == [0.2, 0.4, 0.6, 0.9]
        assert len({removed.id for removed in after}) == 4


def test_a_chain_goes_on_from_each_result() -> None:
    then = [{"removal": [pruned(0.1), pruned(0.2)], "then": [{"removal": pruned(0.3), "then": [{"removal": PRUNING}]}]}]
    found = plan(scenarios=[THEFT | {"then": then}], controls=False)
    (theft,) = found.scenarios
    assert [fractions(removed.chain) for removed in found.removals] == [
        [0.1],
        [0.1, 0.3],
        [0.1, 0.3, 0.5],
        [0.2],
        [0.2, 0.3],
        [0.2, 0.3, 0.5],
    ]
    assert {removed.theft for removed in found.removals} == {theft}
    # whatever a model is made from stands before it
    made: set[str] = set()
    for subject in (*found.owners, *found.copies):
        assert subject.parent is None or subject.parent.id in made
        made.add(subject.id)


def test_the_same_removal_behind_another_is_another_model() -> None:
    then = [{"removal": PRUNING, "then": [{"removal": PRUNING}]}]
    found = plan(scenarios=[THEFT | {"then": then}], controls=False)
    assert len({removed.id for removed in found.removals}) == 2


def test_a_removal_knows_its_theft_its_victim_and_its_seed() -> None:
    then = [{"removal": PRUNING, "then": [{"removal": pruned(0.9)}]}]
    found = plan(seeds=7, architecture="lenet5", scenarios=[THEFT | {"architecture": "linear", "then": then}])
    control, theft = found.scenarios
    *controls, first, second = found.removals
    assert [removed.theft for removed in controls] == [control, control]
    assert list(second.lineage) == [second, first, theft, found.victims[0], found.benigns[0]]
    assert (second.owner, second.seed, second.role, second.architecture) == (found.victims[0], 7, "removed", "linear")
    assert second.file == f"removed-{second.id}"
    assert second.label == "pruning of pruning of knockoff soft patches from deeptracer (seed 7)"
    assert (second.control, controls[1].control) == (False, True)


def test_every_removal_has_its_control_measured_with_the_same_keys() -> None:
    found = plan(
        watermarks=[MARK, MARK | {"margin": 1.0}], seeds=[0, 1], scenarios=[THEFT | {"then": [{"removal": PRUNING}]}]
    )
    of_controls = [removed for removed in found.removals if removed.control]
    assert (len(of_controls), len(found.removals)) == (2, 2 + 4)
    for removed in found.removals:
        assert removed.theft is not None
        assert found.keys_for(removed) == found.keys_for(removed.theft)
    assert not any(
        removed.control
        for removed in plan(scenarios=[THEFT | {"then": [{"removal": PRUNING}]}], controls=False).removals
    )


def test_a_removal_of_a_control_with_triggers_is_measured_with_the_key_of_those_triggers() -> None:
    entry = THEFT | {"pool": {"triggers": 1, "patches": 9}, "then": [{"removal": PRUNING}]}
    found = plan(watermarks=[MARK, MARK | {"margin": 1.0}], scenarios=[entry])
    of_controls = [removed for removed in found.removals if removed.control]
    assert [found.keys_for(removed) for removed in of_controls] == [(victim,) for victim in found.victims]


def test_a_thief_who_has_the_model_itself_washes_it_and_pays_nothing() -> None:
    found = plan(watermarks=[MARK, MARK | {"margin": 1.0}], scenarios=[{"then": [{"removal": PRUNING}]}])
    assert (found.scenarios, found.attacks) == ((), {})
    assert [removed.parent for removed in found.removals] == [*found.benigns, *found.victims]
    assert [removed.theft for removed in found.removals] == [None] * 3
    assert [removed.control for removed in found.removals] == [True, False, False]
    assert [found.keys_for(removed) for removed in found.removals] == [
        found.victims,
        found.victims[:1],
        found.victims[1:],
    ]
    assert found.removals[1].label == "pruning of train deeptracer (seed 0)"
    leaked = {"scenarios": [{"then": [{"removal": PRUNING}]}]}
    assert [removed.control for removed in plan(**leaked, controls=False).removals] == [False]
    assert plan(**leaked, watermarks=[]).removals == ()


def test_the_same_removal_of_the_same_model_twice_is_done_once() -> None:
    entry = THEFT | {"then": [{"removal": [PRUNING, PRUNING]}, {"removal": PRUNING}]}
    assert len(plan(scenarios=[entry, entry], controls=False).removals) == 1


def test_what_decides_a_removal_changes_its_id_and_nothing_else_does() -> None:
    def washed(then: dict[str, Any], **changes: Any) -> Removed:
        (removed,) = plan(scenarios=[THEFT | changes | {"then": [then]}], controls=False).removals
        return removed

    first = washed({"removal": PRUNING})
    assert first.id == washed({"removal": [PRUNING]}).id
    # pruning asks for no images
    assert first.pool is None
    assert first.id == washed({"removal": PRUNING, "pool": "patches"}).id
    assert first.id != washed({"removal": pruned(0.6)}).id
    assert first.id != washed({"removal": PRUNING | {"scope": "layer"}}).id
    assert first.id != washed({"removal": PRUNING}, budget=101).id
    # a removal of the owner's own model is another than one of a stolen copy
    assert first.id not in ids(plan(scenarios=[{"then": [{"removal": PRUNING}]}]))
