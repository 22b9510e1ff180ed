"""Which classes mosaics are made of, and their label (DeepTracer, Eq. 1 to 4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simulator.data.dataset import Images
from simulator.models import Classifier, build
from simulator.watermarks.parts.selection import (
    adaptive_sources,
    class_centroids,
    least_likely_target,
    representative_classes,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_centroids_are_means() -> None:
    features = torch.tensor([[1.0, 2.0], [10.0, 0.0], [3.0, 6.0], [-4.0, 1.0]])
    found = class_centroids(features, torch.tensor([0, 2, 0, 2]), 4)
    assert found.tolist() == [[2.0, 4.0], [0.0, 0.0], [3.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
def test_one_class_of_each_cluster_the_one_nearest_to_its_centre(seed: int) -> None:
    # four clusters of three classes in a row, the middle one of which is the centre; and one class all alone
    corners = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    offsets = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    centroids = torch.cat([(corners[:, None] + offsets).reshape(12, 2), torch.tensor([[500.0, 500.0]])])
    assert set(representative_classes(centroids, 5, seed)) == {1, 4, 7, 10, 12}
    assert set(representative_classes(centroids[:12], 4, seed)) == {1, 4, 7, 10}


def test_ties_go_to_the_lower_class_and_the_order_is_ascending() -> None:
    """Both classes of a pair are equally far from its centre; rounding must not choose between them."""
    generator_ = generator(5)
    corners = 1000 * torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    for _ in range(5):
        offset = torch.randn(3, 2, generator=generator_)
        centroids = torch.cat([corners + offset, (corners - offset).flip(0)])
        assert representative_classes(centroids, 3, seed=1) == (0, 1, 2)


def test_the_same_seed_selects_the_same() -> None:
    centroids = torch.randn(30, 8, generator=generator())
    first = representative_classes(centroids, 6, seed=2**62 + 5)
    assert first == representative_classes(centroids, 6, seed=2**62 + 5)
    assert len(set(first)) == 6


def test_features_are_the_benign_models() -> None:
    """Pixels are the features of a linear model: classes of equal brightness cluster."""
    shades = torch.tensor([0, 4, 8, 120, 124, 128], dtype=torch.uint8)
    labels = torch.arange(6).repeat(3)
    data = Images(shades[labels][:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)
    benign = build("linear", channels=1, size=8, classes=6, generator=generator())
    assert set(adaptive_sources(benign, data, 6, 2, generator(1))) == {1, 4}


def benign_with(probabilities: list[float]) -> Classifier:
    """A model that gives every image these probabilities."""
    model = build("linear", channels=1, size=8, classes=len(probabilities), generator=generator())
    with torch.no_grad():
        nn.init.zeros_(model.head.weight)
        model.head.bias.copy_(torch.tensor(probabilities).log())
    return model


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [((), 2), ((2,), 0), ((0, 2), 4), ((0, 1, 2, 4), 3)],
)
def test_the_target_is_the_least_likely_class(excluded: tuple[int, ...], expected: int) -> None:
    mosaics = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    assert least_likely_target(benign_with([0.1, 0.3, 0.05, 0.4, 0.15]), mosaics, excluded) == expected


def test_probabilities_are_averaged_and_not_logits() -> None:
    """Class 0 is certain on one image in two and class 1 never likely: the mean of class 1's logits is higher."""
    model = build("linear", channels=1, size=8, classes=3, mean=(0.0,), std=(1.0,), generator=generator())
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    mosaics = torch.cat([white, torch.zeros_like(white)])
    logits: Tensor = torch.tensor([[0.0, -2.0, 0.0], [-9.0, -2.0, 0.0]])  # on white, on black
    with torch.no_grad():
        model.head.bias.copy_(logits[1])
        model.head.weight.copy_(((logits[0] - logits[1]) / 64)[:, None].expand(3, 64))
    assert logits.mean(0).argmin() == 0
    assert least_likely_target(model, mosaics, ()) == 1
