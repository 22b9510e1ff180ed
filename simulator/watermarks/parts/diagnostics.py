"""Whether DeepTracer's coupling loss is at work: what it pulled at in training, and what it has left of the geometry.

Nothing here draws a random number or changes a weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simulator.watermarks.parts.selection import class_centroids

#: the terms of Eq. 6, each with its weights
TERMS = ("primary", "watermark", "intra", "inter")
#: steps of training for one at which gradients are measured; four backward passes more on each cost 2 to 4 %
EVERY = 100
#: below this share of pairs within the margin the loss has nothing to push: one pair in a thousand
INACTIVE = 0.001


class Course(nn.Module):
    """Notes of a training, in buffers, so that they stand in its checkpoint: steps, gradients, pairs within the margin.

    Args:
        phases: of the training.
    """

    def __init__(self, phases: int) -> None:
        super().__init__()
        self.steps: Tensor
        self.samples: Tensor
        self.norms: Tensor
        self.within: Tensor
        self.register_buffer("steps", torch.zeros(phases, dtype=torch.int64))
        self.register_buffer("samples", torch.zeros(phases, dtype=torch.int64))
        self.register_buffer("norms", torch.zeros(phases, len(TERMS), dtype=torch.float64))
        self.register_buffer("within", torch.zeros(phases, dtype=torch.float64))

    @property
    def step(self) -> int:
        """Steps so far, of all phases."""
        return int(self.steps.sum())

    def due(self, phase: int) -> bool:
        """Counts a step of a phase (from 0); says whether it is one to measure. The first is the 26th."""
        self.steps[phase] += 1
        return int(self.steps[phase]) % EVERY == EVERY // 4 + 1

    def note(self, phase: int, model: nn.Module, terms: Mapping[str, Tensor], within: float) -> None:
        """Adds the norms of the terms' gradients over the model's parameters, and the share of pairs within the margin.

        The terms' graph is kept for the step that follows.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for at, name in enumerate(TERMS):
            if name in terms and terms[name].requires_grad:
                found = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
                squares = [gradient.double().square().sum() for gradient in found if gradient is not None]
                self.norms[phase, at] += float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        self.within[phase] += within
        self.samples[phase] += 1

    def summary(self) -> dict[str, Any]:
        """By phase: each term's mean norm and its share of the norms' sum, and the mean share of pairs within the
        margin of the centroids that the loss used. A phase that was too short to be measured is left out."""
        found: dict[str, Any] = {}
        for phase, samples in enumerate(self.samples.tolist()):
            if not samples:
                continue
            norms = (self.norms[phase] / samples).tolist()
            total = sum(norms) or 1.0
            found[f"phase {phase + 1}"] = {
                "gradient": {name: rounded(norm) for name, norm in zip(TERMS, norms, strict=True)},
                "share": {name: rounded(norm / total) for name, norm in zip(TERMS, norms, strict=True)},
                "within_margin": rounded(float(self.within[phase]) / samples),
            }
        return found


def geometry(outputs: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Of a model's outputs ``(N, K)`` for images with labels ``(N,)``: the least, median and largest distance between
    two class centroids, and the mean distance of an image to its own class's."""
    outputs = outputs.double()
    centroids = class_centroids(outputs, labels, classes)
    between = centroid_distances(outputs, labels, classes)
    return {
        "least": rounded(min(between)),
        "median": rounded(statistics.median(between)),
        "largest": rounded(max(between)),
        "own": rounded(float((outputs - centroids[labels]).norm(dim=1).mean())),
    }


def centroid_distances(outputs: Tensor, labels: Tensor, classes: int) -> Sequence[float]:
    """The distances between any two of the classes' centroids; classes without an image have none."""
    centroids = class_centroids(outputs.double(), labels, classes)
    distances: list[float] = torch.pdist(centroids[labels.bincount(minlength=classes) > 0]).tolist()
    return distances


def rounded(value: float) -> float:
    """To four significant digits: what is said of a loss needs no more."""
    return float(f"{value:.4g}")
