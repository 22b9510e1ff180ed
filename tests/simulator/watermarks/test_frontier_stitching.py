"""Frontier stitching: the step against a linear model's gradient, true and false adversaries, the paper's threshold."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from simulator.context import Context
from simulator.data.dataset import Dataset, Images
from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.training.predict import predict_labels
from simulator.training.recipe import Recipe
from simulator.watermarks.base import OwnerTask
from simulator.watermarks.frontier_stitching import FrontierStitching, fast_gradient_sign, mismatch_threshold


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(drawn: torch.Generator | None = None) -> Classifier:
    return build("linear", channels=1, size=8, classes=3, mean=[0.5], std=[0.3], generator=drawn or generator(4))


def answered(count: int) -> Images:
    """Random images with the linear model's own answers, but for every tenth, which has another label."""
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator(1))
    labels = predict_labels(linear(), images)
    labels[::10] = (labels[::10] + 1) % 3
    return Images(images, labels)


def test_the_step_of_a_linear_model() -> None:
    model, data = linear(), answered(20)
    moved = fast_gradient_sign(model, data.images, data.labels, 0.1)
    with torch.no_grad():
        slope = (model(data.images).softmax(1) - F.one_hot(data.labels, 3)) @ model.head.weight
        expected = (data.images / 255 + 0.1 * slope.view(-1, 1, 8, 8).sign()).clamp(0, 1).mul(255).round()
    assert torch.equal(moved, expected.to(torch.uint8))


@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_true_adversaries_fool_the_model_and_false_ones_do_not(epsilon: float) -> None:
    model, data = linear(), answered(600)
    true, false = FrontierStitching(key_samples=41, epsilon=epsilon).adversaries(model, data, generator())
    assert (len(true), len(false)) == (20, 21)
    assert (predict_labels(model, true.images) != true.labels).all()
    assert (predict_labels(model, false.images) == false.labels).all()
    for kind in (true, false):
        distances = (kind.images.int()[:, None] - data.images.int()[None]).abs().flatten(2).amax(2)
        origin = distances.argmin(1)
        assert (distances.min(1).values <= round(255 * epsilon)).all()
        assert (distances.min(1).values > 0).all()
        assert torch.equal(kind.labels, data.labels[origin])
        assert (origin % 10 != 0).all()  # only of images that the model answers rightly


def test_as_many_as_there_are() -> None:
    true, false = FrontierStitching(key_samples=40, epsilon=0.5).adversaries(linear(), answered(30), generator())
    assert len(true) == 20
    assert len(false) == 0


def task() -> OwnerTask:
    data = answered(300)
    return OwnerTask(Dataset("noise", 3, data, data, data), Recipe(epochs=1, batch_size=64), linear().eval(), linear)


@pytest.mark.parametrize(("key", "size"), [("true", 10), ("both", 20)])
def test_the_key_and_its_threshold(key: Any, size: int) -> None:
    scheme = FrontierStitching(key_samples=20, key=key, epsilon=0.03, fine_tuning_epochs=1)
    found = scheme.embed(task(), Context(generator()))
    assert len(found.candidates) == size
    assert len(found.triggers) == 20
    assert torch.equal(found.candidates.images, found.triggers[:size])
    assert found.info["true_adversaries"] == found.info["false_adversaries"] == 10
    assert found.info["mismatch_threshold"] == mismatch_threshold(20)
    # an unmarked model misses the true adversaries and knows the false ones
    hits = predict_labels(task().benign, found.candidates.images) == found.candidates.labels
    assert int(hits.sum()) == size - 10


def test_too_small_an_epsilon() -> None:
    with pytest.raises(InputError, match=r"epsilon 0\.001 "):
        FrontierStitching(epsilon=0.001).embed(task(), Context(generator()))


@pytest.mark.parametrize("samples", [1, 4, 5, 20, 100])
def test_the_threshold_is_the_largest_that_is_rare_by_chance(samples: int) -> None:
    def chance(threshold: int) -> float:
        """That a model which misses each with probability 1/2 misses fewer."""
        return float(sum(comb(samples, missed) for missed in range(threshold)) / 2**samples)

    threshold = mismatch_threshold(samples)
    assert chance(threshold) < 0.05 <= chance(threshold + 1)


def test_the_threshold_of_the_paper() -> None:
    assert mismatch_threshold(100) == 42
