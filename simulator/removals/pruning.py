"""Magnitude pruning: the smallest weights become zero.

With W the weights of all convolutions and linear layers, and a fraction p, a weight w stays where |w| exceeds the p-th
quantile of |W|, taken over all layers at once (``scope: global``) or over each layer by itself (``scope: layer``).

DeepTracer (Yang et al., AAAI 2026, Fig. 4 and 11) prunes "a certain proportion of weights with the smallest magnitude",
Function-Coupled Watermarks (Wen et al., 2023, Fig. 8 and 9) by "L1-norm unstructured". Neither says over what the
proportion is taken, so both scopes are offered. Biases and normalisation stay as they are, and nothing is retrained.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from simulator.context import Context
from simulator.models import Classifier
from simulator.removals.base import Need, Removal, ThiefTask
from simulator.watermarks.parts.reparametrised import layer_weights


class Pruning(Removal):
    """Sets the smallest weights of convolutions and linear layers to zero.

    Of n weights the ``round(fraction · n)`` smallest go. Example: of (.1, -.5, .3, -.2) ``fraction: 0.5`` leaves
    (0, -.5, .3, 0).
    """

    paper: ClassVar[str] = "Yang et al., AAAI 2026; Wen et al., 2023"

    name: Literal["pruning"] = "pruning"
    fraction: float = Field(0.5, ge=0, le=1, description="of the weights that become zero")
    scope: Literal["global", "layer"] = Field("global", description="over what the smallest are found")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing: see :attr:`Removal.needs`."""
        return frozenset()

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        weights = list(layer_weights(model).values())
        groups = [weights] if self.scope == "global" else [[weight] for weight in weights]
        with torch.no_grad():
            for group in groups:
                prune(group, self.fraction)
        return model.eval()


def prune(weights: list[Tensor], fraction: float) -> None:
    """Sets the ``round(fraction · n)`` smallest of the n values of ``weights`` to zero, in place; ties by position."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    count = round(fraction * len(magnitudes))
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    keep[magnitudes.argsort(stable=True)[:count]] = False
    for weight, kept in zip(weights, keep.split([weight.numel() for weight in weights]), strict=True):
        weight.masked_fill_(~kept.view_as(weight), 0)  # a product would make NaN of infinity, and -0 of -1
