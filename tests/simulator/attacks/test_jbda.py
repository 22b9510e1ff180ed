"""Jacobian-based dataset augmentation, where the substitute's slope is known by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simulator.attacks.jbda import JBDA
from simulator.checkpoint import FileCheckpoint
from simulator.context import Context, NoSnapshots
from simulator.data.pool import Pool
from simulator.models import Classifier, build
from simulator.service.oracle import ModelOracle
from simulator.training.recipe import Recipe

CLASSES = 3
SHORT = Recipe(epochs=1, batch_size=16)


class Linear(nn.Module):
    """Logits W·x of 2 by 2 images, with dropout that must not be on when slopes are taken."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.dropout(images.flatten(1)) @ self.weight.T
        return logits


class Listing(ModelOracle):
    """Remembers what was asked."""

    def __init__(self, model: nn.Module, budget: int, labels: str = "soft") -> None:
        super().__init__(model, labels=labels, classes=CLASSES, shape=(1, 8, 8), budget=budget)
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        self.images.append(images.clone())
        return super().query(images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int) -> Classifier:
    return build("linear", channels=1, size=8, classes=CLASSES, generator=generator(seed)).eval()


def pool(count: int = 30) -> Pool:
    images = torch.randint(60, 200, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(7))
    return Pool("noise", images, torch.zeros(count, dtype=torch.int64))


def attack(**fields: Any) -> JBDA:
    return JBDA(**{"seeds": 4, "training": SHORT, "round_training": SHORT, **fields})


def collect(jbda: JBDA, oracle: Listing, images: int = 30) -> Tensor:
    jbda.extract(oracle, model(2), pool(images), Context(generator()))
    return torch.cat(oracle.images)


def test_the_step_is_the_sign_of_the_slope() -> None:
    weights = [[1.0, -2.0, 0.0, 3.0], [0.5, 1.0, -1.0, 0.0], [-1.0, 0.0, 2.0, 1.0]]
    points = torch.rand(300, 1, 2, 2, generator=generator()) * 0.2 + 0.4  # more than one batch
    labels = torch.arange(300) % 3
    W = torch.tensor(weights)
    # of a logit: W_y; of a probability: p_y (W_y - sum_k p_k W_k)
    rows = (points.flatten(1) @ W.T).softmax(1)
    slopes = {"logit": W[labels], "probability": W[labels] - rows @ W}
    for slope, expected in slopes.items():
        new = attack(slope=slope).augment(Linear(weights).train(), points, labels, 0.1)
        torch.testing.assert_close(new, points + 0.1 * expected.sign().reshape(-1, 1, 2, 2))


def test_a_sure_substitute_still_has_a_slope() -> None:
    """Its probability is 1 within float32, and the probability's own gradient would be zero."""
    linear = Linear([[50.0, 50.0, 50.0, 50.0], [-50.0, -50.0, -50.0, -50.0]])
    new = attack().augment(linear, torch.full((1, 1, 2, 2), 0.3), torch.tensor([1]), 0.1)
    torch.testing.assert_close(new, torch.full((1, 1, 2, 2), 0.2))


