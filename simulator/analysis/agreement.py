"""How good a copy is: accuracy and agreement."""

from __future__ import annotations

from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of equal entries of two ``(N,)`` label tensors, in [0, 1]."""
    return float((predicted == labels).double().mean())


def agreement(first: Tensor, second: Tensor) -> float:
    """How often two models give an image the same top-1 label, in [0, 1]: its fidelity (Jagielski et al., 2020)."""
    return accuracy(first, second)
