"""DFME's gradient estimate against the true gradient, and MAZE's settings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.attacks.base import ATTACKS
from simulator.attacks.dfme import DFME, forward_differences, unit_directions
from simulator.attacks.parts.data_free import Theft
from simulator.attacks.parts.generator import ImageGenerator, to_images
from simulator.context import Context
from simulator.models import Classifier, build
from simulator.service.oracle import ModelOracle
from simulator.training.recipe import Recipe

SHAPE = (3, 8, 8)
DIMENSION = 192


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def linear(start: int) -> Classifier:
    return build("linear", channels=3, size=8, classes=4, generator=seed(start)).eval()


def theft(labels: str = "soft") -> Theft:
    victim, student = linear(1), linear(2)
    oracle = ModelOracle(victim, labels=labels, classes=4, shape=SHAPE, budget=10**6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ImageGenerator(SHAPE, latent=4)
    optimizers = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (student, network))
    return Theft(oracle, [student], network, *optimizers, Context(seed(3)), torch.device("cpu"))


def outputs(count: int) -> Tensor:
    """As the generator gives them, channels last in memory."""
    return torch.randn(count, *SHAPE, generator=seed(4)).contiguous(memory_format=torch.channels_last)


def true_slope(points: Tensor, variant: str) -> Tensor:
    """The gradient that only an attacker with the victim's weights could take."""
    points = points.clone().requires_grad_()
    victim, student = linear(1)(to_images(points)), linear(2)(to_images(points))
    if variant == "maze":
        distance = F.kl_div(F.log_softmax(student, 1), victim.softmax(1), reduction="sum")
    else:
        distance = (student - (victim - victim.mean(1, keepdim=True))).abs().mean(1).sum()
    return torch.autograd.grad(distance, points)[0]


def test_an_orthonormal_basis_leaves_nothing_to_chance() -> None:
    gradient = torch.randn(3, 5, generator=seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 5, 5, generator=seed(1), dtype=torch.float64))[0].mT
    at_point = torch.tensor([[1.0], [-2.0], [7.0]], dtype=torch.float64)
    values = torch.cat([at_point, at_point + 0.01 * torch.einsum("bd,bmd->bm", gradient, basis)], 1)
    torch.testing.assert_close(forward_differences(values, basis, 0.01), gradient)


def test_one_direction_is_right_on_average() -> None:
    """E[D (g.u) u] = g for u uniform on the sphere; its deviation in every coordinate is about |g|."""
    gradient = torch.tensor([1.0, -2.0, 0.0, 0.5])
    directions = unit_directions(20_000, 1, 4, seed(0))
    torch.testing.assert_close(directions.norm(dim=2), torch.ones(20_000, 1))
    values = torch.cat([torch.zeros(20_000, 1), directions @ gradient], 1)
    estimates = forward_differences(values, directions, 1.0)
    torch.testing.assert_close(estimates.mean(0), gradient, atol=5 * float(gradient.norm()) / 20_000**0.5, rtol=0)


@pytest.mark.parametrize("variant", ["dfme", "maze"])
def test_answers_alone_give_the_gradient_through_the_victim(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def basis(count: int, directions: int, dimension: int, generator: torch.Generator) -> Tensor:
        return torch.eye(dimension).expand(count, directions, dimension)

    monkeypatch.setattr("simulator.attacks.dfme.unit_directions", basis)
    attack = ATTACKS.make({"name": "dfme", "variant": variant, "directions": DIMENSION})
    assert isinstance(attack, DFME)
    thief, points = theft(), outputs(6)
    estimate, truth = attack._estimated_slope(thief, points), true_slope(points, variant)
    assert estimate.shape == points.shape
    assert thief.oracle.remaining == 10**6 - 6 * (DIMENSION + 1)
    assert F.cosine_similarity(estimate.flatten(1), truth.flatten(1)).min() > 0.99
    torch.testing.assert_close(estimate.norm(), truth.norm(), rtol=0.05, atol=0)


def test_random_directions_point_the_right_way() -> None:
    """With m of D random directions the cosine is about sqrt(m / (m + D))."""
    attack, points = DFME(directions=96), outputs(32)
    estimate = attack._estimated_slope(theft(), points).flatten(1)
    cosines = F.cosine_similarity(estimate, true_slope(points, "dfme").flatten(1))
    assert float(cosines.mean()) == pytest.approx((96 / (96 + DIMENSION)) ** 0.5, abs=0.06)


def test_the_hard_slope_is_the_students_own_with_the_label_held() -> None:
    thief, points = theft("hard"), outputs(6)
    labels = linear(1)(to_images(points)).argmax(1)
    leaf = points.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(linear(2)(to_images(leaf)), labels), leaf)[0]
    torch.testing.assert_close(DFME()._slope_through_student(thief, points), expected)
    assert thief.oracle.remaining == 10**6 - 6
    assert all(parameter.grad is None for parameter in thief.students[0].parameters())


def test_generator_steps_make_the_distance_larger() -> None:
    """Against a student that stands still."""
    thief = theft()
    attack = DFME(directions=8, training=Recipe(batch_size=32))

    def distance() -> float:
        images = thief.images(256)
        return float(attack.distance(thief.students[0](images).detach(), thief.oracle.query(images), "soft").mean())

    before = distance()
    for _ in range(30):
        attack.generator_step(thief)
    assert distance() > before


def test_maze_has_its_own_settings_where_none_are_given() -> None:
    maze = ATTACKS.make({"name": "dfme", "variant": "maze"})
    assert isinstance(maze, DFME)
    assert (maze.directions, maze.replay_steps, maze.schedule, maze.training.batch_size) == (10, 10, "cosine", 128)
    assert DFME(variant="maze", directions=3).directions == 3
    assert DFME(variant="maze", directions=1).directions == 1
    assert ATTACKS.make({"name": "dfme", **maze.params()}) == maze
    assert DFME().directions == 1