def test_clipping() -> None:
    linear = Linear([[1.0, 1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    points, labels = torch.tensor([[[[0.95, 0.5], [0.05, 0.5]]]]), torch.tensor([0])
    clipped = attack().augment(linear, points, labels, 0.1)
    torch.testing.assert_close(clipped, torch.tensor([[[[1.0, 0.6], [0.0, 0.4]]]]))
    free = attack(clip=False).augment(linear, points, labels, 0.1)
    torch.testing.assert_close(free, torch.tensor([[[[1.05, 0.6], [-0.05, 0.4]]]]))


def test_what_is_asked_is_clipped_either_way() -> None:
    for clip in (True, False):
        asked = collect(attack(clip=clip, step=0.4, rounds=4), Listing(model(1), 64))
        assert asked.min() == 0
        assert asked.max() == 1


@pytest.mark.parametrize(
    ("flip_every", "signs"), [(None, "++++++++"), (3, "+++---++"), (1, "+-+-+-+-"), (2, "++--++--")]
)
def test_the_sign_alternates(flip_every: int | None, signs: str) -> None:
    for step in (0.1, -0.1):
        jbda = attack(step=step, flip_every=flip_every)
        expected = [step if sign == "+" else -step for sign in signs]
        assert [jbda.signed_step(number) for number in range(8)] == expected


@settings(max_examples=15, deadline=None)
@given(
    seeds=st.integers(1, 6),
    rounds=st.integers(0, 4),
    doubling=st.none() | st.integers(0, 4),
    reservoir=st.integers(1, 5),
    budget=st.integers(1, 70),
)
def test_counts(seeds: int, rounds: int, doubling: int | None, reservoir: int, budget: int) -> None:
    """n 2^σ + κ (ρ - σ), where κ images are there to choose from; a round doubles at most."""
    doublings = rounds if doubling is None else min(doubling, rounds)
    wanted = seeds * 2**doublings
    for _ in range(rounds - doublings):
        wanted += min(reservoir, wanted)
    if seeds * 2**doublings >= reservoir:
        assert wanted == seeds * 2**doublings + reservoir * (rounds - doublings)
    oracle = Listing(model(1), budget)
    jbda = attack(seeds=seeds, rounds=rounds, doubling_rounds=doubling, reservoir=reservoir)
    asked = collect(jbda, oracle)
    assert len(asked) == oracle.asked == min(wanted, budget)


def test_only_new_points_are_asked_a_step_from_old_ones() -> None:
    oracle = Listing(model(1), 32)
    collect(attack(rounds=3, step=0.07), oracle)
    assert [len(images) for images in oracle.images] == [4, 4, 8, 16]
    drawn = pool().images.float() / 255
    assert all((drawn == seed).flatten(1).all(1).any() for seed in oracle.images[0])
    before = oracle.images[0]
    for new in oracle.images[1:]:
        # the largest difference of any pixel to each older point: the step, for exactly one base
        distances = (new[:, None] - before[None]).abs().flatten(2).amax(2)
        near = (distances - 0.07).abs() < 1e-6
        assert near.any(1).all()
        assert near[:, : len(before)].any(0).all()  # every old point was a base
        before = torch.cat([before, new])


def test_a_last_round_is_a_random_part() -> None:
    """With 10 seeds and 15 queries the five bases are not simply the first."""
    oracle = Listing(model(1), 15)
    collect(attack(seeds=10, rounds=6, step=0.07), oracle)
    seeds, new = oracle.images
    distances = (new[:, None] - seeds[None]).abs().flatten(2).amax(2)
    bases = distances.argmin(1)
    assert len(bases.unique()) == 5
    assert bases.max() >= 5


def test_eight_bits() -> None:
    asked = collect(attack(eight_bit=True, rounds=2), Listing(model(1), 16))
    assert asked.dtype == torch.uint8
    assert len(asked) == 16


def test_a_pool_smaller_than_the_seeds() -> None:
    assert len(collect(attack(seeds=100, rounds=2), Listing(model(1), 90), images=5)) == 20


def test_the_label_is_the_victims(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, seen = model(1), []
    plain = JBDA.augment

    def spy(self: JBDA, substitute: nn.Module, points: Tensor, labels: Tensor, step: float) -> Tensor:
        seen.append((points, labels))
        return plain(self, substitute, points, labels, step)

    monkeypatch.setattr(JBDA, "augment", spy)
    for labels in ("soft", "hard"):
        collect(attack(rounds=2), Listing(victim, 16, labels))
    for points, answered in seen:
        assert torch.equal(victim(points).argmax(1), answered)


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


@pytest.mark.parametrize("after", [1, 4, 6, 8])
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, after: int) -> None:
    jbda = attack(rounds=4, training=Recipe(epochs=2, batch_size=16), query_noise=0.01)
    whole = jbda.extract(Listing(model(1), 50), model(2), pool(), Context(generator()))

    calls = 0

    def stop(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    first, second = Listing(model(1), 50), Listing(model(1), 50)
    checkpoint = Always(tmp_path / "state", first)
    with pytest.raises(Stop):
        jbda.extract(first, model(2), pool(), Context(generator(), progress=stop, checkpoint=checkpoint))
    checkpoint = Always(tmp_path / "state", second)
    resumed = jbda.extract(second, model(2), pool(), Context(generator(), checkpoint=checkpoint))
    assert second.asked == 50
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_snapshots_are_of_prefixes() -> None:
    class Keep(NoSnapshots):
        at: tuple[int, ...] = (6, 12)

        def take(self, queries: int, model: nn.Module) -> None:
            taken.append((queries, model))

    taken: list[tuple[int, nn.Module]] = []
    stolen = attack(rounds=2).extract(Listing(model(1), 16), model(2), pool(), Context(generator(), snapshots=Keep()))
    assert [queries for queries, _ in taken] == [6, 12]
    assert all(copied is not stolen for _, copied in taken)
