"""How well a score tells two groups apart."""

from __future__ import annotations

import torch
from torch import Tensor


def roc_auc(negatives: Tensor, positives: Tensor) -> float:
    """The area under the ROC curve: how likely a random positive scores above a random negative, ties counting half.

    Args:
        negatives, positives: scores ``(N,)`` and ``(M,)``, N and M at least 1.
    """
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives) + torch.searchsorted(ordered, positives, right=True)
    return float(below.double().mean() / (2 * len(negatives)))
