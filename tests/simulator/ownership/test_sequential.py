"""Wald's sequential test: its bounds, its error rates exactly and by simulation, and what it saves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from simulator.component import describe
from simulator.context import Context
from simulator.ownership.base import Verdict
from simulator.ownership.key import KeySamples
from simulator.ownership.sequential import SequentialWsr, default_stolen_wsr
from simulator.ownership.wsr import Verification

RULES = st.builds(
    lambda p0, gap, alpha, beta: SequentialWsr(benign_wsr=p0, stolen_wsr=p0 + gap * (1 - p0), alpha=alpha, beta=beta),
    st.floats(0.02, 0.5),
    st.floats(0.3, 0.9),
    st.floats(0.01, 0.2),
    st.floats(0.01, 0.2),
)


def exactly(rule: SequentialWsr, rate: float, horizon: int = 20_000) -> tuple[float, float, float]:
    """P(verified), P(not verified) and the mean number of queries at a rate, by summing over all paths."""
    going, accepted, acquitted, mean = {0: 1.0}, 0.0, 0.0, 0.0
    for asked in range(1, horizon + 1):
        following: dict[int, float] = {}
        for hits, chance in going.items():
            for hit, weight in ((1, rate), (0, 1 - rate)):
                part, found = chance * weight, rule.decide(hits + hit, asked)
                if found is None:
                    following[hits + hit] = following.get(hits + hit, 0.0) + part
                else:
                    accepted, acquitted, mean = (
                        accepted + found * part,
                        acquitted + (not found) * part,
                        mean + asked * part,
                    )
        going = following
        if sum(going.values()) < 1e-10:
            break
    return accepted, acquitted, mean


def key_of(hits: int, samples: int) -> KeySamples:
    """A key whose image number i shows i in two bytes; :func:`suspect` knows the labels of the first ``hits``."""
    numbers = torch.arange(samples)
    images = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).reshape(samples, 1, 1, 2)
    return KeySamples(images, (numbers >= hits).long(), 10)


def suspect(image: Tensor) -> int:
    return 0


class Asked:
    """An oracle that gives the labels of a function of the image ``(1, C, H, W)``, which is asked them in turn."""

    labels, classes, shape = "hard", 10, (1, 1, 2)

    def __init__(self, answer: Callable[[Tensor], int], budget: int) -> None:
        self._answer, self.remaining = answer, budget

    def query(self, images: Tensor) -> Tensor:
        assert len(images) <= self.remaining
        self.remaining -= len(images)
        return torch.eye(10)[[self._answer(image) for image in images.split(1)]]


def judge(
    answer: Callable[[Tensor], int], key: KeySamples, rule: SequentialWsr, seed: int = 0, max_queries: int | None = None
) -> Verdict:
    oracle = Asked(answer, len(key) if max_queries is None else max_queries)
    return rule.judge(oracle, key.evidence(), Context(torch.Generator().manual_seed(seed)))


def hits_of(found: Verdict) -> int:
    return round(found.statistic * found.asked)


def decided(rule: SequentialWsr, found: Verdict) -> bool:
    return rule.decide(hits_of(found), found.asked) is not None


def test_the_defaults_are_tied_to_the_fixed_rule() -> None:
    rule = SequentialWsr()
    assert rule.benign_wsr == Verification().threshold == 0.2
    assert rule.stolen_wsr == default_stolen_wsr(0.2) == 0.4
    assert default_stolen_wsr(0.6) == pytest.approx(0.8)
    assert (rule.alpha, rule.beta) == (0.05, 0.05)


def test_bounds_and_steps_by_hand() -> None:
    rule = SequentialWsr(benign_wsr=0.25, stolen_wsr=0.5, alpha=0.1, beta=0.2)
    assert rule.bounds == pytest.approx((math.log(0.2 / 0.9), math.log(8)))
    assert rule.steps == pytest.approx((math.log(2 / 3), math.log(2)))
    # three hits in a row are a ratio of 8, the upper bound; four misses one of (2/3)^4 = .1975 <= .2222
    assert [rule.decide(hits, hits) for hits in (1, 2)] == [None, None]
    assert [rule.decide(0, asked) for asked in (1, 2, 3, 4)] == [None, None, None, False]
    assert rule.decide(4, 4) is True
    assert rule.ratio(3, 5) == pytest.approx(3 * math.log(2) + 2 * math.log(2 / 3))


@given(RULES)
def test_the_errors_of_both_kinds_stay_within_walds_bounds_exactly(rule: SequentialWsr) -> None:
    accused, acquitted, _ = exactly(rule, rule.benign_wsr)
    assert accused + acquitted == pytest.approx(1, abs=1e-8)
    assert accused <= rule.alpha / (1 - rule.beta) + 1e-9
    _, missed, _ = exactly(rule, rule.stolen_wsr)
    assert missed <= rule.beta / (1 - rule.alpha) + 1e-9
    assert accused + missed <= rule.alpha + rule.beta + 1e-9


@given(RULES, st.floats(0.0, 1.0))
def test_a_lower_rate_than_p0_and_a_higher_one_than_p1_only_make_it_safer(rule: SequentialWsr, share: float) -> None:
    assert exactly(rule, share * rule.benign_wsr)[0] <= rule.alpha / (1 - rule.beta) + 1e-9
    above = rule.stolen_wsr + share * (1 - rule.stolen_wsr)
    assert exactly(rule, above)[1] <= rule.beta / (1 - rule.alpha) + 1e-9


@given(RULES)
def test_a_suspect_that_always_or_never_hits_takes_the_closed_number_of_queries(rule: SequentialWsr) -> None:
    (miss, hit), (low, high) = rule.steps, rule.bounds
    for hits, needed in ((1, high / hit), (0, low / miss)):
        asked = next(n for n in range(1, 10_000) if rule.decide(n * hits, n) is not None)
        assert asked - 1 < needed + 1e-9
        assert asked >= needed - 1e-9


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.4, 0.7, 1.0])
def test_the_mean_number_of_queries_is_about_walds(rate: float) -> None:
    """Wald's approximation neglects the overshoot: at most one step beyond a bound."""
    rule = SequentialWsr()
    (miss, hit), (low, high) = rule.steps, rule.bounds
    accused, acquitted, mean = exactly(rule, rate)
    drift = rate * hit + (1 - rate) * miss
    least, most = sorted(
        ((accused * high + acquitted * low) / drift, (accused * (high + hit) + acquitted * (low + miss)) / drift)
    )
    assert least - 1e-6 <= mean <= most + 1e-6


