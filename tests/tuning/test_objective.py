"""The objective by closed-form cases: the parts, the scalar, the bound over seeds, and what is not measured yet."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.objective import Measured, Objective, Stolen, metrics


def measured(wsr: list[float], *, seed: int = 0, drop: float = 0.0, victim: float = 1.0) -> Measured:
    """A seed whose benign model is 90 % accurate."""
    stolen = tuple(Stolen(attack=f"a{at}", accuracy=0.8, wsr=rate, low=rate / 2) for at, rate in enumerate(wsr))
    return Measured(
        seed=seed, benign_accuracy=0.9, accuracy=0.9 - drop, victim_wsr=victim, benign_wsr=0.01, stolen=stolen
    )


@pytest.mark.parametrize(
    ("aggregate", "drop", "wanted"),
    [
        ("min", 0.0, 0.2),
        ("mean", 0.0, 0.5),
        ("lower", 0.0, 0.1),
        ("min", 0.005, 0.2),  # at the limit nothing is lost
        ("min", 0.015, 0.2 - 10 * 0.01),
        ("mean", 0.105, 0.5 - 10 * 0.1),
        ("min", -0.1, 0.2),  # more accurate than the benign model gains nothing
    ],
)
def test_the_value_is_the_aggregate_less_the_penalty_for_the_excess(aggregate: str, drop: float, wanted: float) -> None:
    objective = Objective.model_validate({"aggregate": aggregate, "penalty": 10.0, "max_drop": 0.005})
    found = measured([0.2, 0.8], drop=drop)
    assert objective.so_far(found) == pytest.approx(wanted)
    assert objective.at_least(found, 2) == pytest.approx(wanted)


def test_what_is_not_measured_counts_as_nothing_in_the_guarantee_alone() -> None:
    objective = Objective()
    victim_only, one_of_two = measured([]), measured([0.6])
    assert (objective.so_far(victim_only), objective.at_least(victim_only, 2)) == (1.0, 0.0)
    assert (objective.so_far(one_of_two), objective.at_least(one_of_two, 2)) == (0.6, 0.0)
    mean = Objective(aggregate="mean")
    assert mean.at_least(one_of_two, 2) == pytest.approx(0.3)


def test_the_lower_bound_is_students_t() -> None:
    # t(.75, 1) = 1, t(.8, 2) = 1.0607 (tables)
    assert Objective(confidence=0.75).lower_bound([0.4, 0.6]) == pytest.approx(0.5 - 0.1)
    assert Objective(confidence=0.8).lower_bound([0.0, 0.5, 1.0]) == pytest.approx(0.5 - 1.06066 * 0.5 / math.sqrt(3))
    assert Objective().lower_bound([0.3]) == 0.3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(-0.5, 1), st.integers(0, 3))
def test_no_value_is_below_the_worst_and_no_guarantee_above_the_value(
    wsr: list[float], drop: float, missing: int
) -> None:
    objective, found = Objective(), measured(wsr, drop=min(drop, 0.9))
    assert objective.worst < objective.at_least(found, len(wsr) + missing) <= objective.so_far(found) + 1e-12


def test_a_trial_reports_means_over_its_seeds() -> None:
    found = [measured([0.2, 1.0], seed=0, drop=0.01), measured([0.6, 0.4], seed=1, drop=0.0)]
    report = metrics(Objective(penalty=20.0, max_drop=0.005), found, 3)
    assert report == pytest.approx(
        {
            "accuracy": 0.895,
            "drop": 0.005,
            "victim_wsr": 1.0,
            "value": ((0.2 - 20 * 0.005) + 0.4) / 2,
            "value_lower": report["value_lower"],
            "guaranteed": -20 * 0.005 / 2,
            "benign_wsr": 0.01,
            "worst_wsr": 0.3,
            "mean_wsr": 0.55,
            "wsr/a0": 0.4,
            "wsr/a1": 0.7,
        }
    )
