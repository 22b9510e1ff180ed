"""Signed steps against gradients that are known in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.models import Classifier, build
from simulator.training.recipe import Recipe, recipe_objective
from simulator.training.signed import adversarial_mean, ascend, ascend_loss, slope_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> Classifier:
    return build("linear", channels=1, size=8, classes=3, mean=[0.4], std=[0.3], generator=generator(4))


def by_hand(model: Classifier, images: Tensor, labels: Tensor, steps: int, step: float) -> Tensor:
    """The ascent from the closed-form gradient ``W.T (softmax(z) - onehot(y)) / std``."""
    for _ in range(steps):
        with torch.no_grad():
            slope = (model(images).softmax(1) - F.one_hot(labels, 3)) @ model.head.weight
            images = (images + step * slope.view_as(images).sign()).clamp(0, 1)
    return images


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_ascent_of_a_linear_model(steps: int) -> None:
    model, images = linear().train(), torch.rand(6, 1, 8, 8, generator=generator())
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    moved = ascend_loss(model, images, labels, 1 / 255, steps=steps)
    torch.testing.assert_close(moved, by_hand(model, images, labels, steps, 1 / 255))
    assert (moved - images).abs().max() <= steps / 255 + 1e-6  # no projection onto a ball is needed
    if steps:
        assert F.cross_entropy(model(moved), labels) > F.cross_entropy(model(images), labels)
    assert not moved.requires_grad
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_ascent_stays_among_images() -> None:
    images = torch.randint(0, 2, (4, 1, 8, 8), generator=generator()).float()
    moved = ascend_loss(linear(), images, torch.zeros(4, dtype=torch.int64), 0.4, steps=3)
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_a_step_goes_up_a_score_or_down() -> None:
    weights, images = torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.5, 0.05, 0.5]).view(1, 3, 1, 1)

    def score(batch: Tensor) -> Tensor:
        return (weights * batch).sum()

    assert torch.equal(slope_of(score, images), weights)
    torch.testing.assert_close(ascend(score, images, 0.2).flatten(), torch.tensor([0.7, 0.0, 0.5]))
    torch.testing.assert_close(ascend(score, images, -0.2).flatten(), torch.tensor([0.3, 0.25, 0.5]))
    torch.testing.assert_close(ascend(score, images, 0.2, clip=False).flatten(), torch.tensor([0.7, -0.15, 0.5]))
    torch.testing.assert_close(ascend(score, images, 0.2, steps=4).flatten(), torch.tensor([1.0, 0.0, 0.5]))
    assert images.flatten().tolist() == pytest.approx([0.5, 0.05, 0.5])


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_a_loss_is_averaged_with_that_of_examples(epsilon: float) -> None:
    model, images, labels = linear(), torch.rand(5, 1, 8, 8, generator=generator()), torch.tensor([0, 1, 2, 0, 1])
    found = adversarial_mean(lambda batch: F.cross_entropy(model(batch), labels), images, epsilon)
    moved = by_hand(model, images, labels, 1, epsilon)
    expected = (F.cross_entropy(model(images), labels) + F.cross_entropy(model(moved), labels)) / 2
    torch.testing.assert_close(found, expected)
    by_recipe = recipe_objective(Recipe(adversarial_epsilon=epsilon))(model, images, labels)
    assert torch.equal(by_recipe, found)
    found.backward()
    assert model.head.weight.grad is not None
    assert not images.requires_grad