@pytest.mark.parametrize(
    ("hits", "wrong", "bound"),
    [(0, True, 0.0), (60, True, 0.055), (120, False, 0.055), (300, False, 0.0)],
    ids=["benign", "at p0", "at p1", "victim"],
)
def test_simulated_suspects_are_judged_wrongly_as_rarely_as_promised(hits: int, wrong: bool, bound: float) -> None:
    """600 orders of one key of 300 samples: drawing without putting back only helps."""
    rule = SequentialWsr()
    found = [judge(suspect, key_of(hits, 300), rule, seed) for seed in range(600)]
    rate = sum(each.verified is wrong for each in found) / len(found)
    deviation = math.sqrt(0.05 * 0.95 / len(found))
    assert rate <= (bound + 2.5 * deviation if bound else 0)
    assert all(each.asked + each.saved == 300 for each in found)


def test_a_marked_suspect_is_decided_in_five_queries_and_a_benign_one_in_eleven() -> None:
    rule = SequentialWsr()
    marked = judge(suspect, key_of(500, 500), rule)
    assert (marked.verified, decided(rule, marked), hits_of(marked)) == (True, True, 5)
    assert (marked.asked, marked.saved, marked.samples) == (5, 495, 500)
    assert marked.p_value == pytest.approx(2**-5)
    benign = judge(suspect, key_of(0, 500), rule)
    assert (benign.verified, decided(rule, benign), hits_of(benign), benign.asked) == (False, True, 0, 11)
    assert benign.p_value == 1


def test_the_order_is_drawn_from_the_seed_and_no_sample_is_asked_twice() -> None:
    def asked(seed: int) -> list[int]:
        seen: list[int] = []

        def answer(image: Tensor) -> int:
            seen.append(int(image[0, 0, 0, 0]) * 256 + int(image[0, 0, 0, 1]))
            return int(len(seen) % 3 == 0)  # about the undecided rate

        rule = SequentialWsr(alpha=1e-6, beta=1e-6)
        judge(answer, key_of(300, 300), rule, seed)
        return seen

    assert asked(1) == asked(1) != asked(2)
    assert len(set(asked(1))) == len(asked(1))
    assert asked(1) != sorted(asked(1))


