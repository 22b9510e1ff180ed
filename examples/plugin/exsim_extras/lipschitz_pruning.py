"""The removal silences the convolution channels that amplify most, and needs no images to find them."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from simulator.context import Context
from simulator.models import Classifier
from simulator.removals.base import Need, Removal, ThiefTask


class LipschitzPruning(Removal):
    """Sets the channels of a convolution to zero whose Lipschitz bound stands out from the other channels'.

    A channel's bound is the spectral norm of its kernel, read as a matrix ``(inputs, height * width)``. It stands out
    above the layer's mean plus ``deviations`` standard deviations; with ``deviations`` of at least the root of the
    number of channels none does. The paper takes the scale of the batch normalisation behind the convolution into the
    bound, too; this one does not look behind the layer.

    Example: ``{name: lipschitz_pruning, deviations: 1}`` washes harder than the default.
    """

    paper: ClassVar[str] = "Zheng et al., ECCV 2022"

    name: Literal["lipschitz_pruning"] = "lipschitz_pruning"
    deviations: float = Field(3, ge=0, description="above the layer's mean bound, from which a channel is silenced")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the model."""
        return frozenset()

    def remove(self, model: Classifier, task: ThiefTask, context: Context) -> Classifier:
        """See :meth:`Removal.remove`."""
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    bounds = torch.linalg.matrix_norm(layer.weight.flatten(2), ord=2)
                    loud = bounds > bounds.mean() + self.deviations * bounds.std(unbiased=False)
                    layer.weight[loud] = 0
                    if layer.bias is not None:
                        layer.bias[loud] = 0
        return model.eval()
