"""The coupling loss (DeepTracer, Eq. 5) against values worked out by hand and against the formula as it is written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simulator.watermarks.parts.coupling import CentroidRule, Centroids, coupling_loss, normalised, share_within


def loss(outputs: Tensor, labels: Tensor, centroids: Tensor, margin: float = 1.0, **settings: object) -> Tensor:
    weights = {"intra_weight": 1.0, "inter_weight": 1.0, **settings}
    return coupling_loss(outputs, labels, centroids, margin=margin, **weights).total  # type: ignore[arg-type]


def as_written(
    outputs: Tensor, labels: Tensor, centroids: Tensor, margin: float, present: Tensor
) -> tuple[float, float]:
    """L_intra and L_inter by two loops, in plain numbers."""
    rows, centres = outputs.tolist(), centroids.tolist()
    intra = inter = 0.0
    for row, label in zip(rows, labels.tolist(), strict=True):
        intra += math.dist(row, centres[label]) ** 2
        for other, centre in enumerate(centres):
            if other != label and present[other]:
                inter += max(0.0, margin - math.dist(row, centre)) ** 2
    return intra / len(rows), inter / len(rows)


class TestByHand:
    """Two samples: (0, 0) of class 0 and (3, 4) of class 1."""

    outputs = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    labels = torch.tensor([0, 1])

    def test_the_distance_to_the_own_centroid_is_squared(self) -> None:
        centroids = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
        # (1² + 2²) / 2
        assert loss(self.outputs, self.labels, centroids, inter_weight=0.0).item() == pytest.approx(2.5)

    def test_nearness_to_another_centroid_is_penalised_below_the_margin(self) -> None:
        # each sample lies on its own centroid, at distance 5 of the other
        centroids = self.outputs
        assert loss(self.outputs, self.labels, centroids, margin=5.0).item() == pytest.approx(0.0, abs=1e-6)
        assert loss(self.outputs, self.labels, centroids, margin=4.0).item() == pytest.approx(0.0, abs=1e-6)
        # (6.5 - 5)² for each of the two
        assert loss(self.outputs, self.labels, centroids, margin=6.5).item() == pytest.approx(2.25)

    def test_every_other_class_counts(self) -> None:
        # (0, 0) is 0.5 short of 1 from class 1, and 0.2 from class 2
        centroids = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.8]])
        first = loss(self.outputs[:1], self.labels[:1], centroids, margin=1.0, intra_weight=0.0)
        assert first.item() == pytest.approx(0.5**2 + 0.2**2)

    def test_the_two_terms_are_weighted(self) -> None:
        centroids = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
        # sample (0, 0): 1² to its own, 3 - 2 short of the other; sample (3, 4): 9 + 4 to its own, 3√2 > 3 to the other
        both = loss(self.outputs, self.labels, centroids, margin=3.0, intra_weight=0.01, inter_weight=3.0)
        assert both.item() == pytest.approx(0.01 * (1 + 13) / 2 + 3.0 * (1 + 0) / 2)
        apart = coupling_loss(self.outputs, self.labels, centroids, margin=3.0, intra_weight=0.01, inter_weight=3.0)
        assert apart.intra.item() == pytest.approx(0.07)
        assert apart.inter.item() == pytest.approx(1.5)

    def test_the_gradient(self) -> None:
        outputs = torch.tensor([[1.0, 0.0]], requires_grad=True)
        centroids = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        loss(outputs, torch.tensor([0]), centroids, margin=3.0).backward()
        assert outputs.grad is not None
        # 2 (f - c_0) = (0, -6); -2 (3 - 1) (f - c_1) / |f - c_1| = (-4, 0)
        torch.testing.assert_close(outputs.grad, torch.tensor([[-4.0, -6.0]]))


@given(
    samples=st.integers(1, 8),
    classes=st.integers(2, 5),
    width=st.integers(1, 5),
    margin=st.floats(0.1, 5.0),
    seed=st.integers(0, 2**31),
)
def test_it_equals_the_formula(samples: int, classes: int, width: int, margin: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(samples, width, generator=generator, dtype=torch.float64) * 2
    centroids = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    present = torch.rand(classes, generator=generator) < 0.7
    for mask in (present, None):
        intra, inter = as_written(outputs, labels, centroids, margin, torch.ones(classes) if mask is None else mask)
        found = loss(outputs, labels, centroids, margin, intra_weight=0.5, inter_weight=2.0, present=mask)
        assert found.item() == pytest.approx(0.5 * intra + 2.0 * inter, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_gradients_are_finite_on_a_centroid(scale: float) -> None:
    """Where a sample lies on a centroid, its own or another's, the distance has no gradient."""
    outputs = (scale * torch.tensor([[1.1, 2.3], [1.1, 2.3], [4.7, 0.3]])).requires_grad_()
    centroids = outputs.detach()[[0, 1, 2]].clone().requires_grad_()
    value = loss(outputs, torch.tensor([0, 1, 2]), centroids, margin=2.0)
    value.backward()
    assert value.isfinite()
    for tensor in (outputs, centroids):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        # a unit vector for each other class, times 2 (margin - 0), shared by the samples
        assert tensor.grad.abs().max() <= 2 * 2 * 2 * 3


