"""What every registered stealing attack keeps to. They are found in the registry: a new attack needs no edit here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simulator.analysis.agreement import agreement
from simulator.attacks.base import ATTACKS, Attack
from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, State
from simulator.context import NO_SNAPSHOTS, Context, Snapshots
from simulator.data.dataset import DataConfig, Dataset, load
from simulator.data.pool import Pool
from simulator.models import Classifier, build
from simulator.progress import Progress, silent
from simulator.service.oracle import ModelOracle, Oracle
from simulator.service.query import check_images
from simulator.training.fit import fit
from simulator.training.predict import predict, predict_labels
from simulator.training.recipe import Recipe

#: modes of an attack that the contract is checked for beside its defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "knockoff/adaptive": {"strategy": "adaptive", "pulls": 8},
    "knockoff/repeat": {"repeat": True},
    "jbda/reservoir": {"doubling_rounds": 1, "reservoir": 3, "flip_every": 1},
    "activethief/kcenter": {"strategy": "kcenter"},
    "dfme/maze": {"variant": "maze", "directions": 2},
}
NAMES = [*ATTACKS.classes(), *VARIANTS]
CLASSES = 5

#: words in the names of whole-number settings that say how long an attack works
LENGTHS = ("epochs", "steps", "iterations", "rounds")
#: settings, by attack, where making every length short is not enough or not allowed
SHORT: dict[str, dict[str, Any]] = {
    "jbda": {"seeds": 5},  # so that a small budget has rounds
    "jbda/reservoir": {"seeds": 5},
    "dfme": {"training": {"epochs": 2, "batch_size": 4}},  # so that a small budget pays for a step of the generator
    "dfme/maze": {"training": {"epochs": 2, "batch_size": 4}},
}
#: settings, by attack, with which it copies a linear victim
THOROUGH: dict[str, dict[str, Any]] = {
    "activethief": {"selection_training": {"epochs": 3}},
    "activethief/kcenter": {"selection_training": {"epochs": 3}},
    "jbda": {"seeds": 300, "rounds": 2, "round_training": {"epochs": 3}},
    "jbda/reservoir": {"seeds": 300, "reservoir": 300, "round_training": {"epochs": 3}},
}


def shortened(name: str, table: dict[str, dict[str, Any]], others: dict[str, Any], **recipe: Any) -> Attack:
    """The attack with every recipe of training changed by ``recipe``, and other lengths at most its epochs."""
    base = name.split("/")[0]
    fields: dict[str, Any] = {}
    for field, info in ATTACKS.classes()[base].model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, Recipe):
            fields[field] = {**default.model_dump(mode="json"), **recipe}
        elif type(default) is int and any(word in field for word in LENGTHS):
            fields[field] = min(default, recipe["epochs"])
    return ATTACKS.make({"name": base, **fields, **VARIANTS.get(name, {}), **table.get(name, {}), **others})


def quick(name: str, **others: Any) -> Attack:
    return shortened(name, SHORT, others, epochs=2, batch_size=16)


class Account:
    """Counts what is asked, refuses what a service would refuse, and remembers both."""

    def __init__(self, victim: Classifier, labels: str, budget: int) -> None:
        self.spec = victim.spec
        shape = (self.spec.channels, self.spec.size, self.spec.size)
        self.oracle = ModelOracle(victim, labels=labels, classes=self.spec.classes, shape=shape, budget=budget)
        self.asked = 0
        self.refused: list[int] = []

    def query(self, images: Tensor) -> Tensor:
        check_images(images.detach().cpu().numpy(), self.spec.channels, self.spec.size)
        if len(images) > self.oracle.remaining:
            self.refused.append(len(images))
        answers = self.oracle.query(images)
        self.asked += len(images)
        return answers


class BareOracle:
    """The five names of the protocol and no other: whatever else an attack looks for raises AttributeError."""

    __slots__ = ("_account", "classes", "labels", "shape")

    def __init__(self, account: Account) -> None:
        self._account, oracle = account, account.oracle
        self.labels, self.classes, self.shape = oracle.labels, oracle.classes, oracle.shape

    @property
    def remaining(self) -> int:
        return self._account.oracle.remaining

    def query(self, images: Tensor) -> Tensor:
        return self._account.query(images)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(size: int, channels: int, seed: int, architecture: str = "naivenet") -> Classifier:
    return build(architecture, channels=channels, size=size, classes=CLASSES, generator=generator(seed)).eval()


def pool_of(count: int, size: int, channels: int) -> Pool:
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator(7))
    return Pool("noise", images, torch.arange(count) % min(3, count))


def run(
    name: str,
    labels: str,
    *,
    budget: int = 33,
    images: int = 40,
    size: int = 8,
    channels: int = 1,
    architecture: str = "naivenet",
    seed: int = 3,
    progress: Progress = silent,
    snapshots: Snapshots = NO_SNAPSHOTS,
    keep: Callable[[Account], Checkpoint] = lambda _: NO_CHECKPOINT,
    **settings: Any,
) -> tuple[torch.nn.Module, Account]:
    account = Account(model(size, channels, 1), labels, budget)
    stolen = quick(name, **settings).extract(
        BareOracle(account),
        model(size, channels, 2, architecture),
        pool_of(images, size, channels),
        Context(generator(seed), progress=progress, checkpoint=keep(account), snapshots=snapshots),
    )
    return stolen, account


def weights(stolen: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in stolen.state_dict().values()]


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def global_randomness() -> tuple[bytes, object, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


def test_the_bare_oracle_is_an_oracle() -> None:
    bare = BareOracle(Account(model(8, 1, 1), "soft", 3))
    assert isinstance(bare, Oracle)
    with pytest.raises(AttributeError):
        bare.budget  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", ["soft", "hard", "top-2", "round-1"])
def test_a_copy_is_returned_ready_for_use(name: str, labels: str) -> None:
    stolen, account = run(name, labels)
    assert isinstance(stolen, Classifier)
    assert not any(module.training for module in stolen.modules())
    assert all(torch.isfinite(value).all() for value in weights(stolen))
    assert not equal(stolen, model(8, 1, 2))
    assert 0 < account.asked <= 33
    assert account.asked == account.oracle.asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", ["soft", "hard"])
# more images than queries, fewer, as many; one query; and a last batch of one image (17 = 16 + 1)
@pytest.mark.parametrize(("budget", "images"), [(17, 40), (40, 17), (16, 16), (1, 5), (2, 1), (35, 300)])
def test_never_more_than_the_budget(name: str, labels: str, budget: int, images: int) -> None:
    _, account = run(name, labels, budget=budget, images=images)
    assert account.asked <= budget
    assert account.refused == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [8, 16, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_and_number_of_channels(name: str, size: int, channels: int) -> None:
    stolen, account = run(name, "soft", size=size, channels=channels, budget=20)
    assert predict_labels(stolen, pool_of(3, size, channels).images).shape == (3,)
    assert account.asked > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ["naivenet", "vgglike"])  # vgglike drops units at random
def test_the_generator_decides_everything(name: str, architecture: str) -> None:
    before = global_randomness()
    first, _ = run(name, "soft", architecture=architecture, budget=18)
    assert global_randomness() == before
    torch.manual_seed(99)
    second, _ = run(name, "soft", architecture=architecture, budget=18)
    other, _ = run(name, "soft", architecture=architecture, budget=18, seed=4)
    assert equal(first, second)
    assert not equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_pool_and_the_victim_stay_as_they_are(name: str) -> None:
    victim, pool = model(8, 1, 1), pool_of(40, 8, 1)
    kept, images, groups = weights(victim), pool.images.clone(), pool.groups.clone()
    quick(name).extract(BareOracle(Account(victim, "soft", 33)), model(8, 1, 2), pool, Context(generator()))
    assert all(torch.equal(a, b) for a, b in zip(weights(victim), kept, strict=True))
    assert torch.equal(pool.images, images)
    assert torch.equal(pool.groups, groups)


class Stop(Exception):
    """Raised by a listener to interrupt the work."""


def stopping(after: int) -> tuple[Progress, Callable[[], int]]:
    """A listener that raises at its call number ``after``; and how often it was called."""
    calls = []

    def listen(phase: str, done: int, total: int) -> None:
        assert phase
        assert 0 <= done <= total
        calls.append(phase)
        if len(calls) == after:
            raise Stop

    return listen, lambda: len(calls)


@pytest.mark.parametrize("name", NAMES)
def test_a_listener_can_interrupt_it_anywhere(name: str) -> None:
    listen, calls = stopping(after=-1)
    run(name, "soft", progress=listen)
    total = calls()
    assert total >= 2
    before = global_randomness()
    for after in sorted({1, 2, total // 2, total}):
        listen, calls = stopping(after)
        with pytest.raises(Stop):
            run(name, "soft", progress=listen)
        assert calls() == after
    assert global_randomness() == before


class Kept:
    """Checkpoints in memory, one at every step; as the caller's does, it puts back the oracle's count."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.spent = 0
        self.account: Account

    def at(self, account: Account) -> Kept:
        self.account = account
        return self

    def due(self) -> bool:
        return True

    def save(self, state: State) -> None:
        self.state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        self.spent = self.account.oracle.asked

    def load(self) -> State | None:
        if self.state is None:
            return None
        self.account.oracle.asked = self.spent
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_after_interruptions_as_if_there_were_none(name: str) -> None:
    """Interrupted again and again, each time a little later, it still gives the same model."""
    whole, account = run(name, "soft", budget=70, images=90)
    kept, patience = Kept(), 1
    while True:
        listen, calls = stopping(patience)
        try:
            again, last = run(name, "soft", budget=70, images=90, progress=listen, keep=kept.at)
            break
        except Stop:
            patience += 1
            assert calls() < patience < 200
    assert patience > 2
    assert equal(whole, again)
    assert last.oracle.asked == account.asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_noise_on_queries_keeps_them_lawful(name: str, labels: str) -> None:
    stolen, account = run(name, labels, query_noise=0.5)
    assert 0 < account.asked <= 33
    assert not equal(stolen, run(name, labels)[0])


