"""What every data-free attack keeps to: exact query counts, resuming bit for bit, snapshots, replay, logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simulator.analysis.agreement import agreement
from simulator.attacks.base import ATTACKS
from simulator.attacks.parts.data_free import SMALL, DataFreeAttack, Replay, recover_logits
from simulator.checkpoint import FileCheckpoint, State
from simulator.context import Context
from simulator.data.dataset import DataConfig, load
from simulator.data.pool import Pool
from simulator.models import Classifier, build
from simulator.service.oracle import ModelOracle
from simulator.training.fit import fit
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe

POOL = Pool("unused", torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
NAMES = ["dfme", "disguide"]


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def model(start: int, architecture: str = "naivenet", channels: int = 1) -> Classifier:
    return build(architecture, channels=channels, size=8, classes=5, generator=seed(start))


def attack(name: str, **fields: Any) -> DataFreeAttack:
    training = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4, "decay_at": [0.5], "decay_factor": 0.3}
    made = ATTACKS.make({"name": name, "training": training, "latent": 8, **fields})
    assert isinstance(made, DataFreeAttack)
    return made


class Counting(ModelOracle):
    """Keeps the sizes of its queries."""

    def __init__(self, labels: str, budget: int, channels: int = 1) -> None:
        super().__init__(model(1, channels=channels), labels=labels, classes=5, shape=(channels, 8, 8), budget=budget)
        self.sizes: list[int] = []

    def query(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        self.sizes.append(len(images))
        return super().query(images)


def weights(stolen: nn.Module) -> list[Tensor]:
    return [value.clone() for value in stolen.state_dict().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "labels", "fields", "iteration"),
    [
        ("dfme", "soft", {}, [8, 4, 4, 4, 4, 4]),
        ("dfme", "soft", {"directions": 3, "student_steps": 2, "generator_steps": 2}, [16, 16, 4, 4]),
        ("dfme", "soft", {"variant": "maze", "student_steps": 1}, [44, 4]),
        ("dfme", "hard", {"directions": 3}, [4, 4, 4, 4, 4, 4]),
        ("disguide", "soft", {"student_steps": 2}, [4, 4]),
        ("disguide", "hard", {}, [4]),
    ],
)
def test_an_iteration_asks_what_it_should(name: str, labels: str, fields: dict[str, Any], iteration: list[int]) -> None:
    oracle = Counting(labels, 2 * sum(iteration))
    attack(name, **fields).extract(oracle, model(2), POOL, Context(seed(0)))
    assert oracle.sizes == 2 * iteration


@pytest.mark.parametrize(
    ("name", "labels", "iteration"), [("dfme", "soft", 16), ("dfme", "hard", 12), ("disguide", "hard", 4)]
)
def test_the_whole_budget_is_spent_whatever_remains(name: str, labels: str, iteration: int) -> None:
    thief = attack(name, student_steps=1 if name == "disguide" else 2, replay_steps=0)
    for budget in (1, 2, 3, *range(iteration, 2 * iteration)):
        oracle = Counting(labels, budget)
        thief.extract(oracle, model(2), POOL, Context(seed(0)))
        assert sum(oracle.sizes) == oracle.asked == budget
        assert budget == 1 or min(oracle.sizes) >= 2


def test_what_no_iteration_can_pay_for_goes_to_the_student() -> None:
    oracle = Counting("soft", 28 + 13)
    attack("dfme").extract(oracle, model(2), POOL, Context(seed(0)))
    assert oracle.sizes == [8, 4, 4, 4, 4, 4, 4, 4, 5]


def test_the_rates_fall_with_the_share_of_the_budget_spent() -> None:
    thief = attack("dfme", student_steps=1, generator_steps=0)
    cosine = attack("dfme", student_steps=1, generator_steps=0, schedule="cosine")
    rates: dict[DataFreeAttack, list[float]] = {thief: [], cosine: []}
    for each, found in rates.items():

        class Watched(type(each)):  # type: ignore[misc]
            def _set_rates(self, theft: Any, spent: float, found: list[float] = found) -> None:
                super()._set_rates(theft, spent)
                found.append(theft.student_optimizer.param_groups[0]["lr"])

        Watched.model_construct(**each.__dict__).extract(Counting("soft", 16), model(2), POOL, Context(seed(0)))
    assert rates[thief] == pytest.approx([0.1, 0.1, 0.03, 0.03])
    assert rates[cosine] == pytest.approx([0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2])


class Stop(Exception):
    """Interrupts the work."""


class CountingCheckpoint(FileCheckpoint):
    """Saves after every ``every``-th iteration, with the oracle's count beside the attack's state."""

    def __init__(self, path: Path, oracle: ModelOracle, every: int) -> None:
        super().__init__(path)
        self.oracle, self.every, self.iterations = oracle, every, 0

    def due(self) -> bool:
        self.iterations += 1
        return self.iterations % self.every == 0

    def save(self, state: State) -> None:
        super().save({**state, "asked": self.oracle.asked})

    def load(self) -> State | None:
        state = super().load()
        if state is not None:
            self.oracle.asked = int(state.pop("asked"))
        return state


@pytest.mark.parametrize(
    ("name", "labels", "architecture", "channels", "optimizer"),
    [
        ("dfme", "soft", "naivenet", 1, "sgd"),
        ("dfme", "hard", "naivenet", 3, "adam"),
        ("dfme", "soft", "vgglike", 1, "adam"),  # drops units at random
        ("disguide", "soft", "naivenet", 3, "sgd"),
        ("disguide", "hard", "naivenet", 1, "adam"),
    ],
)
def test_it_resumes_bit_for_bit(
    name: str, labels: str, architecture: str, channels: int, optimizer: str, tmp_path: Path
) -> None:
    training = {"optimizer": optimizer, "learning_rate": 0.01, "batch_size": 4}
    thief = attack(name, training=training, student_steps=2, replay_steps=1)
    budget = 6 * 16 + 7

    def steal(oracle: Counting, **fields: Any) -> list[Tensor]:
        surrogate = model(2, architecture, channels)
        return weights(thief.extract(oracle, surrogate, POOL, Context(seed(5), **fields)))

    whole = steal(Counting(labels, budget, channels))

    def interrupt(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Stop

    calls = 0
    path = tmp_path / "state.safetensors"
    first = Counting(labels, budget, channels)
    with pytest.raises(Stop):
        steal(first, progress=interrupt, checkpoint=CountingCheckpoint(path, first, every=2))
    second = Counting(labels, budget, channels)
    resumed = steal(second, checkpoint=CountingCheckpoint(path, second, every=3))
    assert sum(second.sizes) < second.asked == budget
    assert equal(whole, resumed)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_everything_and_nothing_else_moves(name: str) -> None:
    before = torch.get_rng_state()
    results = []
    for start in (0, 0, 1):
        results.append(weights(attack(name).extract(Counting("soft", 50), model(2), POOL, Context(seed(start)))))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before)


class Album:
    """Snapshots with the weights as they were, and how much had been asked."""

    def __init__(self, oracle: ModelOracle, *at: int) -> None:
        self.oracle, self.at = oracle, at
        self.taken: list[tuple[int, int, list[Tensor]]] = []

    def take(self, queries: int, model: nn.Module) -> None:
        assert not model.training
        self.taken.append((queries, self.oracle.asked, weights(model)))


def test_snapshots_are_taken_in_run_and_change_nothing() -> None:
    bare, oracle = Counting("soft", 60), Counting("soft", 60)
    album = Album(oracle, 5, 28, 60, 61)
    stolen = attack("dfme").extract(oracle, model(2), POOL, Context(seed(0), snapshots=album))
    assert [(queries, asked) for queries, asked, _ in album.taken] == [(5, 12), (28, 28), (60, 60)]
    assert not equal(album.taken[0][2], album.taken[1][2])
    assert equal(album.taken[2][2], weights(stolen))
    assert equal(weights(stolen), weights(attack("dfme").extract(bare, model(2), POOL, Context(seed(0)))))


def test_adversarial_training_changes_what_is_learnt() -> None:
    recipe = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4}
    plain, adversarial = (
        weights(
            attack("dfme", training={**recipe, "adversarial_epsilon": epsilon}).extract(
                Counting("soft", 28), model(2), POOL, Context(seed(0))
            )
        )
        for epsilon in (0.0, 0.1)
    )
    assert not equal(plain, adversarial)
    assert all(value.isfinite().all() for value in adversarial)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", ["soft", "hard", "top-2", "round-1"])
def test_noise_on_the_queries_keeps_them_valid_and_changes_what_is_learnt(name: str, labels: str) -> None:
    plain, noisy = (
        weights(attack(name, query_noise=noise).extract(Counting(labels, 30), model(2), POOL, Context(seed(0))))
        for noise in (0.0, 0.2)
    )
    assert not equal(plain, noisy)
    assert all(value.isfinite().all() for value in noisy)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=8))
def test_logits_are_recovered_but_for_their_mean(values: list[float]) -> None:
    logits = torch.tensor([values])
    recovered = recover_logits(logits.softmax(1))
    torch.testing.assert_close(recovered, logits - logits.mean(), atol=1e-4, rtol=1e-4)


def test_a_zero_is_read_as_the_least_probability() -> None:
    row = torch.tensor([[1.0, 0.0]])
    assert recover_logits(row).isfinite().all()
    expected = torch.tensor([[0.5, -0.5]]) * -torch.tensor(SMALL).log()
    torch.testing.assert_close(recover_logits(row, SMALL), expected)


def test_replay_keeps_the_last_images_with_their_answers() -> None:
    replay = Replay(5, (1, 1, 1), 2)
    numbers = torch.arange(8, dtype=torch.float32)
    for part in numbers.split(3):
        replay.add(part.view(-1, 1, 1, 1) / 255, torch.stack([part, -part], 1))
    assert len(replay) == 5
    images, answers = replay.sample(200, seed(0))
    assert set(images.flatten().tolist()) == {3, 4, 5, 6, 7}
    assert torch.equal(images.flatten().float(), answers[:, 0])
    copy = Replay(5, (1, 1, 1), 2)
    copy.restore(replay.state())
    assert torch.equal(copy.sample(50, seed(1))[0], replay.sample(50, seed(1))[0])


@pytest.mark.parametrize(("name", "budget"), [("dfme", 12_000), ("disguide", 4_000)])
def test_a_linear_victim_is_copied(name: str, budget: int) -> None:
    digits = load(DataConfig(name="digits", size=8))
    victim = build("linear", channels=1, size=8, classes=10, mean=digits.mean, std=digits.std, generator=seed(1))
    fit(victim, digits.owner.images, digits.owner.labels, Recipe(epochs=20, batch_size=64), Context(seed(1)))
    surrogate = build("linear", channels=1, size=8, classes=10, generator=seed(2))
    training = {"batch_size": 64, "learning_rate": 0.01, "decay_at": [0.5, 0.8], "decay_factor": 0.1}
    oracle = ModelOracle(victim, labels="soft", classes=10, shape=(1, 8, 8), budget=budget)
    thief = ATTACKS.make({"name": name, "training": training})
    stolen = thief.extract(oracle, surrogate, POOL, Context(seed(0)))
    assert agreement(*(predict_labels(each, digits.test.images) for each in (victim, stolen))) >= 0.95
