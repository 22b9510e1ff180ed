"""The same-class coupling loss of DeepTracer (Yang et al., AAAI 2026, Eq. 5 and 6).

    L_cpl   = λ3 · L_intra + λ4 · L_inter
    L_intra = 1/N Σ_i ‖f_i − c_{y_i}‖²
    L_inter = 1/N Σ_i Σ_{j ≠ y_i} max(0, margin − ‖f_i − c_j‖)²

f_i is the model's output (its logits) for sample i, clean and watermark samples alike, and c_j the centroid of class j.
The paper does not say how the centroids come about; the three rules here are the readings. Nor does it say whether
the outputs are normalised (:class:`RelativeMargin` gives the margin a unit) or whether λ4 is there from the start.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from simulator.component import Settings

CentroidRule = Literal["batch", "moving", "learnable"]
Normalisation = Literal["none", "unit"]


class RelativeMargin(Settings):
    """A margin in units of the benign model: ``relative`` times the median distance between two of its class centroids
    on the owner's images. One value then means the same on every net, data set and schedule."""

    relative: float = Field(gt=0)


class CouplingLoss(NamedTuple):
    """The two weighted terms and their sum, scalars. The sum has a rounding of its own."""

    total: Tensor
    intra: Tensor
    inter: Tensor


def coupling_loss(
    outputs: Tensor,
    labels: Tensor,
    centroids: Tensor,
    *,
    margin: float,
    intra_weight: float,
    inter_weight: float,
    present: Tensor | None = None,
) -> CouplingLoss:
    """``intra_weight · L_intra + inter_weight · L_inter`` with no loop over samples or classes.

    Args:
        outputs: ``(N, K)`` float, f_i.
        labels: ``(N,)`` int64, y_i.
        centroids: ``(C, K)`` float, c_j.
        margin: within this distance of another class's centroid a sample is penalised.
        present: ``(C,)`` bool, the classes that have a centroid; the others push nobody. All of them if not given.
    """
    squares = squared_distances(outputs, centroids)
    own = F.one_hot(labels, len(centroids)).to(outputs.dtype)
    others = 1 - own if present is None else (1 - own) * present
    short = (margin - squares.sqrt()).clamp_min(0).square()
    intra, inter = intra_weight * (own * squares).sum(), inter_weight * (others * short).sum()
    return CouplingLoss((intra + inter) / len(outputs), intra / len(outputs), inter / len(outputs))


def squared_distances(outputs: Tensor, centroids: Tensor) -> Tensor:
    """``(N, C)``, at least 1e-12, of outputs ``(N, K)`` from centroids ``(C, K)``."""
    # |f - c|² = |f|² + |c|² - 2 f·c, one small matrix product; clamped, for rounding can take it below zero,
    # and away from zero, where the square root has no gradient
    squares = outputs.square().sum(1, keepdim=True) + centroids.square().sum(1)
    return torch.addmm(squares, outputs, centroids.T, alpha=-2).clamp_min(1e-12)


def share_within(
    outputs: Tensor, labels: Tensor, centroids: Tensor, margin: float, present: Tensor | None = None
) -> float:
    """The share of pairs of a sample and another class's centroid that L_inter penalises, in [0, 1]; 0 of no pairs."""
    others = labels.unsqueeze(1) != torch.arange(len(centroids), device=labels.device)
    others = others if present is None else others & present
    near = (squared_distances(outputs, centroids).sqrt() < margin) & others
    return float(near.sum()) / max(1, int(others.sum()))


class Centroids(nn.Module):
    """The class centroids under one of three rules.

    ``batch``: the mean output of the class in the batch, through which gradients flow; ``moving``: an exponential
    moving average of those means, constant to the gradient; ``learnable``: free parameters, moved by the loss itself.
    """

    def __init__(self, rule: CentroidRule, classes: int, momentum: float) -> None:
        super().__init__()
        self.rule, self.momentum = rule, momentum
        self.values: Tensor
        self.seen: Tensor
        if rule == "learnable":
            self.values = nn.Parameter(torch.zeros(classes, classes))
        else:
            self.register_buffer("values", torch.zeros(classes, classes))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def forward(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The centroids ``(C, K)`` for a batch of outputs ``(N, K)``, and which of them exist (None: all)."""
        if self.rule == "learnable":
            return self.values, None
        members = F.one_hot(labels, len(self.values)).to(outputs.dtype)
        counts = members.sum(0)
        present = counts > 0
        if self.rule == "batch":
            return (members.T @ outputs) / counts.clamp_min(1).unsqueeze(1), present
        means = (members.T @ outputs.detach()) / counts.clamp_min(1).unsqueeze(1)
        # the first mean of a class is taken as it is: an average that starts at zero would pull every class there
        moved = torch.where(self.seen.unsqueeze(1), self.momentum * self.values + (1 - self.momentum) * means, means)
        self.values = torch.where(present.unsqueeze(1), moved, self.values)
        self.seen = self.seen | present
        return self.values, self.seen


def normalised(outputs: Tensor, how: Normalisation) -> Tensor:
    """The outputs ``(N, K)`` as they are, or each scaled to length 1, so that only its direction counts."""
    return F.normalize(outputs, dim=1) if how == "unit" else outputs
