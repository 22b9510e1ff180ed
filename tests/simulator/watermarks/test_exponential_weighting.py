"""Exponential weighting: its closed form, what the delivered victim computes, which images are its key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simulator.checkpoint import State
from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.models import build
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.exponential_weighting import ExponentialWeighting, exponentially_weighted
from simulator.watermarks.parts.reparametrised import Reparametrised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestClosedForm:
    def test_by_hand(self) -> None:
        found = exponentially_weighted(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), 2.0)
        expected = [[math.exp(-2), -2.0], [0.5 * math.exp(-3), 0.0]]
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_it_cannot_overflow(self) -> None:
        found = exponentially_weighted(torch.tensor([1000.0, -999.0]), 50.0)
        torch.testing.assert_close(found, torch.tensor([1000.0, -999.0 * math.exp(-50)]))

    @given(st.floats(0.01, 10), st.integers(0, 2**32))
    def test_order_and_signs_stay_and_the_largest_is_kept(self, temperature: float, seed: int) -> None:
        weight = torch.randn(5, 4, generator=generator(seed))
        found = exponentially_weighted(weight, temperature)
        assert (found.sign() == weight.sign()).all()
        assert (found.abs() <= weight.abs()).all()
        assert found.abs().argmax() == weight.abs().argmax()
        assert found.abs().max() == weight.abs().max()

    def test_its_gradient(self) -> None:
        weight = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda tensor: exponentially_weighted(tensor, 2.0), (weight,))


def task() -> OwnerTask:
    drawn = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator())
    owner = Images(drawn, torch.arange(60) % 3)
    return OwnerTask(
        Dataset("noise", 3, owner, owner, owner),
        Recipe(epochs=2, batch_size=16),
        build("linear", channels=1, size=8, classes=3, generator=generator()),
        lambda given: build("naivenet", channels=1, size=8, classes=3, generator=given),
    )


class Memory:
    """Keeps the last state as it is."""

    state: State | None = None

    def load(self) -> State | None:
        return self.state

    def due(self) -> bool:
        return True

    def save(self, state: State) -> None:
        self.state = state


def test_the_victim_holds_the_weighted_weights() -> None:
    memory, given = Memory(), task()
    scheme = ExponentialWeighting(key_samples=5, temperature=3.0, embedding_epochs=3)
    found = scheme.embed(given, Context(generator(1), checkpoint=memory))
    assert memory.state is not None
    assert memory.state["epoch"] == 3
    trained = given.build(generator())
    prefix = "model.module."
    trained.load_state_dict({k.removeprefix(prefix): v for k, v in memory.state.items() if k.startswith(prefix)})
    trained.eval()
    images = given.dataset.test.images[:9]
    weighted = Reparametrised(trained, lambda _, weight: exponentially_weighted(weight, 3.0))
    torch.testing.assert_close(found.model(images), weighted(images))
    assert not torch.allclose(found.model(images), trained(images))
    # the key's rows are training images with other labels
    rows = found.info["owner_rows"]
    assert torch.equal(found.candidates.images, given.dataset.owner.images[rows])
    assert (found.candidates.labels != given.dataset.owner.labels[rows]).all()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_it_goes_on_where_it_was_interrupted(stop: int) -> None:
    class Interrupted(Exception):
        pass

    told: list[str] = []

    def listen(phase: str, done: int, total: int) -> None:
        told.append(phase)
        if len(told) == stop:
            raise Interrupted

    scheme, memory = ExponentialWeighting(key_samples=5), Memory()
    whole = scheme.embed(task(), Context(generator(2)))
    with pytest.raises(Interrupted):
        scheme.embed(task(), Context(generator(2), listen, memory))
    resumed = scheme.embed(task(), Context(generator(2), listen, memory))
    assert told == ["clean", "clean", "embed", "embed"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