def accused(rule: SequentialWsr, samples: int, hits: int | None = None) -> float:
    """P(verified) with a whole key of so many samples, by summing over all paths: at a rate of p0, or of a key of which
    so many samples are hits, drawn without putting back."""
    going, verified = {0: 1.0}, 0.0
    for asked in range(1, samples + 1):
        following: dict[int, float] = {}
        for before, chance in going.items():
            rate = rule.benign_wsr if hits is None else (hits - before) / (samples - asked + 1)
            for now, part in ((before + 1, chance * rate), (before, chance * (1 - rate))):
                found = rule.decide(now, asked)
                if found is None:
                    following[now] = following.get(now, 0.0) + part
                else:
                    verified += found * part
        going = following
    return verified + sum(chance for end, chance in going.items() if end >= rule.least_hits(samples))


@pytest.mark.parametrize("samples", [10, 20, 30, 50, 90, 200])
def test_a_short_key_accuses_an_innocent_suspect_as_rarely_as_a_long_one_exactly(samples: int) -> None:
    """A whole WSR above p0 as the rule would accuse .32, .37, .35, .18, .057 and .039 of the suspects at p0."""
    rule = SequentialWsr()
    assert rule.accusation_bound == pytest.approx(0.05 / 0.95)
    assert accused(rule, samples) <= rule.accusation_bound
    assert accused(rule, samples, hits=math.floor(0.2 * samples)) <= rule.accusation_bound


@given(RULES, st.integers(1, 150))
def test_the_bound_is_kept_at_every_length_exactly(rule: SequentialWsr, samples: int) -> None:
    assert accused(rule, samples) <= rule.accusation_bound + 1e-9
    assert accused(rule, samples, hits=math.floor(rule.benign_wsr * samples)) <= rule.accusation_bound + 1e-9
    assert rule.benign_wsr * samples < rule.least_hits(samples) <= samples + 1


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 9])
def test_all_answers_that_a_suspect_may_give_add_up_to_the_bound(samples: int) -> None:
    """Every sequence of answers through the function itself, weighted as a suspect at p0 gives it."""
    rule, chance = SequentialWsr(), 0.0
    for answers in itertools.product((0, 1), repeat=samples):  # of a key whose labels are all 0
        found = judge(lambda _, left=list(answers): left.pop(), key_of(samples, samples), rule)
        chance += found.verified * 0.2 ** answers.count(0) * 0.8 ** answers.count(1)
    assert chance == pytest.approx(accused(rule, samples))
    assert chance <= rule.accusation_bound


def test_an_undecided_key_needs_as_many_hits_as_chance_hardly_gives_and_an_undecided_limit_shows_nothing() -> None:
    # the bounds are out of reach, so h ~ B(10, .2): P(h >= 5) = .033, P(h >= 4) = .121
    rule = SequentialWsr(stolen_wsr=0.21)
    assert rule.least_hits(10) == 5
    assert SequentialWsr().least_hits(1) == 2, "one sample shows nothing"

    def go(hits: int, **options: int) -> tuple[bool, bool, int]:
        found = judge(suspect, key_of(hits, 10), rule, **options)
        return found.verified, decided(rule, found), found.asked

    assert go(5) == (True, False, 10)
    assert go(4) == (False, False, 10)
    assert go(10, max_queries=9) == (False, False, 9)
    assert go(10, max_queries=99) == (True, False, 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benign_wsr": 0.0}, ["benign_wsr", "greater than 0"]),
        ({"stolen_wsr": 1.0}, ["stolen_wsr", "less than 1"]),
        ({"benign_wsr": 0.4, "stolen_wsr": 0.4}, ["0.4", "not above"]),
        ({"alpha": 0.5}, ["alpha", "less than 0.5"]),
        ({"beta": math.nan}, ["beta"]),
    ],
)
def test_a_test_that_cannot_be_is_refused_in_one_line(settings: dict[str, float], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SequentialWsr(**settings)
    line = describe(caught.value)
    assert len(line.splitlines()) == 1
    assert all(word in line for word in words), line
