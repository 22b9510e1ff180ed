"""Knockoff's strategies: what is drawn from a pool, how often, and what the adaptive one learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulator.attacks.knockoff import Knockoff, augment
from simulator.checkpoint import NO_CHECKPOINT, Checkpoint, State
from simulator.context import Context
from simulator.data.pool import Pool
from simulator.models import build
from simulator.service.oracle import ModelOracle
from simulator.training.recipe import Recipe

SIDE, CLASSES = 8, 10
BRIEF = Recipe(epochs=1, batch_size=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Marked(nn.Module):
    """A linear victim that reads the first ten pixels of the second row, and is sure of the brightest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE, CLASSES, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[torch.arange(CLASSES), SIDE + torch.arange(CLASSES)] = 8.0

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.linear(images.flatten(1))
        return scores


def constructed_pool(informative: int = 3, size: int = 600) -> Pool:
    """Ten arms: one with a bright pixel at one of the victim's places, nine whose noise lies where it does not look."""
    images = torch.zeros(10 * size, 1, SIDE, SIDE, dtype=torch.uint8)
    images[:, :, 4:] = torch.randint(0, 256, (10 * size, 1, 4, SIDE), dtype=torch.uint8, generator=generator(1))
    groups = torch.arange(10 * size) % 10
    chosen = (groups == informative).nonzero().squeeze(1)
    places = SIDE + torch.randint(CLASSES, (len(chosen),), generator=generator(2))
    images.flatten(1)[chosen, places] = 255
    return Pool("constructed", images, groups)


