import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from simulator.component import describe
from simulator.context import Context
from simulator.models import build, save_model
from simulator.ownership.key import KeySamples, save_key
from simulator.ownership.suspect import verify_file
from simulator.ownership.wsr import (
    Verification,
    Wsr,
    chance_verdict,
    p_value,
    small_key,
    verdict,
    wilson_interval,
)
from simulator.service.oracle import ModelOracle

COUNTS = st.integers(1, 400).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand: at one half the centre is one half, and the half width is z / (2 sqrt(n + z²))
        (5, 10, 0.5 - 1.959964 / (2 * math.sqrt(13.841459)), 0.5 + 1.959964 / (2 * math.sqrt(13.841459))),
        # at the ends: z² / (n + z²)
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(COUNTS)
def test_a_wilson_interval_holds_the_rate_and_is_symmetric_in_success_and_failure(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    # the ends solve |rate - p| = z sqrt(p (1 - p) / n)
    for end in (low, high):
        assert (successes / trials - end) ** 2 == pytest.approx(3.8414588206941236 * end * (1 - end) / trials, abs=1e-9)


@given(COUNTS, st.integers(2, 200))
def test_the_p_value_is_the_sum_of_equation_20(counts: tuple[int, int], classes: int) -> None:
    successes, trials = counts
    total = sum(math.comb(trials, k) * (classes - 1) ** (trials - k) for k in range(successes, trials + 1))
    assert p_value(successes, trials, classes) == pytest.approx(float(Fraction(total, classes**trials)), rel=1e-9)


def test_p_values_by_hand() -> None:
    assert p_value(0, 10, 10) == 1
    assert p_value(0, 0, 10) == 1
    assert p_value(3, 3, 10) == pytest.approx(1e-3)
    assert p_value(1, 2, 2) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("successes", "trials", "threshold", "verified"),
    [
        (200, 1000, 0.2, False),
        (201, 1000, 0.2, True),
        (199, 1000, 0.2, False),
        (1, 2, 0.5, False),
        (2, 2, 0.5, True),
        (0, 0, 0.2, False),
    ],
)
def test_the_rate_has_to_exceed_the_threshold(successes: int, trials: int, threshold: float, verified: bool) -> None:
    found = verdict(successes, trials, 10, Verification(threshold=threshold))
    assert found.verified is verified
    assert found.samples == trials
    assert found.statistic == (successes / trials if trials else 0.0)
    assert (found.low, found.high) == wilson_interval(successes, trials)
    assert found.p_value == p_value(successes, trials, 10)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 20.0, math.nan, math.inf])
def test_a_threshold_outside_zero_to_one_is_refused(threshold: float) -> None:
    for rule in (Verification, Wsr):
        with pytest.raises(ValidationError) as caught:
            rule(threshold=threshold)
        assert len(describe(caught.value).splitlines()) == 1


def test_the_default_threshold_is_the_papers() -> None:
    assert Verification().threshold == Wsr().threshold == 0.2


class Brightness(nn.Module):
    """Answers an image of value v with label v."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(255.0))

    def forward(self, images: Tensor) -> Tensor:
        values = (images[:, 0, 0, 0] * self.scale).round().long()
        return nn.functional.one_hot(values, 5).float()


def test_a_model_is_verified_by_its_top_label_on_every_key_sample() -> None:
    images = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4], dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    key = KeySamples(images, torch.tensor([0, 1, 0, 0, 4, 0, 0, 0]), classes=5)
    suspect = ModelOracle(Brightness(), labels="hard", classes=5, shape=(1, 2, 2), budget=8)
    found = Wsr().judge(suspect, key.evidence(), Context(torch.Generator()))
    assert found == verdict(3, 8, 5, Verification())
    assert (found.samples, found.asked, suspect.remaining) == (8, 8, 0)
    assert found.verified


@given(st.integers(0, 300), st.integers(2, 20), st.floats(0.05, 0.9))
def test_the_chance_of_a_verdict_sums_what_chance_verifies(samples: int, classes: int, threshold: float) -> None:
    rule = Verification(threshold=threshold)
    verified = [hits for hits in range(samples + 1) if verdict(hits, samples, classes, rule).verified]
    ways = sum(math.comb(samples, hits) * (classes - 1) ** (samples - hits) for hits in verified)
    assert chance_verdict(samples, classes, rule) == pytest.approx(float(Fraction(ways, classes**samples)), abs=1e-12)


def test_which_keys_are_too_small() -> None:
    rule = Verification()
    assert chance_verdict(2, 10, rule) == pytest.approx(0.19)
    assert [small_key(samples, 10, rule) is None for samples in (10, 21, 90, 100, 500)] == [False] * 3 + [True] * 2
    # with two classes chance alone is above the threshold, however long the key
    assert "probability of 1" in str(small_key(500, 2, rule))


@pytest.mark.parametrize("samples", [21, 500])
def test_the_verdict_on_a_file_names_a_key_too_small_to_judge_by(tmp_path: Path, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    model = build("linear", channels=1, size=8, classes=10, generator=generator)
    images = torch.randint(0, 256, (samples, 1, 8, 8), generator=generator, dtype=torch.uint8)
    key = KeySamples(images, torch.arange(samples) % 10, 10)
    save_model(model, tmp_path / "model.safetensors")
    save_key(key, tmp_path / "key.safetensors")
    found, says = verify_file(tmp_path / "model.safetensors", tmp_path / "key.safetensors")
    assert found.samples == samples
    assert ("warning: the key has 21 samples: a model" in says) == (samples == 21)
    assert ("0.052" in says) == (samples == 21)
