"""Bounds of DeepTracer's analysis, beside the values that the paper prints."""

from __future__ import annotations

import pytest

from simulator.ownership.bounds import (
    answered_by_chance,
    claimed_by_chance,
    class_sets,
    cracked_by_chance,
    learned_by_chance,
)
from simulator.ownership.wsr import Verification, chance_verdict


@pytest.mark.parametrize(
    ("classes", "learned", "cracked"),
    [(10, 4.76e-4, 4.76e-3), (43, 1.88e-7, 8.10e-6), (100, 2.55e-9, 2.55e-7), (1000, 2.41e-14, 2.41e-11)],
)
def test_sources_and_target(classes: int, learned: float, cracked: float) -> None:
    assert learned_by_chance(classes) == pytest.approx(learned, rel=5e-3)
    assert cracked_by_chance(classes) == pytest.approx(cracked, rel=5e-3)
    assert learned_by_chance(classes) == pytest.approx(cracked_by_chance(classes) * answered_by_chance(classes))


def test_numbers_of_sets() -> None:
    assert (class_sets(10), class_sets(10, 2), class_sets(4)) == (210, 45, 1)


@pytest.mark.parametrize(
    ("samples", "classes", "chance"),
    [(2000, 10, 1.08e-40), (500, 10, 1.80e-11), (90, 10, 3.2e-3), (2000, 5, 0.51)],
)
def test_claims_by_chance(samples: int, classes: int, chance: float) -> None:
    assert claimed_by_chance(samples, classes) == pytest.approx(chance, rel=2e-2)


def test_the_verdict_wants_more_than_the_bound() -> None:
    assert chance_verdict(2000, 10, Verification()) == pytest.approx(4.78e-41, rel=1e-2)
    assert chance_verdict(90, 10, Verification()) == pytest.approx(1.3e-3, rel=5e-2)
    assert chance_verdict(2000, 10, Verification()) < claimed_by_chance(2000, 10)


def test_a_share_that_is_no_whole_number_is_rounded_up() -> None:
    assert claimed_by_chance(3, 2, 0.5) == pytest.approx(0.5), "two or three of three"
    assert claimed_by_chance(2, 2, 0.5) == pytest.approx(0.75)
