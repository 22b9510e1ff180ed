"""PRADA against the plain reading of its algorithm, and on samples whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm, shapiro
from torch import Tensor

from simulator.data.dataset import DataConfig, load
from simulator.detectors.base import Watch
from simulator.detectors.prada import PRADA, normality, within


def literally(images: Tensor, labels: Tensor, rule: PRADA) -> tuple[int | None, float | None]:
    """The algorithm as it is written down: one query after the other, every distance anew."""
    rows = images.flatten(1).double().numpy() / (255 if images.dtype == torch.uint8 else 1)
    kept: dict[int, list[NDArray[np.float64]]] = {}
    entered: dict[int, list[float]] = {}
    threshold: dict[int, float] = {}
    distances: dict[int, list[float]] = {}
    least = None
    for number, (row, label) in enumerate(zip(rows, labels.tolist(), strict=True), start=1):
        if label not in kept:
            kept[label], entered[label], threshold[label], distances[label] = [row], [0.0], 0.0, []
        else:
            nearest = min(float(np.linalg.norm(row - other)) for other in kept[label])
            distances[label].append(nearest)
            if nearest > threshold[label]:
                kept[label].append(row)
                entered[label].append(nearest)
                threshold[label] = max(threshold[label], float(np.mean(entered[label]) - np.std(entered[label])))
        if number % rule.every:
            continue
        found = np.array(
            [each for several in distances.values() if len(several) >= rule.class_least for each in several]
        )
        if len(found):
            found = found[np.abs(found - found.mean()) <= rule.outliers * found.std()]
        if len(found) > rule.start:
            statistic = float(shapiro(found).statistic) if found.min() < found.max() else 0.0
            least = statistic if least is None else min(least, statistic)
            if statistic < rule.delta:
                return number, least
    return None, least


def asked(watch: Watch, images: Tensor, labels: Tensor, chunk: int = 10**9) -> Watch:
    for part, classes in zip(images.split(chunk), labels.split(chunk), strict=True):
        watch.see(part, classes)
    return watch


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 30]), st.sampled_from([torch.uint8, torch.float32]), st.booleans())
def test_it_finds_what_the_algorithm_finds_when_it_is_followed_to_the_letter(
    seed: int, classes: int, dtype: torch.dtype, repeated: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (120, 1, 2, 2), dtype=torch.uint8, generator=generator)
    if repeated:
        images[60:90] = images[:30]
    images = images if dtype == torch.uint8 else images / 255
    labels = torch.randint(classes, (120,), generator=generator)
    rule = PRADA(delta=0.9, start=20, every=7, outliers=2.0, class_least=4)
    when, least = literally(images, labels, rule)
    for chunk in (1, 32, 120):
        watch = asked(rule.watch(), images, labels, chunk)
        assert (watch.detected_at, watch.queries) == (when, 120)
        assert watch.statistic == (least if least is None else pytest.approx(least, abs=1e-9))


def line(distances: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Queries of one class, each so far from all before it: points on axes of their own.

    The n-th lies on the n-th axis at the height at which its distance to the origin, the first query, is wanted; every
    other earlier query is farther.
    """
    images = torch.zeros(len(distances) + 1, len(distances))
    images[torch.arange(1, len(distances) + 1), torch.arange(len(distances))] = torch.from_numpy(distances).float()
    return images[:, None, None, :], torch.zeros(len(images), dtype=torch.int64)


@pytest.mark.parametrize("seed", range(3))
def test_normally_distributed_distances_are_no_attack(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(300)
    # the distances to the origin are all at least the least, so the nearest is the origin: sqrt(a² + b²) > a
    distances = norm.ppf((np.arange(300) + 0.5) / 300, loc=0.6, scale=0.05)[order]
    watch = asked(PRADA(delta=0.95).watch(), *line(distances))
    assert watch.detected_at is None
    assert watch.statistic is not None
    assert watch.statistic > 0.95


def test_queries_stepped_from_one_another_are_noticed_soon_after_they_begin() -> None:
    """As Jacobian-based augmentation makes them: all at one distance from natural images."""
    test = load(DataConfig(name="digits")).test
    natural, labels = test.images[:150].float() / 255, test.labels[:150]
    steps = torch.randint(2, natural.shape, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    watch = PRADA(delta=0.9).watch()
    asked(watch, natural, labels)
    assert watch.detected_at is None
    asked(watch, natural + steps, labels)
    assert watch.detected_at is not None
    assert 150 < watch.detected_at <= 250
    assert watch.queries == 300
    assert watch.statistic is not None
    assert watch.statistic < 0.9


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_one_query_asked_again_and_again_is_noticed_at_the_first_look(dtype: torch.dtype) -> None:
    image = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    image = image if dtype == torch.uint8 else image / 255
    watch = asked(PRADA().watch(), image.repeat(200, 1, 1, 1), torch.zeros(200, dtype=torch.int64))
    # the first has no distance, and a hundred are too few
    assert watch.detected_at == 110
    assert watch.statistic == 0


def test_differences_of_a_thousandth_are_told_from_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(150, 1, 28, 28, generator=generator)
    direction = torch.randn(base.shape, generator=generator)
    near = base + 1e-3 * direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    watch = PRADA(delta=0.01, start=10, every=1).watch()
    labels = torch.zeros(300, dtype=torch.int64)
    asked(watch, torch.cat([base, near]), labels, 64)
    distances = watch._distances[-150:]  # type: ignore[attr-defined]
    np.testing.assert_allclose(distances, 1e-3, rtol=1e-2)


def test_after_the_alarm_queries_are_only_counted_and_nothing_is_kept() -> None:
    watch = PRADA().watch()
    asked(watch, torch.zeros(500, 1, 2, 2), torch.zeros(500, dtype=torch.int64))
    assert (watch.detected_at, watch.queries) == (110, 500)
    assert watch._classes == {}  # type: ignore[attr-defined]
    watch.see(torch.rand(7, 1, 2, 2), torch.arange(7))
    assert (watch.detected_at, watch.queries) == (110, 507)


def test_the_statistic_has_no_unit() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=200)
    assert normality(values) == pytest.approx(normality(1000 * values), abs=1e-9)
    assert normality(np.full(50, 3.0)) == 0
    assert normality(norm.ppf((np.arange(6000) + 0.5) / 6000)) > 0.999


def test_values_at_the_rim_are_within() -> None:
    assert within(np.full(4, 2.0), 3.0).tolist() == [2.0] * 4
    assert within(np.array([0.0] * 99 + [100.0]), 3.0).tolist() == [0.0] * 99