def noise_pool(count: int, groups: int = 4) -> Pool:
    images = torch.randint(0, 256, (count, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator(3))
    return Pool("noise", images, torch.arange(count) % groups)


class Watched(ModelOracle):
    """Keeps what was asked."""

    def __init__(self, budget: int, labels: str = "soft", model: nn.Module | None = None) -> None:
        victim = model or build("linear", channels=1, size=SIDE, classes=CLASSES, generator=generator(4))
        super().__init__(victim, labels=labels, classes=CLASSES, shape=(1, SIDE, SIDE), budget=budget)
        self.batches: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        self.batches.append(images.clone())
        return super().query(images)

    def images(self) -> Tensor:
        return torch.cat(self.batches)


def collect(
    oracle: Watched, pool: Pool, *, seed: int = 0, checkpoint: Checkpoint = NO_CHECKPOINT, **settings: Any
) -> tuple[Tensor, Tensor]:
    surrogate = build("naivenet", channels=1, size=SIDE, classes=CLASSES, generator=generator(5))
    attack = Knockoff(**{"strategy": "adaptive", "training": BRIEF, **settings})
    return attack.collect(
        oracle, surrogate, pool, Context(generator(seed), progress=lambda *_: None, checkpoint=checkpoint)
    )


def index_in(pool: Pool, images: Tensor) -> list[int]:
    places = {row.tobytes(): place for place, row in enumerate(pool.images.numpy())}
    return [places.get(row.tobytes(), -1) for row in images.numpy()]


def shares(oracle: Watched, pool: Pool) -> Tensor:
    drawn = pool.groups[torch.tensor(index_in(pool, oracle.images()))]
    return torch.bincount(drawn, minlength=int(pool.groups.max()) + 1) / len(drawn)


class TestAdaptive:
    @pytest.mark.parametrize("reward", ["certainty", "diversity", "mean"])
    @pytest.mark.parametrize(("pulls", "budget"), [(1, 200), (16, 600), (64, 600)])
    def test_it_finds_the_only_informative_arm_of_ten(self, reward: str, pulls: int, budget: int) -> None:
        pool, oracle = constructed_pool(), Watched(budget, model=Marked())
        collect(oracle, pool, reward=reward, pulls=pulls, surrogate_steps=0)
        share = shares(oracle, pool)
        others = share[torch.arange(10) != 3]
        assert float(share[3]) > 0.4
        assert float(share[3]) > 5 * float(others.max())

    def test_with_hard_labels_the_diversity_finds_it(self) -> None:
        pool, oracle = constructed_pool(), Watched(600, labels="hard", model=Marked())
        collect(oracle, pool, reward="diversity")
        assert float(shares(oracle, pool)[3]) > 0.4

    @pytest.mark.parametrize("reward", ["certainty", "diversity", "loss", "mean"])
    @pytest.mark.parametrize("pulls", [1, 64])
    def test_it_does_not_collapse_where_all_arms_are_equal(self, reward: str, pulls: int) -> None:
        pool, oracle = noise_pool(4000, groups=10), Watched(200 if pulls == 1 else 500)
        collect(oracle, pool, reward=reward, pulls=pulls, surrogate_steps=0)
        share = shares(oracle, pool)
        assert float(share.min()) > 0.02
        assert float(share.max()) < 0.3

    def test_it_climbs_both_levels_of_a_hierarchy(self) -> None:
        pool = constructed_pool()
        parents = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        oracle = Watched(600, model=Marked())
        collect(oracle, Pool("levels", pool.images, pool.groups, parents), reward="diversity")
        share = shares(oracle, pool)
        assert float(share[3]) > 0.4
        assert float(share[:5].sum()) > float(share[5:].sum())

    def test_the_final_training_starts_afresh(self) -> None:
        surrogate = build("naivenet", channels=1, size=SIDE, classes=CLASSES, generator=generator(5))
        start: list[Tensor] = []

        class Noting(Knockoff):
            def train(self, model: nn.Module, *rest: Any, **more: Any) -> nn.Module:
                start.extend(value.clone() for value in model.state_dict().values())
                return super().train(model, *rest, **more)

        before = [value.clone() for value in surrogate.state_dict().values()]
        attack = Noting(strategy="adaptive", training=BRIEF, surrogate_steps=3)
        stolen = attack.extract(Watched(40), surrogate, noise_pool(50), Context(generator()))
        assert all(torch.equal(*pair) for pair in zip(start, before, strict=True))
        assert not all(torch.equal(*pair) for pair in zip(surrogate.state_dict().values(), before, strict=True))
        assert stolen is not surrogate


@pytest.mark.parametrize("strategy", ["random", "adaptive"])
class TestBudget:
    @pytest.mark.parametrize("budget", [1, 7, 33, 50])
    def test_no_image_twice_while_the_pool_lasts(self, strategy: str, budget: int) -> None:
        pool, oracle = noise_pool(50), Watched(budget)
        images, answers = collect(oracle, pool, strategy=strategy, pulls=8)
        assert len(images) == len(answers) == oracle.asked == budget
        assert len(set(index_in(pool, images)) - {-1}) == budget
        assert torch.equal(images, oracle.images())

    def test_without_repeat_the_rest_is_not_spent(self, strategy: str) -> None:
        pool, oracle = noise_pool(50), Watched(120)
        images, _ = collect(oracle, pool, strategy=strategy, pulls=8)
        assert sorted(index_in(pool, images)) == list(range(50))
        assert oracle.remaining == 70

    def test_repeated_passes_are_whole_and_exact(self, strategy: str) -> None:
        pool, oracle = noise_pool(50), Watched(133)
        images, _ = collect(oracle, pool, strategy=strategy, pulls=8, repeat=True, padding=0.0, flip=False)
        places = index_in(pool, images)
        assert oracle.remaining == 0
        assert len(images) == 133
        assert sorted(places[:50]) == sorted(places[50:100]) == list(range(50))
        assert len(set(places[100:])) == 33
        assert places[:50] != places[50:100]

    def test_repeated_images_are_new(self, strategy: str) -> None:
        pool, oracle = noise_pool(50), Watched(150)
        images, _ = collect(oracle, pool, strategy=strategy, pulls=8, repeat=True)
        assert images.dtype == torch.uint8
        places = index_in(pool, images)
        assert sorted(places[:50]) == list(range(50))
        # one place and no flip: one chance in eighteen of the image as it was
        assert places[50:].count(-1) > 75
        assert len({row.tobytes() for row in images.numpy()}) > 120


class Kept:
    """A checkpoint in memory that also restores the oracle's count, as the caller's does."""

    def __init__(self, oracle: Watched) -> None:
        self.oracle, self.state = oracle, dict[str, Any]()
        self.saves = 0

    def due(self) -> bool:
        self.saves += 1
        return self.saves % 3 == 0

    def save(self, state: State) -> None:
        copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        self.state = {**copies, "asked": self.oracle.asked}

    def load(self) -> State | None:
        if not self.state:
            return None
        self.oracle.asked = self.state["asked"]
        return self.state


class Cut(Exception):
    """The interruption."""


class Failing(Watched):
    """Fails at one query."""

    def query(self, images: Tensor) -> Tensor:
        if len(self.batches) == 11:
            raise Cut
        return super().query(images)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_an_interrupted_collection_goes_on_to_the_same_result(labels: str) -> None:
    settings: dict[str, Any] = {"pulls": 8, "repeat": True, "query_noise": 0.1}
    pool = noise_pool(60)
    expected = collect(Watched(150, labels), pool, **settings)
    first = Failing(150, labels)
    kept = Kept(first)
    with pytest.raises(Cut):
        collect(first, pool, checkpoint=kept, **settings)
    kept.oracle = second = Watched(150, labels)
    again = collect(second, pool, seed=99, checkpoint=kept, **settings)
    assert torch.equal(again[0], expected[0])
    assert torch.equal(again[1], expected[1])
    assert second.remaining == 0
    assert len(second.images()) < 150


class TestAugment:
    def test_every_place_and_both_sides(self) -> None:
        image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        image[0, 0, 4, 2] = 200
        result = augment(image.expand(600, -1, -1, -1), 0.125, True, generator())
        assert result.shape == (600, 1, 8, 8)
        assert result.dtype == torch.uint8
        rows = result[:, 0].amax(2).argmax(1).unique().tolist()
        columns = result[:, 0].amax(1).argmax(1).unique().tolist()
        assert (rows, columns) == ([3, 4, 5], [1, 2, 3, 4, 5, 6])

    @pytest.mark.parametrize("shape", [(5, 3, 8, 8), (1, 1, 9, 13), (0, 1, 8, 8)])
    def test_nothing_asked_nothing_done(self, shape: tuple[int, ...]) -> None:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())
        assert torch.equal(augment(images, 0.0, False, generator()), images)
