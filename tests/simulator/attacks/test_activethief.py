"""What ActiveThief's strategies choose, where that is known by hand, and that its counts are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simulator.attacks.activethief import ActiveThief, k_center, most_uncertain
from simulator.checkpoint import FileCheckpoint
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.models import Classifier, build
from simulator.service.oracle import ModelOracle
from simulator.training.recipe import Recipe

STRATEGIES = ("random", "uncertainty", "kcenter", "uncertainty+kcenter")
SHORT = Recipe(epochs=1, batch_size=16)


class Listing(ModelOracle):
    """Remembers what was asked."""

    def __init__(self, model: nn.Module, budget: int) -> None:
        super().__init__(model, labels="soft", classes=3, shape=(1, 8, 8), budget=budget)
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        self.images.append(images.clone())
        return super().query(images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int) -> Classifier:
    return build("linear", channels=1, size=8, classes=3, generator=generator(seed)).eval()


def pool(count: int) -> Pool:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(7))
    return Pool("noise", images, torch.zeros(count, dtype=torch.int64))


def attack(**fields: Any) -> ActiveThief:
    return ActiveThief(**{"training": SHORT, **fields})


def binary(chances: list[float]) -> Tensor:
    """Probability rows of two classes."""
    first = torch.tensor(chances, dtype=torch.float64).float()
    return torch.stack([first, 1 - first], 1)


def test_k_center_takes_the_farthest_on_a_line() -> None:
    # a centre at 0: first 10, then the middle of what is left, 5; then 2 or 8, equally far, and the other
    line = torch.tensor([[1.0], [2.0], [5.0], [8.0], [9.0], [10.0]])
    chosen = k_center(line, torch.tensor([[0.0]]), 4).tolist()
    assert chosen[:2] == [5, 2]
    assert sorted(chosen[2:]) == [1, 3]


def test_k_center_knows_every_centre_there_is() -> None:
    line = torch.tensor([[1.0], [4.0], [7.0], [11.0]])
    assert k_center(line, torch.tensor([[0.0], [12.0]]), 2).tolist() == [2, 1]


def test_k_center_chooses_equal_points_once_each() -> None:
    assert sorted(k_center(torch.zeros(5, 2), torch.zeros(1, 2), 5).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(points=st.integers(1, 40), centres=st.integers(1, 10), part=st.floats(0, 1), seed=st.integers(0, 100))
def test_k_center_is_the_greedy_rule(points: int, centres: int, part: float, seed: int) -> None:
    rows = torch.randn(points, 3, generator=generator(seed))
    used = list(torch.randn(centres, 3, generator=generator(seed + 1)))
    left = set(range(points))
    chosen = k_center(rows, torch.stack(used), round(part * points)).tolist()
    for index in chosen:
        nearest = {other: min(float((rows[other] - centre).norm()) for centre in used) for other in left}
        assert nearest[index] == pytest.approx(max(nearest.values()), abs=1e-3)
        used.append(rows[index])
        left.remove(index)


def test_uncertainty_takes_the_boundary() -> None:
    rows = binary([0.99, 0.5, 0.1, 0.55, 1.0, 0.4])
    assert most_uncertain(rows, 3).tolist() == [1, 3, 5]
    assert most_uncertain(rows, 6).tolist() == [1, 3, 5, 2, 0, 4]  # 0 log 0 is 0, not NaN


def test_strategies_choose_among_what_is_left() -> None:
    rows = binary([0.5, 0.52, 0.0, 0.9, 1.0, 0.3, 0.54])
    taken = torch.tensor([0, 4])  # at 0.5 and 1.0
    assert attack(strategy="uncertainty").select(rows, taken, 2, 4).tolist() == [1, 6]
    assert attack(strategy="kcenter").select(rows, taken, 2, 4).tolist() == [2, 5]
    # of the four most uncertain (0.52, 0.54, 0.3, 0.9) the farthest from the centres: 0.3, then 0.9
    both = attack(strategy="uncertainty+kcenter")
    assert both.select(rows, taken, 2, 4).tolist() == [5, 3]
    assert attack(strategy="uncertainty+kcenter", preselect=0.5).select(rows, taken, 2, 4).tolist() == [6, 1]


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 5000), initial=st.floats(0.001, 1), iterations=st.integers(1, 30))
def test_shares_add_up_and_are_even(total: int, initial: float, iterations: int) -> None:
    first, *rest = attack(initial=initial, iterations=iterations).shares(total)
    assert first + sum(rest) == total
    assert first >= 1
    assert abs(first - initial * total) <= 1
    assert len(rest) == iterations
    assert max(rest) - min(rest) <= 1


def test_the_papers_split() -> None:
    assert attack().shares(1000) == [100, *[90] * 10]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("budget", "images"), [(23, 40), (40, 23), (3, 9), (1, 1)])
def test_no_image_is_asked_twice(strategy: str, budget: int, images: int) -> None:
    oracle = Listing(model(1), budget)
    attack(strategy=strategy, iterations=4).extract(oracle, model(2), pool(images), Context(generator()))
    asked = torch.cat(oracle.images).flatten(1)
    assert oracle.asked == len(asked) == len(asked.unique(dim=0)) == min(budget, images)


def test_every_copy_starts_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, sizes = [], []

    def spy(copied: nn.Module, images: Tensor, *_: Any, **__: Any) -> nn.Module:
        starts.append(copied.state_dict()["head.weight"].clone())
        sizes.append(len(images))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
        return copied

    monkeypatch.setattr("simulator.attacks.activethief.fit", spy)
    monkeypatch.setattr("simulator.attacks.base.fit", spy)
    attack(iterations=3).extract(Listing(model(1), 20), model(2), pool(40), Context(generator()))
    assert sizes == [2, 8, 14, 20]
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_a_recipe_for_the_copies_that_select(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[tuple[str, int]] = []
    attack(iterations=2, selection_training=Recipe(epochs=3, batch_size=16)).extract(
        Listing(model(1), 20),
        model(2),
        pool(40),
        Context(generator(), progress=lambda phase, _, total: phases.append((phase, total))),
    )
    assert [phases.count(("select", 3)), phases.count(("train", 1)), phases.count(("query", 3))] == [6, 1, 3]


class Always(FileCheckpoint):
    """Due at every step; also keeps the oracle's count, as the attacker's wrapper does."""

    def __init__(self, path: Path, oracle: Listing) -> None:
        super().__init__(path)
        self.oracle = oracle

    def due(self) -> bool:
        return True

    def save(self, state: dict[str, Any]) -> None:
        super().save({**state, "oracle.asked": self.oracle.asked})

    def load(self) -> dict[str, Any] | None:
        state = super().load()
        self.oracle.asked = state.pop("oracle.asked") if state else 0
        return state


class Stop(Exception):
    """Interrupts the work."""


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("after", [1, 3, 5])
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, strategy: str, after: int) -> None:
    thief = attack(strategy=strategy, iterations=3, query_noise=0.01)
    whole = thief.extract(Listing(model(1), 20), model(2), pool(40), Context(generator()))

    calls = 0

    def stop(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    first, second = Listing(model(1), 20), Listing(model(1), 20)
    with pytest.raises(Stop):
        thief.extract(
            first, model(2), pool(40), Context(generator(), progress=stop, checkpoint=Always(tmp_path / "state", first))
        )
    resumed = thief.extract(
        second, model(2), pool(40), Context(generator(), checkpoint=Always(tmp_path / "state", second))
    )
    assert second.asked == 20
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
