"""The gradient bandit: its arithmetic by hand, its rewards, and how it draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.attacks.parts.bandit import (
    MEASURES,
    Arms,
    Policy,
    Rewards,
    occurrences,
    pack_bandit,
    trailing_mean,
    unpack_bandit,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flat(groups: int, rate: float = 1.0) -> Policy:
    return Policy(torch.zeros(groups, dtype=torch.int64), rate)


def all_of(policy: Policy) -> Tensor:
    return torch.ones(len(policy.parents), dtype=torch.bool)


class TestHelpers:
    @given(st.lists(st.integers(0, 5), max_size=30))
    def test_occurrences(self, values: list[int]) -> None:
        expected = [values[:place].count(value) for place, value in enumerate(values)]
        assert occurrences(torch.tensor(values, dtype=torch.int64)).tolist() == expected

    @given(
        st.lists(st.floats(-1, 1), max_size=6),
        st.lists(st.floats(-1, 1), min_size=1, max_size=9),
        st.integers(1, 5),
    )
    def test_trailing_mean(self, past: list[float], new: list[float], window: int) -> None:
        rows = past + new
        expected = []
        for place in range(len(past), len(rows)):
            before = rows[max(0, place - window) : place] or [rows[place]]
            expected.append(sum(before) / len(before))
        torch.testing.assert_close(trailing_mean(doubles(*past), doubles(*new), window), doubles(*expected))


class TestPolicy:
    def test_an_update_by_hand(self) -> None:
        policy = flat(3)
        policy.update(torch.tensor([1]), doubles(0.6), all_of(policy))
        torch.testing.assert_close(policy.preferences, doubles(-0.2, 0.4, -0.2))
        policy.update(torch.tensor([1]), doubles(-0.5), all_of(policy))  # the second draw of arm 1: half the rate
        total = math.exp(0.4) + 2 * math.exp(-0.2)
        low, high = math.exp(-0.2) / total, math.exp(0.4) / total
        expected = doubles(-0.2 + 0.25 * low, 0.4 - 0.25 * (1 - high), -0.2 + 0.25 * low)
        torch.testing.assert_close(policy.preferences, expected)
        assert policy.counts.tolist() == [0, 2, 0]
        torch.testing.assert_close(policy.probabilities(all_of(policy)), expected.softmax(0))

    def test_a_batch_is_the_sum_of_its_draws_under_one_policy(self) -> None:
        policy = flat(2, rate=2.0)
        policy.update(torch.tensor([0, 1, 0]), doubles(0.5, 0.25, -1.0), all_of(policy))
        # α is 2, 2 and, for the second draw of arm 0, 1; π is one half throughout
        gained = 2 * 0.5 * 0.5 - 2 * 0.25 * 0.5 - 1 * 1.0 * 0.5
        torch.testing.assert_close(policy.preferences, doubles(gained, -gained))

    def test_two_levels_by_hand(self) -> None:
        policy = Policy(torch.tensor([0, 0, 1]), 1.0)
        torch.testing.assert_close(policy.probabilities(all_of(policy)), doubles(0.25, 0.25, 0.5))
        policy.update(torch.tensor([0]), doubles(0.8), all_of(policy))
        torch.testing.assert_close(policy.parent_preferences, doubles(0.4, -0.4))
        torch.testing.assert_close(policy.preferences, doubles(0.4, -0.4, 0.0))
        upper, lower = doubles(0.4, -0.4).softmax(0), doubles(0.4, -0.4).softmax(0)
        expected = torch.stack([upper[0] * lower[0], upper[0] * lower[1], upper[1]])
        torch.testing.assert_close(policy.probabilities(all_of(policy)), expected)

    def test_what_is_not_available_is_neither_drawn_nor_moved(self) -> None:
        policy = Policy(torch.tensor([0, 0, 1, 2]), 1.0)
        available = torch.tensor([True, False, False, True])
        torch.testing.assert_close(policy.probabilities(available), doubles(0.5, 0.0, 0.0, 0.5))
        policy.update(torch.tensor([3, 0]), doubles(0.9, -0.2), available)
        assert policy.preferences[[1, 2]].tolist() == [0, 0]
        assert policy.parent_preferences[1] == 0

    @given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), st.integers(1, 15))
    def test_extreme_preferences_are_safe(self, preferences: list[float], mask: int) -> None:
        policy = Policy(torch.tensor([0, 1, 0, 1]), 1.0)
        policy.preferences = doubles(*preferences)
        policy.parent_preferences = doubles(preferences[0], -preferences[1])
        available = torch.tensor([bool(mask >> bit & 1) for bit in range(4)])
        probabilities = policy.probabilities(available)
        assert float(probabilities.sum()) == pytest.approx(1)
        assert not probabilities[~available].any()
        assert (probabilities >= 0).all()


class TestRewards:
    def test_certainty(self) -> None:
        answers = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.4, 0.2, 0.4]])
        rewards = Rewards(("certainty",), 25, 3)
        # raw .2, .5, 0, so rescaled .4, 1, 0; the baselines are .4 (itself), .4 and .7
        torch.testing.assert_close(rewards.advantages(answers, None), doubles(0.0, 0.6, -0.7), atol=1e-6, rtol=0)
        # raw 1 is the greatest so far
        torch.testing.assert_close(
            rewards.advantages(torch.tensor([[0.0, 1.0, 0.0]]), None), doubles(1 - 1.4 / 3), atol=1e-6, rtol=0
        )

    def test_diversity(self) -> None:
        answers = torch.eye(3)[[0, 0, 1, 1]]
        rewards = Rewards(("diversity",), 2, 3)
        # against the mean of the two before: 0 (itself), 0, 1, ½
        expected = doubles(0.0, 0.0, 1.0, 0.5) - doubles(0.0, 0.0, 0.0, 0.5)
        torch.testing.assert_close(rewards.advantages(answers, None), expected)

    def test_loss(self) -> None:
        answers, logits = torch.eye(2)[[0, 0]], torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        rewards = Rewards(("loss",), 25, 2)
        rewards.advantages(answers, logits)
        torch.testing.assert_close(rewards.least, doubles(math.log(2)))
        torch.testing.assert_close(rewards.greatest, doubles(math.log(1 + math.exp(2))))

    def test_the_mean_weighs_each_rescaled_measure_alike(self) -> None:
        answers = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [50.0, 0.0]])
        each = [Rewards((name,), 25, 2).advantages(answers, logits) for name in MEASURES]
        torch.testing.assert_close(Rewards(MEASURES, 25, 2).advantages(answers, logits), torch.stack(each).mean(0))

    def test_equal_answers_earn_nothing(self) -> None:
        answers = torch.full((40, 4), 0.25) + torch.rand(40, 4, generator=generator()) * 1e-8
        assert not Rewards(MEASURES, 25, 4).advantages(answers, torch.zeros(40, 4)).any()

    @given(st.integers(1, 30), st.integers(1, 9))
    def test_batches_do_not_change_what_is_compared(self, window: int, batch: int) -> None:
        """After the first batch has shown the whole range, the advantages are those of one draw at a time."""
        answers = torch.rand(40, 5, generator=generator()).softmax(1)
        logits = torch.randn(40, 5, generator=generator(1))
        first, second = Rewards(MEASURES, window, 5), Rewards(MEASURES, window, 5)
        for rewards in (first, second):
            rewards.least, rewards.greatest = doubles(0, 0, 0), doubles(1, 1, 9)
        whole = first.advantages(answers, logits)
        parts = zip(answers.split(batch), logits.split(batch), strict=True)
        torch.testing.assert_close(torch.cat([second.advantages(*part) for part in parts]), whole)


class TestArms:
    groups = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 2])

    def test_without_replacement_within_an_arm(self) -> None:
        arms, policy = Arms(self.groups, generator()), flat(3)
        seen: list[int] = []
        for count in (4, 1, 5):
            drawn, indices = arms.draw(policy, count, generator(count))
            assert self.groups[indices].tolist() == drawn.tolist()
            seen += indices.tolist()
            assert arms.left == len(self.groups) - len(seen)
        assert len(set(seen)) == 10

    def test_an_exhausted_arm_gives_way_to_the_others(self) -> None:
        arms, policy = Arms(self.groups, generator()), flat(3)
        policy.preferences = doubles(1000.0, 0.0, -1000.0)
        assert arms.draw(policy, 3, generator())[0].tolist() == [0, 0, 0]
        assert arms.available.tolist() == [False, True, True]
        assert arms.draw(policy, 5, generator())[0].tolist() == [1, 1, 1, 2, 2]
        assert arms.available.tolist() == [False, False, True]

    def test_a_new_pass_has_every_image_once_in_another_order(self) -> None:
        source, policy = generator(), flat(3)
        arms = Arms(self.groups, source)
        orders = []
        for _ in range(2):
            orders.append(arms.draw(policy, 11, source)[1].tolist())
            assert sorted(orders[-1]) == list(range(11))
            assert arms.left == 0
            arms.begin_pass(source)
        assert orders[0] != orders[1]
        assert arms.passes == 3

    def test_a_state_goes_on_where_it_was_taken(self) -> None:
        def parts() -> tuple[Policy, Rewards, Arms]:
            return flat(3), Rewards(("certainty",), 4, 2), Arms(self.groups, generator(5))

        def step(policy: Policy, rewards: Rewards, arms: Arms, seed: int) -> list[int]:
            drawn, indices = arms.draw(policy, 3, generator(seed))
            answers = torch.rand(3, 2, generator=generator(seed))
            policy.update(drawn, rewards.advantages(answers, None), arms.available)
            return [int(index) for index in indices]

        first = parts()
        step(*first, seed=1)
        state = pack_bandit(*first)
        expected = [step(*first, seed=seed) for seed in (2, 3)]
        for _ in range(2):  # what continues from a state leaves it as it is
            second = parts()
            unpack_bandit(state, *second)
            assert [step(*second, seed=seed) for seed in (2, 3)] == expected
            assert torch.equal(second[0].preferences, first[0].preferences)
