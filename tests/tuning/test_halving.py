"""Synchronous halving: who goes on is a function of the results, whatever their order."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tuning.halving import Decision, Halving

KEEP = {"phase 1": 0.5, "victim": 0.5}


def test_a_rung_waits_for_its_bracket_and_lets_the_best_go_on() -> None:
    halving = Halving(KEEP, 4, 4)
    assert halving.arrive(2, "phase 1", 0.1) == Decision()
    assert halving.arrive(0, "phase 1", 0.3) == Decision()
    assert halving.arrive(3, "phase 1", 0.2) == Decision()
    assert halving.arrive(1, "phase 1", 0.9) == Decision(go=[0, 1], stop=[2, 3])
    # the next rung waits for those two alone
    assert halving.arrive(0, "victim", 0.5) == Decision()
    assert halving.arrive(1, "victim", 0.4) == Decision(go=[0], stop=[1])
    assert halving.arrive(0, "attack 1", 0.0) == Decision(go=[0])


def test_a_trial_that_reports_again_gets_the_same_answer() -> None:
    halving = Halving({"victim": 0.5}, 2, 2)
    halving.arrive(0, "victim", 0.1)
    halving.arrive(1, "victim", 0.2)
    assert halving.arrive(1, "victim", 0.2) == Decision(go=[1])
    assert halving.arrive(0, "victim", 0.1) == Decision(stop=[0])


def test_ties_go_to_the_earlier_trial_and_the_last_bracket_may_be_smaller() -> None:
    halving = Halving({"victim": 0.5}, 2, 3)
    assert halving.arrive(1, "victim", 0.7) == Decision()
    assert halving.arrive(0, "victim", 0.7) == Decision(go=[0], stop=[1])
    assert halving.arrive(2, "victim", 0.0) == Decision(go=[2])


def test_nobody_waits_for_a_trial_that_failed() -> None:
    halving = Halving({"victim": 0.5}, 3, 3)
    assert halving.arrive(0, "victim", 0.1) == Decision()
    assert halving.arrive(2, "victim", 0.2) == Decision()
    assert halving.end(1) == Decision(go=[2], stop=[0])


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12),
    st.integers(2, 5),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_does_not_matter(
    values: list[float], size: int, keep: float, order: random.Random
) -> None:
    def survivors(shuffle: bool) -> set[int]:
        halving, alive = Halving({"victim": keep, "attack 1": keep}, size, len(values)), set(range(len(values)))
        for stage in ("victim", "attack 1"):
            arrivals = sorted(alive)
            if shuffle:
                order.shuffle(arrivals)
            decisions = [halving.arrive(one, stage, values[one]) for one in arrivals]
            gone = {one for decision in decisions for one in decision.stop}
            went = {one for decision in decisions for one in decision.go}
            assert gone | went == alive
            assert not gone & went
            alive = went
        return alive

    assert survivors(True) == survivors(False)
