"""DisGUIDE's two terms in closed form, and what the generator makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from simulator.attacks.disguide import DisGUIDE, disagreement, diversity
from simulator.attacks.parts.data_free import Theft
from simulator.attacks.parts.generator import ImageGenerator
from simulator.context import Context
from simulator.models import build
from simulator.service.oracle import ModelOracle
from simulator.training.recipe import Recipe


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def test_disagreement_is_the_mean_standard_deviation() -> None:
    first, second = torch.randn(2, 7, 4, generator=seed(0)).softmax(2)
    torch.testing.assert_close(disagreement(first, second), torch.stack([first, second]).std(0).mean())
    assert disagreement(first, first) == 0


def test_diversity_is_the_entropy_of_the_batch() -> None:
    everything, one = torch.eye(4), torch.eye(4)[:1].expand(4, 4)
    assert float(diversity(everything, everything)) == pytest.approx(math.log(4))
    assert float(diversity(one, one)) == 0
    assert float(diversity(one, everything)) < math.log(4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_generator_seeks_disagreement_and_all_classes_and_asks_nothing(weight: float) -> None:
    victim, *students = (build("linear", channels=1, size=8, classes=4, generator=seed(start)) for start in range(3))
    oracle = ModelOracle(victim, labels="hard", classes=4, shape=(1, 8, 8), budget=100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageGenerator((1, 8, 8), latent=8)
    parameters = [parameter for student in students for parameter in student.parameters()]
    optimizers = torch.optim.SGD(parameters, lr=0.1), torch.optim.Adam(network.parameters(), lr=1e-3)
    theft = Theft(oracle, list(students), network, *optimizers, Context(seed(3)), torch.device("cpu"), budget=100)
    attack = DisGUIDE(diversity_weight=weight, training=Recipe(batch_size=64))

    def gain() -> float:
        images = theft.images(256)
        first, second = (student(images).detach().softmax(1) for student in students)
        return float(disagreement(first, second) + weight * diversity(first, second))

    before = gain()
    for _ in range(20):
        attack.generator_step(theft)
    assert gain() > before
    assert oracle.asked == theft.asked == 0
    assert all(parameter.grad is None for parameter in parameters)
    assert all(student.training for student in students)