def test_an_absent_class_pushes_nobody() -> None:
    outputs, labels = torch.zeros(2, 3), torch.tensor([0, 0])
    centroids = torch.zeros(3, 3)
    assert loss(outputs, labels, centroids, present=torch.tensor([True, False, False])).item() == pytest.approx(0.0)
    pushed = loss(outputs, labels, centroids, present=torch.tensor([True, True, False]))
    # 1e-5: a distance of zero counts as 1e-6
    assert pushed.item() == pytest.approx(1.0, abs=1e-5)


def test_the_share_of_pairs_within_the_margin() -> None:
    outputs, labels = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1])
    centroids = torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 2.0]])
    # (0, 0) is √18 and 2 away from the others', (3, 4) 5 and √13
    shares = [share_within(outputs, labels, centroids, margin) for margin in (1.0, 2.5, 4.0, 4.5, 6.0)]
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]
    # of a class without a centroid nobody is near
    present = torch.tensor([True, True, False])
    assert share_within(outputs, labels, centroids, 4.5, present) == 0.5
    assert share_within(outputs[:1], labels[:1], centroids[:1], 9.0) == 0.0


def test_a_normalised_output_is_its_direction() -> None:
    outputs = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert normalised(outputs, "none") is outputs
    torch.testing.assert_close(normalised(outputs, "unit"), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


class TestCentroids:
    outputs = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 2.0], [0.0, 5.0, 0.0]])
    labels = torch.tensor([0, 0, 1])

    @pytest.mark.parametrize("rule", ["batch", "moving"])
    def test_the_mean_of_each_class_in_the_batch(self, rule: CentroidRule) -> None:
        values, present = Centroids(rule, 3, 0.9)(self.outputs, self.labels)
        assert present is not None
        assert present.tolist() == [True, True, False]
        # the moving average begins with the first mean as it is
        assert values[present].tolist() == [[2.0, 0.0, 1.0], [0.0, 5.0, 0.0]]

    def test_the_moving_average_moves(self) -> None:
        centroids = Centroids("moving", 3, 0.75)
        centroids(self.outputs, self.labels)
        values, present = centroids(torch.tensor([[0.0, 1.0, 4.0], [7.0, 7.0, 7.0]]), torch.tensor([1, 2]))
        assert present is not None
        assert present.all()
        # class 0 was not in the batch and stays; class 1: 3/4 of the old and 1/4 of the new; class 2 is new
        assert values.tolist() == [[2.0, 0.0, 1.0], [0.0, 4.0, 1.0], [7.0, 7.0, 7.0]]

    @pytest.mark.parametrize(("rule", "flows"), [("batch", True), ("moving", False), ("learnable", False)])
    def test_whether_gradients_reach_the_outputs_through_them(self, rule: CentroidRule, flows: bool) -> None:
        outputs = self.outputs.clone().requires_grad_()
        values, _ = Centroids(rule, 3, 0.9)(outputs, self.labels)
        if not flows:
            assert values.grad_fn is None
            return
        values[0].sum().backward()
        assert outputs.grad is not None
        assert outputs.grad.tolist() == [[0.5] * 3, [0.5] * 3, [0.0] * 3]

    def test_learnable_centroids_are_moved_by_the_loss(self) -> None:
        centroids = Centroids("learnable", 3, 0.9)
        values, present = centroids(self.outputs, self.labels)
        assert present is None
        assert [tuple(p.shape) for p in centroids.parameters()] == [(3, 3)]
        loss(self.outputs, self.labels, values, margin=0.5, inter_weight=0.0).backward()
        (moved,) = centroids.parameters()
        assert moved.grad is not None
        # class 0: -2/3 of the sum of its two samples; class 2 has none and is pulled by nobody
        torch.testing.assert_close(moved.grad[0], torch.tensor([-8.0, 0.0, -4.0]) / 3)
        assert moved.grad[2].tolist() == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("rule", ["batch", "moving"])
    def test_the_others_have_nothing_to_learn(self, rule: CentroidRule) -> None:
        assert list(Centroids(rule, 3, 0.9).parameters()) == []