class Taken:
    """Snapshots, with what was asked when they were taken."""

    at: tuple[int, ...] = (2, 10, 20, 1000)

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.models: list[torch.nn.Module] = []

    def take(self, queries: int, model: torch.nn.Module) -> None:
        self.taken.append(queries)
        self.models.append(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_is_taken_at_every_number_that_is_reached(name: str) -> None:
    snapshots = Taken()
    stolen, account = run(name, "soft", snapshots=snapshots)
    assert snapshots.taken == [count for count in snapshots.at if count <= account.asked]
    assert all(isinstance(each, Classifier) for each in snapshots.models)
    assert isinstance(stolen, Classifier)
    assert not any(module.training for module in stolen.modules())


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(DataConfig(name="digits", size=8))


@pytest.fixture(scope="module")
def linear_victim(digits: Dataset) -> Classifier:
    victim = build("linear", channels=1, size=8, classes=10, mean=digits.mean, std=digits.std, generator=generator(1))
    fit(victim, digits.owner.images, digits.owner.labels, Recipe(epochs=20, batch_size=64), Context(generator(1)))
    return victim


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not getattr(ATTACKS.classes()[name.split("/")[0]], "data_free", False)]
)
def test_a_linear_victim_is_copied(name: str, digits: Dataset, linear_victim: Classifier) -> None:
    """A linear model of the same form can equal the victim, and its soft answers lead there: the loss is convex and
    its only optimum is the victim. What is compared are images that neither has seen."""
    owner = digits.owner
    account = Account(linear_victim, "soft", len(owner))
    surrogate = build("linear", channels=1, size=8, classes=10, generator=generator(2))
    recipe = {"epochs": 200, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.01, "decay_at": [0.5, 0.8]}
    attack = shortened(name, THOROUGH, {}, **recipe, decay_factor=0.1)
    pool = Pool("owner", owner.images, owner.labels)
    stolen = attack.extract(BareOracle(account), surrogate, pool, Context(generator()))
    victims, copys = (predict(each, digits.test.images) for each in (linear_victim, stolen))
    assert agreement(victims.argmax(1), copys.argmax(1)) >= 0.99
    # half the sum of differences is the distance of two distributions
    assert (victims - copys).abs().sum(1).mean() / 2 < 0.01
